// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tells whether this host's KVM can run a stock kernel.
//!
//! That `/dev/kvm` opens says little: on some hosts ring 0 is imitated in software, a
//! kernel dies in its first instructions, or runs thousands of times too slowly. So a
//! guest of a few hundred bytes does once what kernels do early, in milliseconds. Two
//! things decide: whether every step works, and how fast a loop runs at ring 0.
#[cfg(not(target_arch = "x86_64"))]
compile_error!("the micro-guest is x86-64 code");

mod failure;
mod guest;
pub mod kick;
mod machine;

pub use failure::Cause;
pub use machine::flat_segment;

use failure::Failure;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A limit that holds on a very busy host; a good or a bad KVM shows in far less.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(3);

/// How long a thread that has to stop is kicked before it is left alone.
const PATIENCE: Duration = Duration::from_millis(100);

/// What the probe found.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Whether guests should run under KVM here.
    pub usable: bool,
    /// Why not; `None` if usable.
    pub cause: Option<Cause>,
    /// What was found, in one sentence.
    pub reason: String,
    /// What the owner of the host can do about it; empty if usable.
    pub remedy: String,
    /// Each step that was done and the time it took; the last one may come repeatedly.
    pub steps: Vec<(&'static str, Duration)>,
    /// How long the whole probe took.
    pub elapsed: Duration,
}

/// Runs the micro-guest on `/dev/kvm`, for at most `limit` and a tenth of a second.
///
/// It never fails and never hangs: whatever goes wrong is the verdict. One signal handler
/// for an unused real-time signal is installed in the process and stays.
pub fn probe(limit: Duration) -> Verdict {
    probe_device(Path::new("/dev/kvm"), limit)
}

enum Event {
    Step(&'static str, Duration),
    /// Nanoseconds of one turn of the ring-0 loop, or what went wrong.
    End(Result<f64, Failure>),
}

fn probe_device(device: &Path, limit: Duration) -> Verdict {
    let started = Instant::now();
    let mut steps = Vec::new();
    let outcome = supervise(device, limit, started, &mut steps);
    let elapsed = started.elapsed();
    match outcome {
        Ok(per_turn) => Verdict {
            usable: true,
            cause: None,
            reason: format!("KVM works, and a ring-0 loop takes {per_turn:.1} ns a turn"),
            remedy: String::new(),
            steps,
            elapsed,
        },
        Err(failure) => Verdict {
            usable: false,
            cause: Some(failure.cause()),
            reason: failure.to_string(),
            remedy: failure.remedy(),
            steps,
            elapsed,
        },
    }
}

/// Runs the machine on a thread of its own and collects its steps until the limit.
fn supervise(
    device: &Path,
    limit: Duration,
    started: Instant,
    steps: &mut Vec<(&'static str, Duration)>,
) -> Result<f64, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let (events, received) = channel();
    let thread = {
        let (device, stop) = (device.to_owned(), stop.clone());
        std::thread::Builder::new()
            .name("kvm probe".to_owned())
            .spawn(move || machine_thread(&device, &stop, &events))
            .map_err(|error| Failure::Setup { what: "starting a thread", error })?
    };
    loop {
        match received.recv_timeout(limit.saturating_sub(started.elapsed())) {
            Ok(Event::Step(name, took)) => steps.push((name, took)),
            Ok(Event::End(outcome)) => {
                // It has only its virtual machine left to close.
                end(thread, &stop);
                return outcome;
            }
            Err(RecvTimeoutError::Timeout) => {
                end(thread, &stop);
                let after = steps.last().map_or("start", |(name, _)| name);
                return Err(Failure::TimedOut { after, limit });
            }
            Err(RecvTimeoutError::Disconnected) => {
                let error = std::io::Error::other("its thread panicked");
                return Err(Failure::Setup { what: "the probe", error });
            }
        }
    }
}

fn machine_thread(device: &Path, stop: &AtomicBool, events: &Sender<Event>) {
    kick::accept_kicks();
    // The receiver is gone only after a time-out, and then nobody wants to know.
    let mut report = |name, took| drop(events.send(Event::Step(name, took)));
    let outcome = machine::run(device, stop, &mut report);
    drop(events.send(Event::End(outcome)));
}

/// Ends the thread. One that hangs in the kernel is left behind; it owns all it uses.
fn end(thread: JoinHandle<()>, stop: &AtomicBool) {
    stop.store(true, Ordering::Relaxed);
    let started = Instant::now();
    while !thread.is_finished() && started.elapsed() < PATIENCE {
        kick::kick(&thread);
        std::thread::sleep(Duration::from_micros(200));
    }
    if thread.is_finished() {
        drop(thread.join());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let verdict = probe_device(Path::new("/nonexistent/kvm"), DEFAULT_LIMIT);
        assert_eq!((verdict.usable, verdict.cause), (false, Some(Cause::NoDevice)));
        assert_eq!(verdict.reason, "there is no /dev/kvm");
        assert!(!verdict.remedy.is_empty() && verdict.steps.is_empty());
    }

    #[test]
    fn something_else_than_kvm_has_the_wrong_version() {
        let verdict = probe_device(Path::new("/dev/null"), DEFAULT_LIMIT);
        assert_eq!(verdict.cause, Some(Cause::WrongVersion));
        assert_eq!(verdict.reason, "/dev/kvm has interface version -1, expected 12");
    }

    #[test]
    fn the_probe_ends_in_time_and_gives_its_reasons() {
        let verdict = probe(DEFAULT_LIMIT);
        assert!(verdict.elapsed < DEFAULT_LIMIT + PATIENCE + Duration::from_secs(1), "{verdict:?}");
        assert_eq!(verdict.usable, verdict.cause.is_none());
        assert_eq!(verdict.usable, verdict.remedy.is_empty());
        assert!(!verdict.reason.is_empty());
    }

    #[test]
    fn no_time_at_all_is_a_time_out() {
        let verdict = probe(Duration::ZERO);
        assert_eq!(verdict.cause, Some(Cause::TimedOut), "{verdict:?}");
        assert!(verdict.elapsed < Duration::from_secs(2));
    }
}
