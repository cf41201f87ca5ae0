// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The state of a shell, and how a line is carried out.

use super::line::{Line, Words, parse};
use super::output::{Output, host_shell};
use super::script::{Next, Script};
use super::table::{self, Arguments};
use super::{Flow, Outcome};
use crate::appliance::telling;
use crate::args::ShellArgs;
use crate::disk::{self, Use};
use crate::failure::Failure;
use crate::personality::Personality;
use crate::{places, stdout};
use std::fmt::{Display, Write};
use std::path::Path;
use std::process::Stdio;
use tranship_appliance::{CancelToken, Guest};
use tranship_block::Meter;
use tranship_convert::{ErrorKind, Key};
use tranship_inspect::Facts;

/// Commands that lines may produce lines for (`<!`), one inside the other.
const DEEPEST: usize = 8;

/// A shell with its guest.
#[derive(Debug)]
pub(super) struct Shell {
    /// The disks and the appliance.
    pub(super) guest: Guest,
    /// Operating systems that inspection found, by the device of their root.
    pub(super) roots: Vec<(String, Facts)>,
    /// Keys of encrypted volumes.
    pub(super) keys: Vec<Key>,
    /// Whether disks are mounted for reading by `-i`.
    pub(super) read_only: bool,
    personality: Personality,
    output: Output,
    depth: usize,
    meter: Meter,
}

impl Shell {
    pub(super) fn new(
        personality: Personality,
        options: &ShellArgs,
        cancel: &CancelToken,
        meter: &Meter,
    ) -> Self {
        Self {
            guest: Guest::new(places::settings(&options.machine)).with_cancel(cancel.clone()),
            roots: Vec::new(),
            keys: options.key.clone(),
            read_only: options.ro,
            personality,
            output: Output::Stdout,
            depth: 0,
            meter: meter.clone(),
        }
    }

    /// The name that the shell goes by.
    pub(super) fn program(&self) -> &'static str {
        self.personality.program()
    }

    /// The name in front of errors; scripts for guestfish look for libguestfs's.
    pub(super) fn prefix(&self) -> &'static str {
        match self.personality {
            Personality::Guestfish => "libguestfs",
            other => other.program(),
        }
    }

    /// Adds a disk; read-only ones can be written to, but what is written is thrown away.
    pub(super) fn add(
        &mut self,
        path: &Path,
        format: Option<&str>,
        read_only: bool,
    ) -> Result<(), Failure> {
        let usage = if read_only { Use::Discard } else { Use::Write };
        let disk = disk::open(path, format, usage, &self.meter)?;
        for warning in &disk.warnings {
            self.warn(warning);
        }
        Ok(self.guest.add_drive(disk.drive)?)
    }

    /// Starts the appliance.
    pub(super) fn launch(&mut self) -> Result<(), Failure> {
        let boot = places::boot(&telling())?;
        Ok(self.guest.launch(&boot)?)
    }

    /// Ends the appliance; what was written is on the disks then.
    pub(super) fn end(&mut self) -> Result<(), Failure> {
        Ok(self.guest.shutdown()?)
    }

    /// Prints something that may need attention.
    pub(super) fn warn(&self, warning: &str) {
        stdout::complain(&format!("{}: warning: {warning}", self.program()));
    }

    /// Prints a result.
    pub(super) fn print(&mut self, text: &str) -> Result<(), Failure> {
        self.output.write(text.as_bytes())
    }

    /// Prints a result of several lines.
    pub(super) fn print_lines<T: Display>(
        &mut self,
        lines: impl IntoIterator<Item = T>,
    ) -> Outcome {
        let mut text = String::new();
        for line in lines {
            let _ = writeln!(text, "{line}");
        }
        self.print(&text)?;
        Ok(Flow::Continue)
    }

    /// Prints bytes of a result.
    pub(super) fn print_bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.output.write(bytes)
    }

    /// The guest and the place for results, for calls that fill one from the other.
    pub(super) fn streams(&mut self) -> (&Guest, &mut Output) {
        (&self.guest, &mut self.output)
    }

    /// Carries one line out.
    pub(super) fn line(&mut self, next: Next, script: &mut Script) -> Outcome {
        let (forgiven, line) = match next {
            Next::Line(bytes) => parse(&bytes).map_err(Failure::usage)?,
            Next::Parsed(forgiven, line) => (forgiven, line),
        };
        let outcome = match line {
            Line::Nothing => Ok(Flow::Continue),
            Line::Host(command) => host(&command),
            Line::Lines(command) => self.lines_of(&command, script),
            Line::Call(words) => self.call(&words, script),
        };
        match outcome {
            Err(failure) if forgiven && failure.kind() != ErrorKind::Interrupted => {
                let place = script.place();
                let text = failure.render(self.prefix());
                stdout::complain(format!("{place}{text}").trim_end());
                Ok(Flow::Continue)
            }
            outcome => outcome,
        }
    }

    fn call(&mut self, words: &Words, script: &mut Script) -> Outcome {
        let Some(command) = table::find(&words.name) else {
            let failure = Failure::usage(format!("{}: unknown command", words.name));
            return Err(failure.hint("type 'help' for the commands that there are"));
        };
        let arguments = Arguments::read(command, &words.arguments, script)?;
        let Some(pipe) = &words.pipe else { return (command.run)(self, &arguments) };
        self.output = Output::pipe(pipe)?;
        let outcome = (command.run)(self, &arguments);
        std::mem::replace(&mut self.output, Output::Stdout).end()?;
        outcome
    }

    /// Runs the lines that a command of the host prints.
    fn lines_of(&mut self, command: &[u8], script: &mut Script) -> Outcome {
        if self.depth == DEEPEST {
            return Err(Failure::usage(format!("<! inside of <! more than {DEEPEST} times")));
        }
        let output = host_shell(command)
            .stdin(Stdio::inherit())
            .stderr(Stdio::inherit())
            .output()
            .map_err(|error| Failure::io("starting the command after <!", &error))?;
        self.depth += 1;
        let mut flow = Ok(Flow::Continue);
        for line in output.stdout.split(|byte| *byte == b'\n') {
            flow = self.line(Next::Line(line.to_vec()), script);
            if !matches!(flow, Ok(Flow::Continue)) {
                break;
            }
        }
        self.depth -= 1;
        match flow {
            Ok(Flow::Continue) => status(output.status).map(|()| Flow::Continue),
            other => other,
        }
    }
}

fn host(command: &[u8]) -> Outcome {
    let found = host_shell(command)
        .status()
        .map_err(|error| Failure::io("starting the command after !", &error))?;
    status(found).map(|()| Flow::Continue)
}

fn status(status: std::process::ExitStatus) -> Result<(), Failure> {
    if status.success() {
        return Ok(());
    }
    Err(Failure::new(ErrorKind::Conversion, format!("the host's command failed: {status}")))
}
