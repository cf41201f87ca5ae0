// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Commands about files, directories and links.

use super::session::Shell;
use super::structs::{fields, long_line};
use super::table::{Arguments, Source};
use super::{Flow, Outcome};
use crate::failure::Failure;
use std::fs::File;
use std::io::{Read, Write};
use tranship_appliance::protocol::{Attributes, FileKind, GuestPath, NewFile};
use tranship_appliance::{Error, ErrorKind, Result, Silent};

/// Names in one directory, at most.
const MOST_NAMES: usize = 1 << 20;

/// What new files get: root's, readable by all.
const NEW: NewFile = NewFile { mode: 0o644, uid: 0, gid: 0 };

fn names(shell: &Shell, path: &GuestPath) -> Result<Vec<Vec<u8>>> {
    let names = shell.guest.read_dir(path, MOST_NAMES)?;
    Ok(names.into_iter().map(|name| name.name).collect())
}

pub(super) fn ls(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let mut text = Vec::new();
    for name in names(shell, arguments.path(0))? {
        text.extend(name);
        text.push(b'\n');
    }
    shell.print_bytes(&text)?;
    Ok(Flow::Continue)
}

pub(super) fn ll(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let folder = arguments.path(0);
    let mut text = Vec::new();
    for name in names(shell, folder)? {
        let path = folder.join(&name);
        // Gone since the directory was read, or a name that cannot be looked at.
        let Some(found) = shell.guest.attributes(&path, false)? else { continue };
        text.extend(long_line(&found).into_bytes());
        text.push(b' ');
        text.extend(name);
        if found.kind == FileKind::Link {
            text.extend(b" -> ");
            text.extend(shell.guest.read_link(&path)?);
        }
        text.push(b'\n');
    }
    shell.print_bytes(&text)?;
    Ok(Flow::Continue)
}

/// Passes a file's contents to where results go.
fn show(shell: &mut Shell, path: &GuestPath) -> std::result::Result<(), Failure> {
    let (guest, output) = shell.streams();
    let mut broken = None;
    let mut take = |bytes: &[u8]| {
        output.write(bytes).map_err(|failure| {
            let error = Error::new(ErrorKind::Io, failure.message());
            broken = Some(failure);
            error
        })
    };
    let outcome = guest.download(path, &mut take, &Silent);
    match broken {
        Some(failure) => Err(failure),
        None => Ok(outcome?),
    }
}

pub(super) fn cat(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    show(shell, arguments.path(0))?;
    shell.print("\n")?;
    Ok(Flow::Continue)
}

pub(super) fn download(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let Some(target) = arguments.target(1) else {
        show(shell, arguments.path(0))?;
        return Ok(Flow::Continue);
    };
    let failed = |error: std::io::Error| {
        Error::new(ErrorKind::Io, format!("download: {}", target.display())).because(error)
    };
    let mut file = File::create(target).map_err(failed)?;
    let mut take = |bytes: &[u8]| file.write_all(bytes).map_err(failed);
    shell.guest.download(arguments.path(0), &mut take, &Silent)?;
    Ok(Flow::Continue)
}

pub(super) fn upload(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let failed = |path: &std::path::Path, error: std::io::Error| {
        Error::new(ErrorKind::Io, format!("upload: {}", path.display())).because(error)
    };
    let mut source: Box<dyn Read> = match arguments.source(0) {
        Source::File(path) => Box::new(File::open(path).map_err(|error| failed(path, error))?),
        Source::Stdin => Box::new(std::io::stdin()),
        Source::Here(text) => Box::new(std::io::Cursor::new(text.clone())),
    };
    shell.guest.upload(arguments.path(1), &mut source, NEW, false, &Silent)?;
    Ok(Flow::Continue)
}

pub(super) fn write(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let mut content = arguments.bytes(1);
    shell.guest.upload(arguments.path(0), &mut content, NEW, false, &Silent)?;
    Ok(Flow::Continue)
}

fn attributes(shell: &mut Shell, call: &str, path: &GuestPath, follow: bool) -> Outcome {
    let Some(found) = shell.guest.attributes(path, follow)? else {
        let message = format!("{call}: {path}: No such file or directory");
        return Err(Error::new(ErrorKind::Call, message).into());
    };
    shell.print(&fields(&found))?;
    Ok(Flow::Continue)
}

pub(super) fn stat(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    attributes(shell, "stat", arguments.path(0), true)
}

pub(super) fn lstat(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    attributes(shell, "lstat", arguments.path(0), false)
}

/// Prints whether `holds` is true of the file; a file that is not there is nothing.
fn test(
    shell: &mut Shell,
    path: &GuestPath,
    follow: bool,
    holds: fn(&Attributes) -> bool,
) -> Outcome {
    let found = shell.guest.attributes(path, follow)?;
    shell.print(&format!("{}\n", found.as_ref().is_some_and(holds)))?;
    Ok(Flow::Continue)
}

pub(super) fn exists(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    test(shell, arguments.path(0), true, |_| true)
}

pub(super) fn is_file(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let follow = arguments.flag("followsymlinks");
    test(shell, arguments.path(0), follow, |found| found.kind == FileKind::File)
}

pub(super) fn is_dir(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let follow = arguments.flag("followsymlinks");
    test(shell, arguments.path(0), follow, |found| found.kind == FileKind::Directory)
}

pub(super) fn is_symlink(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    test(shell, arguments.path(0), false, |found| found.kind == FileKind::Link)
}

pub(super) fn readlink(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let mut target = shell.guest.read_link(arguments.path(0))?;
    target.push(b'\n');
    shell.print_bytes(&target)?;
    Ok(Flow::Continue)
}

pub(super) fn make_dir(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    shell.guest.make_dir(arguments.path(0), 0o755)?;
    Ok(Flow::Continue)
}

pub(super) fn remove(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    shell.guest.remove(arguments.path(0))?;
    Ok(Flow::Continue)
}

pub(super) fn symlink(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    shell.guest.symlink(arguments.path(1), arguments.bytes(0))?;
    Ok(Flow::Continue)
}

pub(super) fn copy(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    shell.guest.copy(arguments.path(0), arguments.path(1))?;
    Ok(Flow::Continue)
}
