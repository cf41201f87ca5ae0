// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The handshake of TLS, which rustls leads; afterwards each direction has keys of its own.

use super::halves::{TlsReading, TlsWriting};
use super::keys::{Keys, Renewal};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{CommonState, ExtractedSecrets};
use std::io::{self, Read, Write};
use std::sync::Arc;
use tranship_block::{Error, ErrorKind, Result};

/// Bytes in front of what is in a record.
const HEAD: usize = 5;
/// The longest record that is not encrypted, and the longest that is.
const LONGEST_RECORD: usize = (16 << 10) + 2048;
/// What the other side may send of the handshake before it has to make sense: a chain of
/// certificates is some KiB long.
const MOST_INCOMING: usize = 256 << 10;
/// Alerts that are sent after a failure.
const MOST_ALERTS: usize = 4;

/// Either side of a handshake.
pub(super) trait Side: Sized {
    type Data;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn common(&self) -> &CommonState;

    fn into_keys(
        self,
    ) -> std::result::Result<(ExtractedSecrets, KernelConnection<Self::Data>), rustls::Error>;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_keys(
        self,
    ) -> std::result::Result<(ExtractedSecrets, KernelConnection<Self::Data>), rustls::Error> {
        self.dangerous_into_kernel_connection()
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_keys(
        self,
    ) -> std::result::Result<(ExtractedSecrets, KernelConnection<Self::Data>), rustls::Error> {
        self.dangerous_into_kernel_connection()
    }
}

/// Brings a new connection to the point where it carries data, unless the other side is not
/// admitted by its certificates.
///
/// Records are read one at a time, so that none that carries data is read with them.
pub(super) fn shake_hands<S: Side, R: Read, W: Write>(
    mut side: S,
    mut reading: R,
    mut writing: W,
    admit: impl FnOnce(&[CertificateDer<'_>]) -> Result<()>,
) -> Result<(TlsReading<R>, TlsWriting<W>)>
where
    KernelConnection<S::Data>: Send + 'static,
{
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    loop {
        let UnbufferedStatus { discard, state, .. } = side.process(&mut incoming);
        let mut is_blocked = false;
        let done = match state {
            Ok(ConnectionState::EncodeTlsData(data)) => {
                encode(data, &mut outgoing)?;
                false
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                writing.write_all(&outgoing).map_err(broken)?;
                outgoing.clear();
                data.done();
                false
            }
            Ok(ConnectionState::BlockedHandshake) => {
                is_blocked = true;
                false
            }
            Ok(ConnectionState::WriteTraffic(_)) => true,
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                return Err(broken(io::ErrorKind::UnexpectedEof.into()));
            }
            Ok(_) => {
                return Err(Error::new(
                    ErrorKind::Denied,
                    "the TLS handshake failed: the other side sent data before its end",
                ));
            }
            Err(error) => {
                incoming.drain(..discard.min(incoming.len()));
                // The other side is told why, as far as it still listens.
                tell(&mut side, &mut incoming, &mut writing);
                return Err(refused(&error));
            }
        };
        incoming.drain(..discard.min(incoming.len()));
        if done {
            break;
        }
        if is_blocked {
            read_record(&mut reading, &mut incoming)?;
        }
    }
    writing.write_all(&outgoing).map_err(broken)?;
    writing.flush().map_err(broken)?;
    if !incoming.is_empty() {
        let text = "the TLS handshake failed: half a message came after its end";
        return Err(Error::new(ErrorKind::Denied, text));
    }
    admit(side.common().peer_certificates().unwrap_or_default())?;
    let (secrets, connection) = side.into_keys().map_err(|error| refused(&error))?;
    let suite = connection.negotiated_cipher_suite();
    let sending = Keys::new(suite, secrets.tx).map_err(|error| refused(&error))?;
    let receiving = Keys::new(suite, secrets.rx).map_err(|error| refused(&error))?;
    let renewal = Arc::new(Renewal::new(connection));
    Ok((
        TlsReading::new(reading, receiving, Arc::clone(&renewal)),
        TlsWriting::new(writing, sending, renewal),
    ))
}

/// Adds a record to what is to be sent.
fn encode<Data>(mut data: EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) -> Result<()> {
    let at = outgoing.len();
    let mut room = LONGEST_RECORD;
    for _ in 0..2 {
        outgoing.resize(at.saturating_add(room), 0);
        match data.encode(outgoing.get_mut(at..).unwrap_or_default()) {
            Ok(written) => {
                outgoing.truncate(at.saturating_add(written));
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(needed)) => room = needed.required_size,
            Err(EncodeError::AlreadyEncoded) => break,
        }
    }
    let text = "the TLS handshake failed: a message cannot be written";
    Err(Error::new(ErrorKind::Denied, text))
}

/// Sends what a side that has failed still has to say.
fn tell<S: Side>(side: &mut S, incoming: &mut [u8], writing: &mut impl Write) {
    for _ in 0..MOST_ALERTS {
        let mut outgoing = Vec::new();
        let UnbufferedStatus { state, .. } = side.process(incoming);
        let Ok(ConnectionState::EncodeTlsData(data)) = state else { return };
        if encode(data, &mut outgoing).is_err() || writing.write_all(&outgoing).is_err() {
            return;
        }
    }
}

/// Reads exactly one record.
fn read_record(reading: &mut impl Read, incoming: &mut Vec<u8>) -> Result<()> {
    let at = incoming.len();
    let mut head = [0; HEAD];
    reading.read_exact(&mut head).map_err(broken)?;
    let [kind, major, _, high, low] = head;
    // From change_cipher_spec to application_data, in any version of it.
    if !(20..=23).contains(&kind) || major != 3 {
        let text = "the TLS handshake failed: the other side does not speak TLS";
        return Err(Error::new(ErrorKind::Denied, text));
    }
    let len = usize::from(u16::from_be_bytes([high, low]));
    if len > LONGEST_RECORD || at > MOST_INCOMING {
        let text = format!("the TLS handshake failed: a record has {len} bytes after {at}");
        return Err(Error::new(ErrorKind::Denied, text));
    }
    incoming.extend(head);
    let start = incoming.len();
    incoming.resize(start.saturating_add(len), 0);
    reading.read_exact(incoming.get_mut(start..).unwrap_or_default()).map_err(broken)
}

fn broken(error: io::Error) -> Error {
    Error::new(ErrorKind::Busy, "the other side went away during the TLS handshake").because(error)
}

fn refused(error: &rustls::Error) -> Error {
    Error::new(ErrorKind::Denied, format!("the TLS handshake failed: {error}"))
}
