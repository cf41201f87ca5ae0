// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is said besides results: warnings, and how far the work is.

use crate::personality::Personality;
use crate::stdout;
use signal_hook::consts::SIGUSR1;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Where a command's words go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Console {
    personality: Personality,
}

impl Console {
    /// For the program that the caller thinks this is.
    pub(crate) fn new(personality: Personality) -> Self {
        Self { personality }
    }

    /// The program that the caller thinks this is.
    pub(crate) fn personality(self) -> Personality {
        self.personality
    }

    /// Says what the user should know.
    pub(crate) fn warn(self, text: &str) {
        stdout::complain(&format!("{}: warning: {text}", self.personality.program()));
    }

    /// Says what is wrong although the work goes on.
    pub(crate) fn report(self, text: &str) {
        let colon = match self.personality {
            Personality::QemuImg => "",
            _ => " error:",
        };
        stdout::complain(&format!("{}:{colon} {text}", self.personality.program()));
    }

    /// The warning about writing to a disk whose format was guessed to be raw.
    pub(crate) fn warn_of_guessed_raw(name: &str) {
        stdout::complain(&format!(
            "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
             A guest can make a raw disk look like any format: give the format with -f raw\n         \
             if this is what the image is."
        ));
    }
}

/// Hundredths of a percent.
const WHOLE: u64 = 10_000;

/// How far the work is, as lines on standard output that replace each other.
///
/// Nothing is printed unless it was asked for, with `-p` or by the signal SIGUSR1.
#[derive(Debug)]
pub(crate) struct Progress {
    is_shown: bool,
    wanted: Arc<AtomicBool>,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    now: u64,
    printed: Option<u64>,
}

impl Progress {
    /// The work starts.
    pub(crate) fn start(is_shown: bool) -> Self {
        let wanted = Arc::new(AtomicBool::new(false));
        // Without the signal there are no lines in between, and the work goes on.
        let _ = signal_hook::flag::register(SIGUSR1, Arc::clone(&wanted));
        let progress =
            Self { is_shown, wanted, state: Mutex::new(State { now: 0, printed: None }) };
        progress.set(0, 1);
        progress
    }

    /// `done` of `total` are done; may be called from any thread, and with less than before.
    pub(crate) fn set(&self, done: u64, total: u64) {
        let share = match total {
            0 => WHOLE,
            total => {
                u64::try_from(u128::from(done.min(total)) * u128::from(WHOLE) / u128::from(total))
                    .unwrap_or(WHOLE)
            }
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.now = state.now.max(share);
        let asked = self.wanted.swap(false, Ordering::Relaxed);
        if let Some(line) = next_line(&mut state, self.is_shown, asked) {
            print(&line);
        }
    }

    /// The work has ended well.
    pub(crate) fn finish(self) {
        self.set(1, 1);
        self.end();
    }

    /// The work has ended early.
    pub(crate) fn end(self) {
        if self.is_shown {
            print("\n");
        }
    }
}

/// The line that is due: every percent with `-p`, and when somebody asks.
fn next_line(state: &mut State, is_shown: bool, asked: bool) -> Option<String> {
    let due = match state.printed {
        None => true,
        Some(printed) => {
            state.now >= printed.saturating_add(100) || (state.now == WHOLE && printed != WHOLE)
        }
    };
    if !(asked || is_shown && due) {
        return None;
    }
    state.printed = Some(state.now);
    Some(format!("    ({}.{:02}/100%)\r", state.now / 100, state.now % 100))
}

/// Nobody has to watch.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_due_every_percent_and_at_the_end() {
        let mut state = State { now: 0, printed: None };
        let mut lines = Vec::new();
        for now in [0, 50, 99, 100, 4267, 4300, 9990, 10_000, 10_000] {
            state.now = now;
            lines.extend(next_line(&mut state, true, false));
        }
        assert_eq!(
            lines,
            ["0.00", "1.00", "42.67", "99.90", "100.00"].map(|n| format!("    ({n}/100%)\r"))
        );
    }

    #[test]
    fn without_being_asked_nothing_is_printed() {
        let mut state = State { now: 4267, printed: None };
        assert_eq!(next_line(&mut state, false, false), None);
        assert_eq!(next_line(&mut state, false, true).unwrap(), "    (42.67/100%)\r");
    }
}
