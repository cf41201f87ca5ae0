// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What waiting calls, the threads that read and the one that watches have in common.

use super::TICK;
use super::watch::{Ground, Loss};
use crate::{Error, ErrorKind};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tranship_protocol::{Credit, Failure, Frame, FrameError, FrameKind, Progress, Reply};

/// Time for one stream to be read to its end after the other one has ended.
const DRAIN: Duration = Duration::from_secs(2);

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn lost(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Lost, message)
}

/// What the reading threads tell a waiting call.
#[derive(Debug)]
pub(super) enum Event {
    Data(Vec<u8>),
    End,
    Credit(u64),
    Progress(Progress),
    Reply(Reply),
    Failure(Failure),
    Lost(Loss),
}

/// What put an end to a session that nobody wanted to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The machine came to its end; in words.
    Ended(String),
    /// The agent does not answer; in words.
    Hung(String),
    /// The connection broke; in words.
    Closed(String),
    /// What the agent said cannot be trusted to mean anything; in words.
    Nonsense(String),
}

impl Cause {
    /// In words.
    pub(crate) fn words(&self) -> &str {
        match self {
            Self::Ended(words)
            | Self::Hung(words)
            | Self::Closed(words)
            | Self::Nonsense(words) => words,
        }
    }
}

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) events: Sender<Event>,
    /// The call's name, and when it was made.
    pub(super) name: String,
    pub(super) since: Instant,
    /// Bytes that the agent may still send without further credit.
    pub(super) window: u64,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) pending: Mutex<HashMap<u64, Pending>>,
    /// A call was made, or the session is over.
    pub(super) called: Condvar,
    /// Set once nothing can be answered any more, with the reason. Held while the reason is
    /// looked for.
    pub(super) over: Mutex<Option<Loss>>,
    /// As `over`, to be looked at in passing.
    pub(super) closed: AtomicBool,
    /// The end is wanted, and needs no explanation.
    pub(super) wanted: AtomicBool,
    pub(super) ground: OnceLock<Arc<dyn Ground>>,
    /// When the agent said something last.
    pub(super) heard: Mutex<Instant>,
    /// How many have the machine stand still.
    pub(super) standing_still: AtomicUsize,
    pub(super) next: AtomicU64,
    /// Number of the two streams that have ended, and a signal that it has grown.
    pub(super) ended: (Mutex<usize>, Condvar),
}

impl Shared {
    pub(super) fn new() -> Self {
        Self {
            pending: Mutex::default(),
            called: Condvar::new(),
            over: Mutex::default(),
            closed: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            ground: OnceLock::new(),
            heard: Mutex::new(Instant::now()),
            standing_still: AtomicUsize::new(0),
            next: AtomicU64::new(1),
            ended: Default::default(),
        }
    }

    pub(super) fn heard_something(&self) {
        *lock(&self.heard) = Instant::now();
    }

    /// One stream has ended in order. The other one may still hold the answer to the last
    /// call, so it gets the time to be read to its end.
    fn stream_ended(&self) {
        let (ended, grown) = &self.ended;
        let mut count = lock(ended);
        *count += 1;
        grown.notify_all();
        let limit = Instant::now() + DRAIN;
        while *count < 2
            && let Some(left) = limit.checked_duration_since(Instant::now())
        {
            count = grown.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Fails every call, those to come included. The first cause counts.
    pub(super) fn end(&self, cause: &Cause) {
        let mut over = lock(&self.over);
        if over.is_none() {
            let wanted = self.wanted.load(Ordering::SeqCst);
            tracing::debug!(?cause, wanted, "the session is over");
            let loss = match self.ground.get() {
                Some(ground) if !wanted => ground.explain(cause),
                _ => Loss::new(cause.words()),
            };
            *over = Some(loss);
        }
        let loss = over.clone().unwrap_or_default();
        drop(over);
        let mut pending = lock(&self.pending);
        self.closed.store(true, Ordering::SeqCst);
        for (_, pending) in pending.drain() {
            let _ = pending.events.send(Event::Lost(loss.clone()));
        }
        self.called.notify_all();
    }

    /// Why nothing can be answered any more, for a write that failed: whoever reads knows more
    /// in a moment.
    pub(super) fn over_soon(&self) -> Option<Loss> {
        let limit = Instant::now() + DRAIN;
        loop {
            if let Some(loss) = lock(&self.over).clone() {
                return Some(loss);
            }
            if Instant::now() > limit {
                return None;
            }
            std::thread::sleep(TICK / 10);
        }
    }
}

/// Nothing is expected of the agent as long as this lives.
pub(super) struct StandingStill<'a>(&'a Shared);

impl<'a> StandingStill<'a> {
    pub(super) fn begin(shared: &'a Shared) -> Self {
        shared.standing_still.fetch_add(1, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for StandingStill<'_> {
    fn drop(&mut self) {
        self.0.heard_something();
        let _calls = lock(&self.0.pending);
        self.0.standing_still.fetch_sub(1, Ordering::SeqCst);
        self.0.called.notify_all();
    }
}

/// Reads one stream of the agent and hands its frames to the calls that wait for them.
pub(super) fn follow(mut stream: UnixStream, shared: &Shared, bulk: bool) {
    let cause = loop {
        match Frame::read_from(&mut stream) {
            Ok(Some(frame)) => {
                shared.heard_something();
                if let Err(reason) = dispatch(frame, shared, bulk) {
                    // What follows cannot be trusted to mean anything.
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    break Cause::Nonsense(reason);
                }
            }
            Ok(None) => {
                shared.stream_ended();
                break Cause::Closed("the appliance closed the connection unexpectedly".into());
            }
            Err(error) => {
                let words = format!("the connection to the appliance: {error}");
                // A peer that closes with something unread resets instead of ending.
                if matches!(error, FrameError::Io(_)) {
                    shared.stream_ended();
                    break Cause::Closed(words);
                }
                break Cause::Nonsense(words);
            }
        }
    };
    shared.end(&cause);
}

fn dispatch(frame: Frame, shared: &Shared, bulk: bool) -> std::result::Result<(), String> {
    let bad = |error| format!("the appliance sent a malformed message: {error}");
    let event = match (frame.kind, bulk) {
        (FrameKind::Data, true) => Event::Data(frame.body),
        (FrameKind::End, true) => Event::End,
        (FrameKind::Credit, false) => Event::Credit(frame.decode::<Credit>().map_err(bad)?.0),
        (FrameKind::Progress, false) => Event::Progress(frame.decode().map_err(bad)?),
        (FrameKind::Reply, false) => Event::Reply(frame.decode().map_err(bad)?),
        (FrameKind::Failure, false) => Event::Failure(frame.decode().map_err(bad)?),
        (FrameKind::Log, false) => {
            tracing::debug!(line = %String::from_utf8_lossy(&frame.body), "agent");
            return Ok(());
        }
        (kind, _) => return Err(format!("the appliance sent an unexpected {kind:?}")),
    };
    let mut pending = lock(&shared.pending);
    // A call that was given up may still be answered.
    let Some(call) = pending.get_mut(&frame.id) else { return Ok(()) };
    if let Event::Data(bytes) = &event {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        call.window = call
            .window
            .checked_sub(size)
            .ok_or("the appliance sent more than it was allowed to")?;
    }
    let _ = call.events.send(event);
    Ok(())
}
