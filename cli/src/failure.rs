// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What ended the program, as people and callers see it.

use crate::personality::Personality;
use crate::{signals, stdout};
use std::error::Error as StdError;
use std::fmt::Write;
use tranship_convert::ErrorKind;
use tranship_linux::Blocker;

/// A failure with its causes, everything that has to be remedied, and what helps.
#[derive(Debug)]
pub(crate) struct Failure(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    causes: Vec<String>,
    hints: Vec<String>,
    blockers: Vec<(String, String, String)>,
    shown: bool,
    /// The exit code, if the kind does not decide it.
    code: Option<u8>,
    /// The command that is named with the program.
    command: Option<String>,
}

impl Failure {
    /// A failure of `kind` that says `message`.
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            causes: Vec::new(),
            hints: Vec::new(),
            blockers: Vec::new(),
            shown: false,
            code: None,
            command: None,
        }))
    }

    /// The command line is wrong.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// The operating system refused something of this program's own.
    pub(crate) fn io(doing: &str, error: &std::io::Error) -> Self {
        Self::new(ErrorKind::Transient, format!("{doing} failed")).because(error)
    }

    /// The same with something that helps.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hints.push(hint.into());
        self
    }

    /// The same with a cause and its causes.
    #[must_use]
    pub(crate) fn because(mut self, cause: &(dyn StdError + 'static)) -> Self {
        let mut next = Some(cause);
        while let Some(cause) = next {
            let text = cause.to_string();
            // Some errors repeat their source in their own text.
            if !self.0.causes.last().is_some_and(|last: &String| last.ends_with(&text)) {
                self.0.causes.push(text);
            }
            next = cause.source();
        }
        self
    }

    /// The same as the cause of something that says `message`.
    #[must_use]
    pub(crate) fn within(mut self, message: impl Into<String>) -> Self {
        self.0.causes.insert(0, std::mem::replace(&mut self.0.message, message.into()));
        self
    }

    /// The same, with what it is about in front.
    #[must_use]
    pub(crate) fn about(mut self, what: &str) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// The same with this exit code, unless it has one of its own.
    #[must_use]
    pub(crate) fn exiting_with(mut self, code: u8) -> Self {
        self.0.code.get_or_insert(code);
        self
    }

    /// The same, reported by one of the program's commands.
    #[must_use]
    pub(crate) fn of_command(mut self, command: impl Into<String>) -> Self {
        self.0.command = Some(command.into());
        self
    }

    /// The same, but somebody has printed it already.
    #[must_use]
    pub(crate) fn already_shown(mut self) -> Self {
        self.0.shown = true;
        self
    }

    /// The first line.
    pub(crate) fn message(&self) -> &str {
        &self.0.message
    }

    /// What kind of failure it is.
    pub(crate) fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The exit code. Whatever fails after a signal fails because of it, though it may look
    /// like something else from inside.
    pub(crate) fn exit_code(&self) -> u8 {
        signals::exit_code().or(self.0.code).unwrap_or_else(|| self.0.kind.exit_code())
    }

    /// All of it, one fact a line, after `program`'s name.
    pub(crate) fn render(&self, program: &str) -> String {
        let mut text = format!("{program}: error: {}\n", self.0.message);
        for cause in &self.0.causes {
            let cause = cause.replace('\n', "\n  ");
            let _ = writeln!(text, "caused by: {cause}");
        }
        for (code, what, remedy) in &self.0.blockers {
            let _ = writeln!(text, "blocked [{code}]: {what}");
            let _ = writeln!(text, "  remedy: {remedy}");
        }
        for hint in &self.0.hints {
            let _ = writeln!(text, "hint: {hint}");
        }
        text
    }

    /// All of it as the program does it that the caller thinks this is.
    pub(crate) fn render_for(&self, personality: Personality) -> String {
        let program = personality.program();
        if !matches!(
            personality,
            Personality::QemuImg | Personality::QemuNbd | Personality::Nbdinfo
        ) {
            return self.render(program);
        }
        let mut text = program.to_owned();
        if let Some(command) = &self.0.command {
            let _ = write!(text, " {command}");
        }
        let _ = write!(text, ": {}", self.0.message);
        for cause in &self.0.causes {
            // The number means nothing to those who read the words.
            let cause = cause.split(" (os error ").next().unwrap_or(cause);
            let _ = write!(text, ": {cause}");
        }
        for hint in &self.0.hints {
            let _ = write!(text, "\n{hint}");
        }
        text.push('\n');
        text
    }

    /// Prints it on standard error.
    pub(crate) fn print(&self, personality: Personality) {
        if !self.0.shown {
            stdout::complain(self.render_for(personality).trim_end());
        }
    }

    /// Everything that has to be remedied: code, what is wrong, what to do.
    pub(crate) fn blockers(&self) -> &[(String, String, String)] {
        &self.0.blockers
    }

    /// The chain of causes.
    pub(crate) fn causes(&self) -> &[String] {
        &self.0.causes
    }

    /// What helps.
    pub(crate) fn hints(&self) -> &[String] {
        &self.0.hints
    }
}

