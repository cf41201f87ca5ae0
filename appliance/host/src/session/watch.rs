// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Notices that the appliance has hung or ended while calls wait for it.
//!
//! A call may take hours: what counts is that the agent says something now and then. If it says
//! nothing for a while it is asked whether it is there, which it answers beside whatever else it
//! does; if no answer comes, every call fails.

use super::shared::{Cause, Shared, lock, lost};
use crate::Error;
use rustix::net::SendFlags;
use std::fmt::Debug;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use tranship_protocol::{Call, Frame};

/// How long a silent agent is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Time without a word after which the agent is asked whether it is there.
    pub quiet: Duration,
    /// Time that it has to answer.
    pub answer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { quiet: Duration::from_secs(30), answer: Duration::from_mins(1) }
    }
}

/// Why nothing is answered any more, for every call that waits and all later ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loss {
    /// What has happened.
    pub(crate) message: String,
    /// What the machine said last.
    pub(crate) because: Option<String>,
    /// What can be done to find out more.
    pub(crate) remedy: Option<String>,
}

impl Loss {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), ..Self::default() }
    }

    /// The error of a call that was lost.
    pub(super) fn error(&self, name: &str) -> Error {
        let mut error = lost(format!("{name}: {}", self.message));
        if let Some(remedy) = &self.remedy {
            error = error.with_remedy(remedy);
        }
        if let Some(because) = &self.because {
            error = error.because(because.clone());
        }
        error
    }
}

/// What a session stands on.
pub(crate) trait Ground: Debug + Send + Sync {
    /// How the machine ended, if it has.
    fn ended(&self) -> Option<String>;

    /// Finds out more about the end of the session, which nobody asked for.
    fn explain(&self, cause: &Cause) -> Loss;
}

/// The longest time between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// This process was stopped if it slept that much longer than it wanted to.
const OVERSLEPT: Duration = Duration::from_secs(2);

/// The watching thread's.
pub(super) struct Watchdog {
    pub(super) shared: Arc<Shared>,
    pub(super) control: Arc<Mutex<UnixStream>>,
    /// Both streams, to hang up.
    pub(super) streams: [UnixStream; 2],
    pub(super) patience: Patience,
    pub(super) ground: Arc<dyn Ground>,
}

impl Watchdog {
    /// Watches until the session is over.
    pub(super) fn run(&self) {
        let step = (self.patience.quiet.min(self.patience.answer) / 4)
            .clamp(Duration::from_millis(5), LOOK);
        // Since when, and whether the question is on its way.
        let mut asked: Option<(Instant, bool)> = None;
        let mut gone = false;
        while let Some(waited) = self.wait_for_calls() {
            if waited {
                // The question was about calls that are over.
                asked = None;
            }
            let before = Instant::now();
            std::thread::sleep(step);
            if before.elapsed() > step.saturating_add(OVERSLEPT) {
                // The machine may have stood still as well.
                self.shared.heard_something();
                asked = None;
            }
            if self.shared.standing_still.load(Ordering::SeqCst) > 0 {
                asked = None;
                continue;
            }
            if let Some(how) = self.ground.ended() {
                // One more look, for the answer that is still on its way.
                if gone {
                    return self.give_up(&Cause::Ended(how));
                }
                gone = true;
                continue;
            }
            match asked {
                Some((at, _)) if *lock(&self.shared.heard) >= at => {
                    tracing::debug!(after = ?at.elapsed(), "the agent is there");
                    asked = None;
                }
                Some((at, _)) if at.elapsed() > self.patience.answer => {
                    return self.give_up(&Cause::Hung(self.hung()));
                }
                Some((at, false)) => asked = Some((at, self.ask())),
                None if self.silence() > self.patience.quiet => {
                    tracing::debug!(
                        calls = self.waiting(),
                        silence = ?self.silence(),
                        "the agent is silent: asking whether it is there"
                    );
                    asked = Some((Instant::now(), self.ask()));
                }
                _ => {}
            }
        }
    }

    /// Waits until some call waits; whether there was none before, `None` once the session is
    /// over.
    fn wait_for_calls(&self) -> Option<bool> {
        let mut pending = lock(&self.shared.pending);
        let mut waited = false;
        loop {
            if self.shared.closed.load(Ordering::SeqCst) {
                return None;
            }
            let standing_still = self.shared.standing_still.load(Ordering::SeqCst) > 0;
            if !pending.is_empty() && !standing_still {
                return Some(waited);
            }
            waited = true;
            pending = self.shared.called.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How long a call has waited without a word from the agent.
    fn silence(&self) -> Duration {
        let since = lock(&self.shared.pending).values().map(|pending| pending.since).min();
        let heard = *lock(&self.shared.heard);
        since.map_or(Duration::ZERO, |since| since.max(heard).elapsed())
    }

    fn waiting(&self) -> String {
        let pending = lock(&self.shared.pending);
        let mut calls: Vec<_> = pending.values().map(|call| (call.since, &*call.name)).collect();
        calls.sort();
        let mut words: Vec<String> = calls
            .iter()
            .take(3)
            .map(|(since, name)| format!("{name} for {:.0?}", since.elapsed()))
            .collect();
        if calls.len() > words.len() {
            words.push(format!("{} more", calls.len().saturating_sub(words.len())));
        }
        words.join(", ")
    }

    fn hung(&self) -> String {
        format!(
            "the appliance has hung: not a word for {:.0?}, nor an answer to the question whether \
             it is there (waiting: {})",
            self.silence(),
            self.waiting()
        )
    }

    /// Asks without waiting, since a port may take nothing more; whether the question went out.
    fn ask(&self) -> bool {
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let Ok(frame) = Frame::encode(number, &Call::Ping) else { return false };
        let mut bytes = Vec::new();
        let stream = match self.control.try_lock() {
            Ok(stream) => stream,
            Err(TryLockError::Poisoned(stream)) => stream.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        // So short a message is taken whole or not at all.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        frame.write_to(&mut bytes).is_ok() && rustix::net::send(&*stream, &bytes, flags).is_ok()
    }

    fn give_up(&self, cause: &Cause) {
        self.shared.end(cause);
        // Whoever is stuck in a write comes back.
        for stream in &self.streams {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
