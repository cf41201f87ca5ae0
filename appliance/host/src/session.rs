// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Carries calls to the agent, any number at once, and trusts nothing that comes back.

mod shared;
mod watch;

pub(crate) use shared::Cause;
pub use watch::Patience;
pub(crate) use watch::{Ground, Loss};

use crate::{Error, ErrorKind, Result};
use shared::{Event, Pending, Shared, StandingStill, follow, lock, lost};
use std::fmt::Debug;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tranship_protocol::{
    Body, CHUNK, Call, Cancelled, Credit, Failure, Frame, FrameKind, Hello, Progress, Reply,
    VERSION, WINDOW,
};
use watch::Watchdog;

/// How often a waiting call looks for cancellation.
const TICK: Duration = Duration::from_millis(100);

/// Time that a cancelled call gets to end in order.
const CANCEL_GRACE: Duration = Duration::from_secs(5);

/// Tells running calls to stop; clones share one state.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Stops everything that was started with this token, now and later.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Follows a call.
pub trait Observer {
    /// `done` of `total` units are done; `total` is 0 if not known.
    fn progress(&self, _done: u64, _total: u64) {}
}

/// The observer that looks away.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// The connection to a running agent.
#[derive(Debug)]
pub struct Session {
    control: Arc<Mutex<UnixStream>>,
    bulk: Mutex<UnixStream>,
    shared: Arc<Shared>,
    hello: Hello,
    cancel: CancelToken,
}