fn with_source(mut failure: Failure, error: &dyn StdError) -> Failure {
    if let Some(source) = error.source() {
        failure = failure.because(source);
    }
    failure
}

impl From<tranship_convert::Error> for Failure {
    fn from(error: tranship_convert::Error) -> Self {
        let mut failure = with_source(Self::new(error.kind(), error.to_string()), &error);
        failure.0.hints.extend(error.remedy().map(ToOwned::to_owned));
        failure.0.blockers = error
            .blockers()
            .iter()
            .map(|Blocker { code, what, remedy, .. }| {
                ((*code).to_owned(), what.clone(), remedy.clone())
            })
            .collect();
        failure
    }
}

impl From<tranship_appliance::Error> for Failure {
    fn from(error: tranship_appliance::Error) -> Self {
        use tranship_appliance::ErrorKind as Kind;
        let kind = match error.kind() {
            Kind::Usage => ErrorKind::Usage,
            Kind::NoBackend => ErrorKind::Blocked,
            Kind::Lost | Kind::Io => ErrorKind::Transient,
            Kind::Cancelled => ErrorKind::Interrupted,
            _ => ErrorKind::Conversion,
        };
        let mut failure = with_source(Self::new(kind, error.to_string()), &error);
        failure.0.hints.extend(error.remedy().map(ToOwned::to_owned));
        failure
    }
}

impl From<tranship_appliance_image::Error> for Failure {
    fn from(error: tranship_appliance_image::Error) -> Self {
        use tranship_appliance_image::ErrorKind as Kind;
        let kind = match error.kind() {
            Kind::Usage => ErrorKind::Usage,
            Kind::Corrupt | Kind::Unsupported => ErrorKind::Input,
            Kind::Denied | Kind::NotFound => ErrorKind::Blocked,
            _ => ErrorKind::Transient,
        };
        let mut failure = with_source(Self::new(kind, error.to_string()), &error);
        failure.0.hints.extend(error.what_helps().map(ToOwned::to_owned));
        failure
    }
}

impl From<tranship_block::Error> for Failure {
    fn from(error: tranship_block::Error) -> Self {
        use tranship_block::ErrorKind as Kind;
        let kind = match error.kind() {
            Kind::Usage => ErrorKind::Usage,
            Kind::Io => ErrorKind::Transient,
            _ => ErrorKind::Input,
        };
        with_source(Self::new(kind, error.to_string()), &error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fact_has_its_line() {
        let cause = std::io::Error::from_raw_os_error(28);
        let failure =
            Failure::new(ErrorKind::Transient, "copying failed").because(&cause).hint("tidy up");
        let text = failure.render("tranship");
        assert_eq!(
            text,
            "tranship: error: copying failed\n\
             caused by: No space left on device (os error 28)\n\
             hint: tidy up\n"
        );
        assert_eq!(failure.exit_code(), 75);
    }

    #[test]
    fn all_blockers_are_listed_with_their_remedies() {
        let blockers = ["one", "two"].map(|code| Blocker {
            code,
            what: format!("{code} is wrong"),
            remedy: format!("mend {code}"),
        });
        let failure = Failure::from(tranship_convert::Error::blocked(blockers.into()));
        let text = failure.render("virt-v2v");
        assert!(text.starts_with("virt-v2v: error: the guest cannot be converted"), "{text}");
        assert!(text.contains("blocked [one]: one is wrong\n  remedy: mend one\n"), "{text}");
        assert!(text.contains("blocked [two]: two is wrong\n  remedy: mend two\n"), "{text}");
        assert_eq!(failure.exit_code(), 3);
    }
}
