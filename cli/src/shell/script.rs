// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where commands come from: the command line, a file, standard input, a prompt.

use super::line::{Line, Words};
use crate::args::ShellArgs;
use crate::failure::Failure;
use crate::{signals, stdout};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal};
use std::os::unix::ffi::OsStringExt;

/// What kind of source it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Words of the command line, which the caller's shell has parsed.
    Words,
    /// A script: the first failure ends it.
    Script,
    /// A person, who sees failures and goes on.
    Prompt,
}

/// The next thing to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A line that has to be parsed.
    Line(Vec<u8>),
    /// What was parsed already, and whether its failure is forgiven.
    Parsed(bool, Line),
}

/// Commands, one after the other.
pub(super) struct Script {
    origin: Origin,
    words: VecDeque<Next>,
    lines: Option<Box<dyn BufRead>>,
    name: String,
    number: usize,
}

impl Script {
    /// The commands that the options lead to.
    pub(super) fn of(options: &ShellArgs) -> Result<Self, Failure> {
        let script = |origin, name: &str, lines| Self {
            origin,
            words: VecDeque::new(),
            lines,
            name: name.to_owned(),
            number: 0,
        };
        if !options.words.is_empty() {
            let words = separated(&options.words)?;
            return Ok(Self { words, ..script(Origin::Words, "*command line*", None) });
        }
        if let Some(path) = &options.file {
            let file = File::open(path).map_err(|error| {
                Failure::usage(format!("{} cannot be read", path.display())).because(&error)
            })?;
            let name = path.display().to_string();
            return Ok(script(Origin::Script, &name, Some(Box::new(BufReader::new(file)))));
        }
        let input = std::io::stdin();
        let origin = if input.is_terminal() { Origin::Prompt } else { Origin::Script };
        Ok(script(origin, "*stdin*", Some(Box::new(BufReader::new(input)))))
    }

    /// What kind of source it is.
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// The place of the last line, for messages; empty at a prompt.
    pub(super) fn place(&self) -> String {
        match self.origin {
            Origin::Prompt => String::new(),
            Origin::Words | Origin::Script => format!("{}:{}: ", self.name, self.number),
        }
    }

    /// The next command, `None` at the end.
    pub(super) fn next(&mut self, program: &str) -> Result<Option<Next>, Failure> {
        if self.origin == Origin::Words {
            return Ok(self.words.pop_front());
        }
        if self.origin == Origin::Prompt {
            let prompt =
                if program == "guestfish" { "><fs> ".to_owned() } else { format!("{program}> ") };
            stdout::print(&prompt)?;
        }
        Ok(self.raw_line()?.map(Next::Line))
    }

    /// The next line as it is.
    fn raw_line(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        let Some(lines) = &mut self.lines else { return Ok(None) };
        let mut line = Vec::new();
        signals::at_prompt(self.origin == Origin::Prompt);
        let read = lines.read_until(b'\n', &mut line);
        signals::at_prompt(false);
        let read = read.map_err(|error| Failure::io("reading commands", &error))?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        Ok(Some(line))
    }

    /// The lines up to one that is exactly `end`, for `-<<END`.
    pub(super) fn until(&mut self, end: &str) -> Result<Vec<u8>, Failure> {
        let mut found = Vec::new();
        while let Some(line) = self.raw_line()? {
            if line == end.as_bytes() {
                return Ok(found);
            }
            found.extend(line);
            found.push(b'\n');
        }
        Err(Failure::usage(format!("end of input reached without finding '{end}'")))
    }
}

/// Commands of the command line: their words are arguments as they are.
fn separated(words: &[OsString]) -> Result<VecDeque<Next>, Failure> {
    words
        .split(|word| word == ":")
        .map(|command| {
            let (name, arguments) = command
                .split_first()
                .ok_or_else(|| Failure::usage("empty command on command line"))?;
            let name = name.to_string_lossy();
            let bare = name.trim_start_matches('-');
            let words = Words {
                name: bare.to_owned(),
                arguments: arguments.iter().map(|word| word.clone().into_vec()).collect(),
                pipe: None,
            };
            Ok(Next::Parsed(bare.len() < name.len(), Line::Call(words)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_command_line_are_not_parsed_again() {
        let words = ["-ls", "/a b", ":", "echo", "|", "\"x\""].map(OsString::from);
        let found = separated(&words).unwrap();
        let call = |name: &str, arguments: &[&str]| {
            Line::Call(Words {
                name: name.into(),
                arguments: arguments.iter().map(|word| word.as_bytes().to_vec()).collect(),
                pipe: None,
            })
        };
        assert_eq!(
            found,
            [
                Next::Parsed(true, call("ls", &["/a b"])),
                Next::Parsed(false, call("echo", &["|", "\"x\""]))
            ]
        );
        for wrong in [&["run", ":"][..], &[":", "run"], &["run", ":", ":", "ls"]] {
            let words: Vec<OsString> = wrong.iter().map(OsString::from).collect();
            let failure = separated(&words).unwrap_err();
            assert_eq!(failure.message(), "empty command on command line");
        }
    }
}