impl Session {
    /// Waits for the agent's first message on a connection that was just opened.
    ///
    /// `give_up` is asked now and then, and ends the wait with the error it returns.
    ///
    /// # Errors
    ///
    /// That error, or [`ErrorKind::Lost`] if the agent speaks nonsense.
    pub fn open(
        control: UnixStream,
        bulk: UnixStream,
        cancel: CancelToken,
        give_up: &dyn Fn() -> Option<Error>,
    ) -> Result<Self> {
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Io, "the connection to the appliance").because(error)
        };
        control.set_read_timeout(Some(TICK)).map_err(failed)?;
        let mut patient = Patient { stream: &control, give_up, gave_up: None };
        let first = Frame::read_from(&mut patient);
        if let Some(error) = patient.gave_up {
            return Err(error);
        }
        let frame = first
            .map_err(|error| lost("the appliance's first message").because(error))?
            .ok_or_else(|| lost("the appliance hung up before its first message"))?;
        if frame.kind != FrameKind::Hello {
            return Err(lost(format!("the appliance began with {:?}", frame.kind)));
        }
        let hello: Hello =
            frame.decode().map_err(|error| lost("the appliance's first message").because(error))?;
        if hello.version != VERSION {
            return Err(lost(format!(
                "the agent speaks version {} of the protocol, expected {VERSION}",
                hello.version
            )));
        }
        control.set_read_timeout(None).map_err(failed)?;
        Self::resume(control, bulk, cancel, hello)
    }

    /// Takes up the connection to an agent that has introduced itself with `hello` before its
    /// machine was saved.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if this side cannot follow the connection.
    pub fn resume(
        control: UnixStream,
        bulk: UnixStream,
        cancel: CancelToken,
        hello: Hello,
    ) -> Result<Self> {
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Io, "the connection to the appliance").because(error)
        };
        let shared = Arc::new(Shared::new());
        let readers = [
            ("control", control.try_clone().map_err(failed)?),
            ("bulk", bulk.try_clone().map_err(failed)?),
        ];
        for (name, stream) in readers {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("appliance {name}"))
                .spawn(move || follow(stream, &shared, name == "bulk"))
                .map_err(failed)?;
        }
        Ok(Self {
            control: Arc::new(Mutex::new(control)),
            bulk: Mutex::new(bulk),
            shared,
            hello,
            cancel,
        })
    }

    /// Has the session watched from now on: calls fail if the machine below ends or the agent
    /// says nothing for too long, and the error says what is known about it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if the thread that watches cannot be started.
    pub(crate) fn watch(&self, patience: Patience, ground: Arc<dyn Ground>) -> Result<()> {
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Io, "watching the appliance").because(error)
        };
        let streams = [
            lock(&self.control).try_clone().map_err(failed)?,
            lock(&self.bulk).try_clone().map_err(failed)?,
        ];
        let _ = self.shared.ground.set(Arc::clone(&ground));
        let watchdog = Watchdog {
            shared: Arc::clone(&self.shared),
            control: Arc::clone(&self.control),
            streams,
            patience,
            ground,
        };
        std::thread::Builder::new()
            .name("appliance watchdog".into())
            .spawn(move || watchdog.run())
            .map(drop)
            .map_err(failed)
    }

    /// Does something during which the machine stands still, and nothing can be heard of it.
    pub(crate) fn standing_still<T>(&self, work: impl FnOnce() -> T) -> T {
        let _still = StandingStill::begin(&self.shared);
        work()
    }

    /// How the agent introduced itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Makes a call that moves no file contents.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Call`] if the agent fails it, [`ErrorKind::Lost`] if it is gone.
    pub fn call(&self, call: &Call) -> Result<Reply> {
        self.exchange(call, None, &mut |_| Ok(()), &Silent)
    }

    /// As [`Self::call`], but not for longer than `limit`.
    ///
    /// # Errors
    ///
    /// As [`Self::call`]; [`ErrorKind::Lost`] after that time.
    pub fn call_within(&self, call: &Call, limit: Duration) -> Result<Reply> {
        let deadline = Instant::now().checked_add(limit);
        self.exchange_until(call, None, &mut |_| Ok(()), &Silent, deadline)
    }

    /// Makes a call whose file contents go to `take`, in order.
    ///
    /// # Errors
    ///
    /// As [`Self::call`], and whatever `take` returns.
    pub fn download(
        &self,
        call: &Call,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
        observer: &dyn Observer,
    ) -> Result<Reply> {
        self.exchange(call, None, take, observer)
    }

    /// Makes a call that is fed with all of `from`.
    ///
    /// # Errors
    ///
    /// As [`Self::call`], and [`ErrorKind::Io`] if `from` fails.
    pub fn upload(
        &self,
        call: &Call,
        from: &mut dyn Read,
        observer: &dyn Observer,
    ) -> Result<Reply> {
        self.exchange(call, Some(from), &mut |_| Ok(()), observer)
    }

    /// Makes a call that is fed with `from` while its output goes to `take`.
    ///
    /// # Errors
    ///
    /// As [`Self::download`] and [`Self::upload`].
    pub fn exchange(
        &self,
        call: &Call,
        from: Option<&mut dyn Read>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
        observer: &dyn Observer,
    ) -> Result<Reply> {
        self.exchange_until(call, from, take, observer, None)
    }

    fn exchange_until(
        &self,
        call: &Call,
        mut from: Option<&mut dyn Read>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
        observer: &dyn Observer,
        deadline: Option<Instant>,
    ) -> Result<Reply> {
        let name = call_name(call);
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = channel();
        let begun = Instant::now();
        let pending = Pending { events: sender, name: name.clone(), since: begun, window: WINDOW };
        lock(&self.shared.pending).insert(id, pending);
        self.shared.called.notify_all();
        let guard = Registered { session: self, id };
        if let Some(loss) = lock(&self.shared.over).clone() {
            return Err(loss.error(&name));
        }
        if matches!(call, Call::Shutdown) {
            self.shared.wanted.store(true, Ordering::SeqCst);
        }
        let outcome =
            Self::send(&self.control, id, call).map_err(CallError::unsent).and_then(|()| {
                self.follow_call((id, call, deadline), &events, &mut from, take, observer)
            });
        tracing::debug!(?call, elapsed = ?begun.elapsed(), ok = outcome.is_ok(), "call");
        drop(guard);
        outcome.map_err(|error| match error {
            CallError::Failure(failure) => Error::from_failure(&name, &failure),
            CallError::Lost(loss) => loss.error(&name),
            CallError::Unsent(error) => match self.shared.over_soon() {
                Some(loss) => loss.error(&name),
                None => error,
            },
            CallError::Other(error) => error,
        })
    }

    fn follow_call(
        &self,
        (id, call, deadline): (u64, &Call, Option<Instant>),
        events: &Receiver<Event>,
        from: &mut Option<&mut dyn Read>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
        observer: &dyn Observer,
    ) -> std::result::Result<Reply, CallError> {
        let mut credit = 0;
        let mut answer = None;
        let mut ended = !call.downloads();
        // An error on this side; the call is cancelled and its end awaited.
        let mut own_error: Option<Error> = None;
        let mut cancelled_at: Option<Instant> = None;
        while answer.is_none() || !ended {
            if cancelled_at.is_none() && (own_error.is_some() || self.cancel.is_cancelled()) {
                cancelled_at = Some(Instant::now());
                Self::send(&self.control, id, &Cancelled).map_err(CallError::unsent)?;
            }
            if cancelled_at.is_some_and(|at| at.elapsed() > CANCEL_GRACE) {
                break;
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                let name = call_name(call);
                return Err(lost(format!("{name}: the appliance did not answer in time")).into());
            }
            if credit > 0
                && answer.is_none()
                && own_error.is_none()
                && let Some(reader) = from
            {
                match self.upload_some(id, *reader, &mut credit) {
                    Ok(true) => {}
                    Ok(false) => *from = None,
                    Err(error) => own_error = Some(error),
                }
            }
            let next = match from {
                // More can be sent at once: only look whether something has come.
                Some(_) if credit > 0 && answer.is_none() && own_error.is_none() => {
                    events.try_recv().map_err(|_| RecvTimeoutError::Timeout)
                }
                _ => events.recv_timeout(TICK),
            };
            match next {
                Ok(Event::Data(bytes)) => {
                    if own_error.is_none() {
                        own_error = take(&bytes).err();
                    }
                    let size = u64::try_from(bytes.len()).unwrap_or(0);
                    if let Some(pending) = lock(&self.shared.pending).get_mut(&id) {
                        pending.window = pending.window.saturating_add(size);
                    }
                    Self::send(&self.control, id, &Credit(size)).map_err(CallError::unsent)?;
                }
                Ok(Event::End) => ended = true,
                Ok(Event::Credit(bytes)) => credit = bytes.saturating_add(credit),
                Ok(Event::Progress(Progress { done, total })) => observer.progress(done, total),
                Ok(Event::Reply(reply)) => answer = Some(Ok(reply)),
                Ok(Event::Failure(failure)) => answer = Some(Err(failure)),
                Ok(Event::Lost(loss)) => return Err(CallError::Lost(loss)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(lost("the appliance went away").into());
                }
            }
        }
        if let Some(error) = own_error {
            return Err(error.into());
        }
        match answer {
            Some(Ok(reply)) => Ok(reply),
            Some(Err(failure)) => Err(CallError::Failure(failure)),
            None => Err(Error::new(ErrorKind::Cancelled, "the call was cancelled").into()),
        }
    }

    /// Sends the next piece of an upload; `false` when that was the end.
    fn upload_some(&self, id: u64, from: &mut dyn Read, credit: &mut u64) -> Result<bool> {
        let most = usize::try_from(*credit).unwrap_or(usize::MAX).min(CHUNK);
        let mut buffer = vec![0; most];
        let count = loop {
            match from.read(&mut buffer) {
                Ok(count) => break count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(
                        Error::new(ErrorKind::Io, "reading what is uploaded").because(error)
                    );
                }
            }
        };
        buffer.truncate(count);
        *credit = credit.saturating_sub(u64::try_from(count).unwrap_or(0));
        let kind = if count == 0 { FrameKind::End } else { FrameKind::Data };
        Self::send_frame(&self.bulk, &Frame { kind, id, body: buffer })?;
        Ok(count > 0)
    }

    fn send<B: Body>(port: &Mutex<UnixStream>, id: u64, body: &B) -> Result<()> {
        let frame = Frame::encode(id, body).map_err(|error| {
            Error::new(ErrorKind::Usage, "the call is too large").because(error)
        })?;
        Self::send_frame(port, &frame)
    }

    fn send_frame(port: &Mutex<UnixStream>, frame: &Frame) -> Result<()> {
        let mut stream = lock(port);
        frame
            .write_to(&mut *stream)
            .and_then(|()| stream.flush().map_err(Into::into))
            .map_err(|error| lost("the appliance went away").because(error))
    }
}

