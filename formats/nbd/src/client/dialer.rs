// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections for a process that may not connect: another one makes them for it.
//!
//! Between the two is a pair of `SOCK_SEQPACKET` sockets. A question is a number; the answer
//! repeats it and comes with the socket (`SCM_RIGHTS`) of a connection on which all is agreed upon,
//! or with an error. Whom to connect to is no part of a question, nor is the export: who asks may
//! have been taken over and gets at no other one. What else comes with a question is dropped.

use super::ClientOptions;
use super::connection::Connection;
use super::moving::Moved;
use super::stream::Address;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tranship_block::{Error, ErrorKind, Rate, Result, Throttle};

/// Bytes of a question, which begin its answer.
const NUMBER: usize = 8;
/// Bytes of an answer.
const MOST: usize = 16 << 10;
/// Bytes of an error's text; in JSON each can become six.
const MOST_TEXT: usize = 1024;
/// Connections per second: more than a client needs whose server comes and goes, and too few to
/// keep a server or this process busy.
const RATE: u64 = 100;

/// Gets connections to one server from another process.
#[derive(Debug)]
pub struct Dialer(Mutex<Line>);

#[derive(Debug)]
struct Line {
    socket: OwnedFd,
    questions: u64,
}

/// What comes of a question.
#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Connected(Moved),
    /// There is nobody, or the connection broke: it may be better the next time.
    Busy(String),
    Refused(String),
}

impl Dialer {
    /// Connects to the export of the server at `address` that `options` name, for whoever has the
    /// descriptor that is returned and as long as anybody has it, from a thread of its own.
    ///
    /// # Errors
    ///
    /// The operating system's.
    pub fn start(address: Address, options: ClientOptions) -> Result<OwnedFd> {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (here, there) = rustix::net::socketpair(family, kind, SocketFlags::CLOEXEC, None)
            .map_err(|errno| Error::io("cannot make a line for connections", errno.into()))?;
        std::thread::Builder::new()
            .name("nbd dialer".to_owned())
            .spawn(move || {
                if let Err(errno) = connect_for(&here, &address, &options) {
                    tracing::debug!(%address, %errno, "nobody asks for connections any more");
                }
            })
            .map_err(|error| Error::io("cannot start a thread for connections", error))?;
        Ok(there)
    }

    /// Asks at the end that [`Self::start`] has returned.
    pub fn over(socket: OwnedFd) -> Self {
        Self(Mutex::new(Line { socket, questions: 0 }))
    }

    /// A connection, which is waited for as long as making one may take.
    pub(super) fn connect(&self, timeout: Duration) -> Result<(Moved, OwnedFd)> {
        let busy = |why: &str| {
            let text = format!("cannot connect to the NBD server: {why}");
            Error::new(ErrorKind::Busy, text)
        };
        let failed = |errno: Errno| busy("the process that would do it").because(errno);
        let mut line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        line.questions = line.questions.wrapping_add(1);
        let question = line.questions.to_ne_bytes();
        // A name may stand for several addresses and has to be looked up, and servers are slow.
        let patience = timeout.saturating_mul(2).max(Duration::from_millis(1));
        set_socket_timeout(&line.socket, Timeout::Recv, Some(patience)).map_err(failed)?;
        retry_on_intr(|| rustix::net::send(&line.socket, &question, SendFlags::NOSIGNAL))
            .map_err(failed)?;
        loop {
            let mut bytes = vec![0; MOST];
            let (count, socket) = receive(&line.socket, &mut bytes).map_err(failed)?;
            let answer = bytes.get(..count).unwrap_or_default();
            let (number, text) = answer.split_at(NUMBER.min(answer.len()));
            if count == 0 {
                return Err(busy("the process that would do it is gone"));
            }
            if number != question {
                // The answer to a question that was given up.
                continue;
            }
            return match (serde_json::from_slice(text), socket) {
                (Ok(Outcome::Connected(agreed)), Some(socket)) => Ok((agreed, socket)),
                (Ok(Outcome::Busy(why)), _) => Err(Error::new(ErrorKind::Busy, why)),
                (Ok(Outcome::Refused(why)), _) => Err(Error::new(ErrorKind::Denied, why)),
                _ => Err(busy("the answer of the process that would do it makes no sense")),
            };
        }
    }
}

fn receive(line: &OwnedFd, bytes: &mut [u8]) -> rustix::io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(bytes)];
        rustix::net::recvmsg(line, &mut parts, &mut rights, RecvFlags::CMSG_CLOEXEC)
    })?;
    let sockets = rights.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    Ok((received.bytes, sockets.flatten().next()))
}

fn with_cause(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// A connection that goes to another process, or why there is none.
fn connected(address: &Address, options: &ClientOptions) -> (Outcome, Option<OwnedFd>) {
    let nobody = || Error::new(ErrorKind::Busy, "the server said more than it was asked for");
    let opened = Connection::open(address, options)
        .and_then(|connection| connection.hand_over().ok_or_else(nobody));
    match opened {
        Ok((agreed, socket)) => (Outcome::Connected(agreed), Some(socket)),
        Err(error) => {
            let text: String = with_cause(&error).chars().take(MOST_TEXT / 4).collect();
            let busy = error.kind() == ErrorKind::Busy;
            (if busy { Outcome::Busy(text) } else { Outcome::Refused(text) }, None)
        }
    }
}

/// Answers questions until nobody can ask any.
fn connect_for(
    line: &OwnedFd,
    address: &Address,
    options: &ClientOptions,
) -> rustix::io::Result<()> {
    let throttle = Throttle::new(Rate { bytes: None, operations: NonZeroU64::new(RATE) });
    loop {
        let mut question = [0; NUMBER];
        // A receive that does not ask for descriptors gets none.
        let (count, _) =
            retry_on_intr(|| rustix::net::recv(line, &mut question[..], RecvFlags::empty()))?;
        if count == 0 {
            return Ok(());
        }
        throttle.wait(0);
        let (outcome, socket) = connected(address, options);
        tracing::debug!(%address, connected = socket.is_some(), "for another process");
        let text = serde_json::to_vec(&outcome).map_err(|_| Errno::INVAL)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        let sockets: Vec<_> = socket.iter().map(AsFd::as_fd).collect();
        if !sockets.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(&sockets)) {
            return Err(Errno::NOBUFS);
        }
        retry_on_intr(|| {
            let parts = [IoSlice::new(&question), IoSlice::new(&text)];
            rustix::net::sendmsg(line, &parts, &mut rights, SendFlags::NOSIGNAL)
        })?;
    }
}
