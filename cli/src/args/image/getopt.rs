// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mistakes in the command line in the words of getopt, for callers of `qemu-img`.

use crate::failure::Failure;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use std::ffi::OsString;

/// The first word, which has to be a command or an option of the program itself.
pub(super) fn command(program: &str, rest: &[OsString]) -> Result<String, Failure> {
    let Some(first) = rest.first() else {
        return Err(Failure::usage("Not enough arguments").hint(try_help(program, "")));
    };
    let word = first.to_string_lossy().into_owned();
    let definition = super::as_qemu_img("qemu-img");
    if word.starts_with('-') || word == "help" || definition.find_subcommand(&word).is_some() {
        return Ok(word);
    }
    Err(Failure::usage(format!("Command not found: {word}")).hint(try_help(program, "")))
}

/// Replaces words whose meaning depends on where they stand.
pub(super) fn translate(command: &str, mut rest: Vec<OsString>) -> Vec<OsString> {
    // The last word of `resize` is a size, also if it looks like an option: -1G.
    let relative = |word: &OsString| {
        let bytes = word.as_encoded_bytes();
        bytes.first() == Some(&b'-')
            && bytes.get(1).is_some_and(|b| b.is_ascii_digit() || *b == b'.')
    };
    if command == "resize" && rest.last().is_some_and(relative) && !rest.contains(&"--".into()) {
        rest.insert(rest.len().saturating_sub(1), "--".into());
    }
    rest
}

/// Where to find out more.
pub(super) fn try_help(program: &str, command: &str) -> String {
    let space = if command.is_empty() { "" } else { " " };
    format!("Try '{program} {command}{space}--help' for more info")
}

/// The failure for a mistake that the parser found.
pub(super) fn failure(program: &str, rest: &[OsString], error: &clap::Error) -> Failure {
    let first = rest.first().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
    let command = if first.starts_with('-') { String::new() } else { first };
    let failure = Failure::usage(message(rest, error)).hint(try_help(program, &command));
    if command.is_empty() { failure } else { failure.of_command(command) }
}

/// The mistake in getopt's words.
pub(in crate::args) fn message(rest: &[OsString], error: &clap::Error) -> String {
    let named = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let word = named.split(['=', ' ']).next().unwrap_or_default();
    let letter = word.strip_prefix('-').filter(|rest| !rest.starts_with('-'));
    match error.kind() {
        ErrorKind::UnknownArgument => match letter {
            Some(letter) => format!("invalid option -- '{letter}'"),
            None => format!("unrecognized option '{word}'"),
        },
        ErrorKind::TooManyValues => format!("option '{word}' doesn't allow an argument"),
        ErrorKind::InvalidValue | ErrorKind::WrongNumberOfValues | ErrorKind::TooFewValues => {
            missing_value(rest, word)
        }
        _ => {
            let text = error.render().to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            text.lines().next().unwrap_or_default().to_owned()
        }
    }
}

/// The value of the last word is missing: there is no other way to lack one.
fn missing_value(rest: &[OsString], word: &str) -> String {
    let last = rest.last().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
    if last.starts_with("--") {
        return format!("option '{word}' requires an argument");
    }
    let letter = last.chars().next_back().unwrap_or('?');
    format!("option requires an argument -- '{letter}'")
}

#[cfg(test)]
mod tests {
    use crate::args::{Parsed, parse};
    use crate::personality::Personality;
    use std::ffi::OsString;

    fn rendered(words: &[&str]) -> String {
        let words = std::iter::once("qemu-img").chain(words.iter().copied()).map(OsString::from);
        let failure = parse(Personality::QemuImg, words.collect()).unwrap_err();
        failure.render_for(Personality::QemuImg)
    }

    #[test]
    fn mistakes_are_reported_as_getopt_does() {
        let cases: &[(&[&str], &str)] = &[
            (&[], "qemu-img: Not enough arguments\nTry 'qemu-img --help' for more info\n"),
            (&["foo"], "qemu-img: Command not found: foo\nTry 'qemu-img --help' for more info\n"),
            (
                &["--nope"],
                "qemu-img: unrecognized option '--nope'\nTry 'qemu-img --help' for more info\n",
            ),
            (
                &["info", "--nope", "a"],
                "qemu-img info: unrecognized option '--nope'\n\
                 Try 'qemu-img info --help' for more info\n",
            ),
            (
                &["info", "-Z", "a"],
                "qemu-img info: invalid option -- 'Z'\nTry 'qemu-img info --help' for more info\n",
            ),
            (
                &["info", "a", "-f"],
                "qemu-img info: option requires an argument -- 'f'\n\
                 Try 'qemu-img info --help' for more info\n",
            ),
            (
                &["info", "--format"],
                "qemu-img info: option '--format' requires an argument\n\
                 Try 'qemu-img info --help' for more info\n",
            ),
            (
                &["create", "a.raw", "-1"],
                "qemu-img create: invalid option -- '1'\n\
                 Try 'qemu-img create --help' for more info\n",
            ),
        ];
        for (words, expected) in cases {
            assert_eq!(rendered(words), *expected, "{words:?}");
        }
    }

    #[test]
    fn help_is_a_result_for_every_command() {
        for command in ["info", "resize", "convert", "bitmap"] {
            let words = ["qemu-img", command, "--help"].map(OsString::from);
            let parsed = parse(Personality::QemuImg, words.into()).unwrap();
            assert!(matches!(parsed, Parsed::Text(text) if text.contains("--object")), "{command}");
        }
    }
}