/// Forgets a call when it is over, however it ends.
struct Registered<'a> {
    session: &'a Session,
    id: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        lock(&self.session.shared.pending).remove(&self.id);
    }
}

enum CallError {
    Failure(Failure),
    Lost(Loss),
    /// Something could not be sent: whoever reads knows why.
    Unsent(Error),
    Other(Error),
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl CallError {
    /// What could not be sent.
    fn unsent(error: Error) -> Self {
        if error.kind() == ErrorKind::Lost { Self::Unsent(error) } else { Self::Other(error) }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.wanted.store(true, Ordering::SeqCst);
        // The threads that read and watch end.
        for stream in [&*self.control, &self.bulk] {
            let _ = lock(stream).shutdown(std::net::Shutdown::Both);
        }
    }
}

/// The call's name as users know it: the variant's, in the shell's spelling.
fn call_name(call: &Call) -> String {
    let debug = format!("{call:?}");
    let variant = debug.split([' ', '{', '(']).next().unwrap_or_default();
    let mut name = String::new();
    for letter in variant.chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.extend(letter.to_lowercase());
    }
    name
}

/// Reads with a time-out and asks at each whether there is still hope.
struct Patient<'a> {
    stream: &'a UnixStream,
    give_up: &'a dyn Fn() -> Option<Error>,
    gave_up: Option<Error>,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.stream.read(buffer) {
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock
                            | std::io::ErrorKind::TimedOut
                            | std::io::ErrorKind::Interrupted
                    ) => {}
                Ok(0) => {
                    self.gave_up = (self.give_up)();
                    return Ok(0);
                }
                other => return other,
            }
            if let Some(error) = (self.give_up)() {
                self.gave_up = Some(error);
                return Ok(0);
            }
        }
    }
}

#[cfg(test)]
mod tests;
