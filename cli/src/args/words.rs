// SPDX-License-Identifier: Apache-2.0 OR MIT
//! virt-v2v's long options with a single dash, such as `-os`.
//!
//! They are replaced before anything else reads the words, so that `-os X` can never be
//! taken for `-o s`. Values of options and everything after `--` stay as they are.

use super::absent;
use crate::failure::Failure;
use clap::{Arg, Command};
use std::ffi::OsString;

/// The word, and the option that it stands for.
const WORDS: &[(&str, &str)] = &[
    ("-if", "input-format"),
    ("-oa", "output-allocation"),
    ("-of", "output-format"),
    ("-on", "output-name"),
    ("-os", "output-storage"),
];

/// Adds the words to the help of the options that they stand for.
pub(super) fn describe(definition: Command) -> Command {
    WORDS.iter().fold(definition, |definition, (word, long)| {
        definition.mut_arg(long.replace('-', "_"), |argument| {
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            argument.help(format!("{help} [also: {word}]"))
        })
    })
}

/// How people know an option: `-os (--output-storage)` for `--output-storage <DIR>`.
pub(super) fn spelled(argument: &str) -> String {
    let long = argument.split_whitespace().next().unwrap_or(argument);
    match WORDS.iter().find(|(_, name)| long.strip_prefix("--") == Some(name)) {
        Some((word, _)) => format!("{word} ({long})"),
        None => long.to_owned(),
    }
}

/// Replaces the words by the options that `definition` knows.
pub(super) fn translate(
    words: Vec<OsString>,
    definition: &Command,
) -> Result<Vec<OsString>, Failure> {
    let mut translated = Vec::with_capacity(words.len());
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        if word == "--" {
            translated.push(word);
            translated.extend(words);
            break;
        }
        let Some(text) = word.to_str() else {
            translated.push(word);
            continue;
        };
        if let Some(failure) = absent::option(text) {
            return Err(failure);
        }
        let known = WORDS.iter().find(|(known, _)| *known == text);
        let takes_value = known.is_some() || takes_next(text, definition);
        translated.push(known.map_or(word, |(_, long)| format!("--{long}").into()));
        if takes_value {
            translated.extend(words.next());
        }
    }
    Ok(translated)
}

/// Whether the word after this one is its value.
fn takes_next(word: &str, definition: &Command) -> bool {
    let takes = |argument: &Arg| {
        argument.get_action().takes_values()
            && !argument.is_require_equals_set()
            && !argument.is_positional()
    };
    if let Some(long) = word.strip_prefix("--") {
        return definition.get_arguments().any(|argument| {
            let names = argument.get_all_aliases().unwrap_or_default();
            (argument.get_long() == Some(long) || names.contains(&long)) && takes(argument)
        });
    }
    let Some(cluster) = word.strip_prefix('-') else { return false };
    for (at, letter) in cluster.char_indices() {
        let found =
            definition.get_arguments().find(|argument| argument.get_short() == Some(letter));
        if found.is_some_and(takes) {
            // A value that is attached, as in `-oslocal`, is not in the next word.
            return at + letter.len_utf8() == cluster.len();
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::definition;

    fn translated(words: &[&str]) -> Result<Vec<String>, Failure> {
        let definition = definition();
        let convert = definition.find_subcommand("convert").unwrap();
        translate(words.iter().map(OsString::from).collect(), convert)
            .map(|words| words.into_iter().map(|word| word.into_string().unwrap()).collect())
    }

    #[test]
    fn whole_words_are_replaced_and_nothing_else() {
        let cases: &[(&[&str], &[&str])] = &[
            (&["-os", "/out"], &["--output-storage", "/out"]),
            (&["-o", "local", "-of", "qcow2"], &["-o", "local", "--output-format", "qcow2"]),
            // What follows an option is its value, whatever it looks like.
            (&["-on", "-os", "x"], &["--output-name", "-os", "x"]),
            (&["-o", "-of", "x"], &["-o", "-of", "x"]),
            (&["-vo", "-of", "x"], &["-vo", "-of", "x"]),
            (&["--network", "-of"], &["--network", "-of"]),
            (&["--network=a", "-of", "raw"], &["--network=a", "--output-format", "raw"]),
            (&["--json", "-of", "raw"], &["--json", "--output-format", "raw"]),
            // The value of --machine-readable is never the next word.
            (
                &["--machine-readable", "-of", "raw"],
                &["--machine-readable", "--output-format", "raw"],
            ),
            (&["--", "-of", "-os"], &["--", "-of", "-os"]),
            (&["-osx", "-olocal"], &["-osx", "-olocal"]),
            (&["disk-os"], &["disk-os"]),
        ];
        for (given, expected) in cases {
            assert_eq!(&translated(given).unwrap(), expected, "{given:?}");
        }
    }

    #[test]
    fn options_that_are_not_there_are_named_unless_they_are_values() {
        let failure = translated(&["-i", "ova", "-oc", "x"]).unwrap_err();
        assert!(failure.message().contains("-oc"), "{}", failure.message());
        assert_eq!(translated(&["-on", "-oc"]).unwrap(), ["--output-name", "-oc"]);
        assert_eq!(translated(&["--", "-oc"]).unwrap(), ["--", "-oc"]);
    }

    #[test]
    fn every_word_is_in_the_help() {
        let mut definition = definition();
        let help =
            definition.find_subcommand_mut("convert").unwrap().render_long_help().to_string();
        for (word, long) in WORDS {
            assert!(help.contains(&format!("[also: {word}]")), "{word}");
            assert!(help.contains(&format!("--{long}")), "{long}");
        }
    }
}
