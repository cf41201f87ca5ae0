// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections that go on in another process.
//!
//! A server may take one client only, or end when its last one leaves. So who hands a disk over to
//! another process does not have that connect again, but gives it the connections that there are.

use super::connection::Connection;
use super::facts::Facts;
use super::handshake::Agreed;
use super::line::Line;
use super::stream::{Address, Duplex, Reading, Socket};
use super::{ClientOptions, Remote};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use tranship_block::{Error, Result};

/// What was agreed upon over a connection that goes on in another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved(pub(super) Agreed);

impl Remote {
    /// Gives the connections away, each with what was agreed upon: none that is encrypted, broken
    /// or in use. Nothing can be asked of this one any more, and it leaves without a word.
    pub fn hand_over(&self) -> Vec<(Moved, OwnedFd)> {
        let connections =
            self.lines.iter().filter_map(|line| line.close("another process has the connection"));
        connections.filter_map(|connection| connection.hand_over()).collect()
    }

    /// Goes on with connections to the server at `address` that another process has given away.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] if there is none, and the operating system's.
    pub fn take_over(
        connections: Vec<(Moved, OwnedFd)>,
        address: &Address,
        options: &ClientOptions,
    ) -> Result<Self> {
        let facts = connections.first().map(|(moved, _)| moved.0.facts.clone());
        let facts = facts.ok_or_else(|| Error::usage("there is no connection to go on with"))?;
        let line = |(moved, socket)| {
            let connection = Connection::take_over(moved, socket, options)?;
            Ok(Line::new(connection, Some(address.clone()), options))
        };
        let lines = connections.into_iter().map(line).collect::<Result<_>>()?;
        tracing::debug!(size = facts.size, "going on with a connection to NBD");
        Ok(Self::new(facts, lines, options))
    }
}

impl Connection {
    /// Goes on with a connection that another process has given away.
    pub(super) fn take_over(
        Moved(agreed): Moved,
        socket: OwnedFd,
        options: &ClientOptions,
    ) -> Result<Self> {
        let socket = Socket::over(socket, options.timeout)?;
        let stream = Duplex::plain(&socket)?;
        Ok(Self::agreed(socket, agreed, stream, options))
    }

    /// The connection for another process, unless it is encrypted, broken or in use.
    pub(super) fn hand_over(&self) -> Option<(Moved, OwnedFd)> {
        {
            let slots = self.slots();
            let input = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
            let is_plain = matches!(input.stream, Reading::Plain(_));
            let is_idle = slots.waiting.is_empty() && slots.broken.is_none();
            if !is_plain || !is_idle || input.next.is_some() || !input.stream.buffered().is_empty()
            {
                return None;
            }
        }
        let socket = self.control.try_clone().ok()?.into_descriptor();
        self.moved.store(true, Ordering::Release);
        // Texts for people stay here.
        let facts = Facts { description: None, name: None, ..self.agreed.facts.clone() };
        Some((Moved(Agreed { facts, ..self.agreed.clone() }), socket))
    }
}
