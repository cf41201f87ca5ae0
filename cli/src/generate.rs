// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Manual pages and completions, made of the parser's own definition.

use crate::failure::Failure;
use crate::{args, stdout};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use std::path::Path;

/// Prints the script for `shell`.
pub(crate) fn completions(shell: Shell) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::definition(), "tranship", &mut script);
    stdout::bytes(&script)?;
    Ok(0)
}

/// Writes a page for every command to `folder`, or prints the main page.
pub(crate) fn man(folder: Option<&Path>) -> Result<u8, Failure> {
    let mut definition = args::definition();
    definition.build();
    let Some(folder) = folder else {
        stdout::bytes(&page(definition, "tranship")?)?;
        return Ok(0);
    };
    std::fs::create_dir_all(folder)
        .map_err(|error| Failure::usage(format!("{}: {error}", folder.display())))?;
    for (name, command) in pages(definition, "tranship") {
        let path = folder.join(format!("{name}.1"));
        std::fs::write(&path, page(command, &name)?)
            .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    }
    Ok(0)
}

/// All visible commands with the names of their pages.
fn pages(command: Command, name: &str) -> Vec<(String, Command)> {
    let below: Vec<(String, Command)> = command
        .get_subcommands()
        .filter(|below| !below.is_hide_set() && below.get_name() != "help")
        .flat_map(|below| pages(below.clone(), &format!("{name}-{}", below.get_name())))
        .collect();
    std::iter::once((name.to_owned(), command)).chain(below).collect()
}

fn page(command: Command, name: &str) -> Result<Vec<u8>, Failure> {
    let command = command.display_name(name.to_owned());
    let mut page = Vec::new();
    Man::new(command)
        .render(&mut page)
        .map_err(|error| Failure::io("writing a manual page", &error))?;
    Ok(page)
}
