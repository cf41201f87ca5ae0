// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How far a copy is, for people and for programs.

use crate::failure::Failure;
use crate::stdout;
use std::fs::File;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

/// Characters of the bar.
const WIDTH: u64 = 40;

/// Where it is shown.
#[derive(Debug)]
pub(super) struct Progress {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    shown: Shown,
    /// What was shown last.
    last: Option<Step>,
}

#[derive(Debug)]
enum Shown {
    Nothing,
    /// A bar on standard error.
    Bar,
    /// A line for each percent.
    Lines(File),
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Percent(u64),
    /// MiB of nobody knows how many.
    Mebibytes(u64),
}

impl Progress {
    /// Shows nothing, a bar for the empty text, or lines to the descriptor of this number.
    pub(super) fn start(wanted: Option<&str>) -> Result<Self, Failure> {
        let shown = match wanted {
            None => Shown::Nothing,
            Some("") => Shown::Bar,
            Some(text) => Shown::Lines(descriptor(text)?),
        };
        let progress = Self { state: Mutex::new(State { shown, last: None }) };
        progress.show(Step::Percent(0));
        Ok(progress)
    }

    /// `done` of `total` bytes are done, or of nobody knows how many.
    pub(super) fn set(&self, done: u64, total: Option<u64>) {
        self.show(match total {
            Some(0) | None => Step::Mebibytes(done >> 20),
            Some(total) => {
                let percent = u128::from(done.min(total)) * 100 / u128::from(total);
                // The whole is reached when everything is written, not before.
                Step::Percent(u64::try_from(percent).unwrap_or(0).min(99))
            }
        });
    }

    /// The copy is complete.
    pub(super) fn finish(&self) {
        self.show(Step::Percent(100));
        self.end();
    }

    /// There will be no more.
    pub(super) fn end(&self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(state.shown, Shown::Bar) {
            stdout::complain("");
        }
    }

    fn show(&self, step: Step) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last == Some(step) {
            return;
        }
        state.last = Some(step);
        // Nobody has to watch.
        let _ = match (&mut state.shown, step) {
            (Shown::Nothing, _) | (Shown::Lines(_), Step::Mebibytes(_)) => Ok(()),
            (Shown::Bar, step) => write!(std::io::stderr().lock(), "\r{}", bar(step)),
            (Shown::Lines(file), Step::Percent(percent)) => writeln!(file, "{percent}/100"),
        };
    }
}

fn bar(step: Step) -> String {
    match step {
        Step::Percent(percent) => {
            let stars = percent.min(100) * WIDTH / 100;
            let cell = |at| if at < stars { '*' } else { '-' };
            format!("{percent:3}% [{}]", (0..WIDTH).map(cell).collect::<String>())
        }
        Step::Mebibytes(count) => format!("{count} MiB"),
    }
}

/// A descriptor that the caller left open.
fn descriptor(text: &str) -> Result<File, Failure> {
    let number: i32 = match text.parse() {
        Ok(number) if number >= 0 => number,
        _ => return Err(Failure::usage(format!("--progress: could not parse: {text}"))),
    };
    // SAFETY: the number is only used to duplicate the descriptor; if nothing is open under
    // it the system says so. It is not -1.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let owned = borrowed.try_clone_to_owned().map_err(|error| {
        let text = format!("--progress: descriptor {number} cannot be written to");
        Failure::usage(text).because(&error)
    })?;
    Ok(File::from(owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn lines_are_those_of_nbdcopy() {
        let mut file = tempfile::tempfile().unwrap();
        let state = State { shown: Shown::Lines(file.try_clone().unwrap()), last: None };
        let progress = Progress { state: Mutex::new(state) };
        for done in [0, 1, 10, 19, 500, 999, 1000] {
            progress.set(done, Some(1000));
        }
        progress.set(5, None);
        progress.finish();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "0/100\n1/100\n50/100\n99/100\n100/100\n");
    }

    #[test]
    fn a_bar_grows() {
        assert_eq!(bar(Step::Percent(0)), format!("  0% [{}]", "-".repeat(40)));
        assert_eq!(bar(Step::Percent(51)), format!(" 51% [{}{}]", "*".repeat(20), "-".repeat(20)));
        assert_eq!(bar(Step::Percent(100)), format!("100% [{}]", "*".repeat(40)));
    }

    #[test]
    fn descriptors_that_are_none_are_refused() {
        for (text, expected) in
            [("x", "could not parse: x"), ("-1", "could not parse: -1"), ("98765", "98765 cannot")]
        {
            let failure = Progress::start(Some(text)).unwrap_err();
            assert!(failure.message().contains(expected), "{}", failure.message());
        }
    }
}
