// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One connection with many requests in flight.

use super::ClientOptions;
use super::handshake::{Agreed, Greeted};
use super::receive::Input;
use super::reply::{Partial, Runs, Style, Want};
use super::slots::{Broken, Owner, Slot, Slots};
use super::stream::{Address, Duplex, Socket, Writing};
use crate::wire::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, command, command_flag};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use tranship_block::{Error, ErrorKind, Result, Span};

#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Why a request has no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server said so, or broke the protocol: once more would be no better.
    Final(Error),
    /// The connection is gone; nobody knows whether the request was carried out.
    Lost(Error),
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) agreed: Agreed,
    /// The process that listened, if it is on this machine.
    pub(super) peer: Option<u32>,
    pub(super) style: Style,
    timeout: Duration,
    /// To end it from either side.
    pub(super) control: Socket,
    sending: Mutex<Writing>,
    /// Locked by whose turn it is to read.
    pub(super) reading: Mutex<Input>,
    slots: Mutex<Slots>,
    cookie: AtomicU64,
    /// Another process uses it now.
    pub(super) moved: AtomicBool,
}

impl Connection {
    pub(super) fn open(address: &Address, options: &ClientOptions) -> Result<Self> {
        if let Some(dialer) = &options.dialer {
            let (moved, socket) = dialer.connect(options.timeout)?;
            return Self::take_over(moved, socket, options);
        }
        Self::over(Socket::connect(address, options.timeout)?, address.host(), options)
    }

    /// Says hello over a socket that is connected to `host`.
    pub(super) fn over(socket: Socket, host: &str, options: &ClientOptions) -> Result<Self> {
        let (agreed, stream) = Greeted::over(&socket, host, options)?.go(options)?;
        Ok(Self::agreed(socket, agreed, stream, options))
    }

    /// A connection on which all is agreed upon.
    pub(super) fn agreed(
        socket: Socket,
        agreed: Agreed,
        stream: Duplex,
        options: &ClientOptions,
    ) -> Self {
        let style = match (agreed.facts.extended, agreed.facts.structured) {
            (true, _) => Style::Extended,
            (false, true) => Style::Structured,
            (false, false) => Style::Simple,
        };
        Self {
            agreed,
            peer: socket.peer(),
            style,
            timeout: options.timeout,
            control: socket,
            sending: Mutex::new(stream.writing),
            reading: Mutex::new(Input { stream: stream.reading, next: None }),
            slots: Mutex::default(),
            cookie: AtomicU64::new(1),
            moved: AtomicBool::new(false),
        }
    }

    pub(super) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request with its payload and waits for the reply, whose bytes go to `buf`.
    pub(super) fn call(
        &self,
        request: Request,
        payload: &[u8],
        want: Want,
        buf: &mut [u8],
    ) -> std::result::Result<Runs, Failure> {
        let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
        let slot = Slot::new(Partial::new(want), Owner::Thread(thread::current()));
        {
            let mut slots = self.slots();
            if let Some(broken) = &slots.broken {
                return Err(broken.failure());
            }
            slots.waiting.insert(cookie, slot);
        }
        let mut head = Vec::with_capacity(32);
        let sent =
            self.head(&mut head, request, cookie).and_then(|()| self.transmit(&head, payload));
        if let Err(error) = sent {
            self.break_off(&error);
        }
        self.wait(cookie, buf)
    }

    /// Asks for the bytes of `spans`, whose replies are those of a queue
    /// ([`Self::wait_any`]). If that fails, the replies tell it.
    pub(super) fn enqueue(&self, queue: u64, spans: &[Span]) {
        let mut heads = Vec::with_capacity(spans.len().saturating_mul(32));
        let mut failed = None;
        {
            let mut slots = self.slots();
            for span in spans {
                let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
                let len = usize::try_from(span.len).unwrap_or(usize::MAX);
                let want = Want::Bytes { offset: span.start, len };
                slots.waiting.insert(cookie, Slot::new(Partial::new(want), Owner::Queue(queue)));
                let request =
                    Request { command: command::READ, flags: 0, offset: span.start, len: span.len };
                failed = failed.or(self.head(&mut heads, request, cookie).err());
            }
            if slots.broken.is_some() {
                return;
            }
        }
        let sent = failed.map_or(Ok(()), Err).and_then(|()| self.transmit(&heads, &[]));
        if let Err(error) = sent {
            self.break_off(&error);
        }
    }

    fn head(&self, head: &mut Vec<u8>, request: Request, cookie: u64) -> io::Result<()> {
        let is_extended = self.style == Style::Extended;
        let mut flags = request.flags;
        if is_extended && request.command == command::WRITE {
            flags |= command_flag::PAYLOAD_LEN;
        }
        let magic = if is_extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        head.extend(magic.to_be_bytes());
        head.extend(flags.to_be_bytes());
        head.extend(request.command.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(request.offset.to_be_bytes());
        if is_extended {
            head.extend(request.len.to_be_bytes());
        } else {
            let len = u32::try_from(request.len).map_err(|_| io::ErrorKind::InvalidInput)?;
            head.extend(len.to_be_bytes());
        }
        Ok(())
    }

    fn transmit(&self, head: &[u8], payload: &[u8]) -> io::Result<()> {
        let mut stream = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        crate::reply::send(&mut *stream, head, payload)
    }

    fn break_off(&self, error: &io::Error) {
        let error = self.explained(error, "take the request");
        let mut slots = self.slots();
        slots.broken.get_or_insert_with(|| Broken::from(&error));
        slots.wake_all();
        drop(slots);
        self.control.close();
    }

    pub(super) fn explained(&self, error: &io::Error, what: &str) -> Error {
        let text = match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => "it closed the connection".to_owned(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                format!("it did not {what} within {} s", self.timeout.as_secs_f64())
            }
            _ => format!("it cannot {what}: {error}"),
        };
        Error::new(ErrorKind::Busy, text)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if *self.moved.get_mut() {
            return;
        }
        // Nothing is in flight: whoever waits for a reply borrows the connection.
        let request = Request { command: command::DISC, flags: 0, offset: 0, len: 0 };
        let mut head = Vec::with_capacity(32);
        let is_whole = self.slots().broken.is_none() && self.head(&mut head, request, 0).is_ok();
        if is_whole && self.transmit(&head, &[]).is_ok() {
            self.sending.get_mut().unwrap_or_else(PoisonError::into_inner).finish();
        }
        self.control.close();
    }
}
