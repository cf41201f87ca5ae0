// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An encrypted connection as a half to read from and a half to write to.
//!
//! Two threads use them at the same time, each with keys of its own, and without a lock:
//! only when keys are renewed the halves have something to do with each other. Records are
//! encrypted and decrypted by rustls's ciphers, in the memory in which they travel.

use super::keys::{Keys, Renewal};
use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::{AlertDescription, ContentType, ProtocolVersion};
use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::ops::Range;
use std::sync::Arc;

/// Bytes that a socket is asked for at once: 16 of the longest records.
const GULP: usize = 264 << 10;
/// Bytes in front of what is in a record.
const HEAD: usize = 5;
/// Bytes of text in a record.
const LONGEST_TEXT: usize = 16 << 10;
/// Text, and what encryption adds to it at most.
const LONGEST_RECORD: usize = LONGEST_TEXT + 2048;
/// Bytes that are encrypted before they are sent: four of the longest records. The other
/// side decrypts them while the next are encrypted, and all of them stay in the cache.
const BATCH: usize = 64 << 10;
/// Pieces of memory that are encrypted together: a head and what follows it.
const PIECES: usize = 4;

/// Messages of the handshake that come after its end, by their numbers.
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
/// Renewed keys, and none wanted from the other side.
const KEYS_RENEWED: &[u8] = &[KEY_UPDATE, 0, 0, 1, 0];
/// Alerts: a warning, and what it is about.
const CLOSE_NOTIFY: &[u8] = &[1, 0];
const USER_CANCELED: u8 = 90;

fn invalid(text: impl fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {text}"))
}

/// What the other side says.
pub struct TlsReading<R> {
    source: R,
    decrypter: Box<dyn MessageDecrypter>,
    /// Number of the next record.
    next: u64,
    /// TLS 1.3, in which everything looks like data from outside.
    is_new: bool,
    renewal: Arc<Renewal>,
    gulp: Vec<u8>,
    /// Where in the gulp there is text that nobody has taken yet.
    text: Range<usize>,
    /// Where in the gulp there are encrypted bytes.
    raw: Range<usize>,
    /// The other side has said that nothing more comes.
    is_over: bool,
    /// What was wrong with a record behind text that was good.
    failure: Option<io::Error>,
}

/// What is said to the other side.
pub struct TlsWriting<W> {
    sink: W,
    encrypter: Box<dyn MessageEncrypter>,
    /// Number of the next record.
    next: u64,
    most_records: u64,
    is_new: bool,
    renewal: Arc<Renewal>,
    records: Vec<Vec<u8>>,
    /// Half a record may have been sent, so nothing can follow it.
    is_broken: bool,
}

impl<R> fmt::Debug for TlsReading<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsReading").field("renewal", &self.renewal).finish_non_exhaustive()
    }
}

impl<W> fmt::Debug for TlsWriting<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsWriting").field("renewal", &self.renewal).finish_non_exhaustive()
    }
}

impl<R> TlsReading<R> {
    pub(super) fn new(source: R, keys: Keys, renewal: Arc<Renewal>) -> Self {
        let (next, is_new) = (keys.next, keys.can_be_renewed());
        Self {
            source,
            decrypter: keys.decrypter(),
            next,
            is_new,
            renewal,
            gulp: vec![0; GULP],
            text: 0..0,
            raw: 0..0,
            is_over: false,
            failure: None,
        }
    }

    /// Where the encrypted bytes come from.
    pub(crate) fn source_mut(&mut self) -> &mut R {
        &mut self.source
    }

    /// Copies text that is there; how much it was.
    fn take(&mut self, buf: &mut [u8]) -> usize {
        let text = self.gulp.get(self.text.clone()).unwrap_or_default();
        let len = text.len().min(buf.len());
        let (front, _) = buf.split_at_mut(len);
        front.copy_from_slice(text.get(..len).unwrap_or_default());
        self.text.start = self.text.start.saturating_add(len);
        len
    }

    /// Bytes of the next record without its head, if all of them are there.
    fn whole_record(&self) -> io::Result<Option<usize>> {
        let raw = self.gulp.get(self.raw.clone()).unwrap_or_default();
        let Some((&[_, _, _, high, low], rest)) = raw.split_first_chunk::<HEAD>() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_be_bytes([high, low]));
        if len > LONGEST_RECORD {
            return Err(invalid(format!("a record has {len} bytes")));
        }
        Ok((rest.len() >= len).then_some(len))
    }

    /// Decrypts the next record, which has `len` bytes behind its head.
    fn open(&mut self, len: usize) -> io::Result<()> {
        let start = self.raw.start.saturating_add(HEAD);
        let end = start.saturating_add(len);
        let head = self.gulp.get(self.raw.start..start).unwrap_or_default();
        let &[kind, major, minor, ..] = head else { return Ok(()) };
        self.raw.start = end;
        let kind = ContentType::from(kind);
        if self.is_new && kind != ContentType::ApplicationData {
            return Err(invalid(format!("a record of {kind:?} is not encrypted")));
        }
        let version = ProtocolVersion::from(u16::from_be_bytes([major, minor]));
        let body = self.gulp.get_mut(start..end).unwrap_or_default();
        let place = body.as_ptr();
        let message = InboundOpaqueMessage::new(kind, version, body);
        let message = self.decrypter.decrypt(message, self.next).map_err(invalid)?;
        self.next = self.next.checked_add(1).ok_or_else(|| invalid("too many records"))?;
        let (kind, len) = (message.typ, message.payload.len());
        if len > LONGEST_TEXT {
            return Err(invalid(format!("a record has {len} bytes of text")));
        }
        match kind {
            ContentType::ApplicationData => {
                if len > 0 && !std::ptr::eq(place, message.payload.as_ptr()) {
                    return Err(invalid("the cipher does not decrypt in place"));
                }
                self.text = start..start.saturating_add(len);
                Ok(())
            }
            ContentType::Alert => {
                let alert = message.payload.to_vec();
                self.heed(&alert)
            }
            ContentType::Handshake if self.is_new => {
                let messages = message.payload.to_vec();
                self.obey(&messages)
            }
            other => Err(invalid(format!("a record of {other:?} came after the handshake"))),
        }
    }

    /// An alert has come.
    fn heed(&mut self, alert: &[u8]) -> io::Result<()> {
        match alert {
            CLOSE_NOTIFY | &[2, 0] => self.is_over = true,
            &[_, USER_CANCELED] => {}
            &[1, _] if !self.is_new => {}
            &[_, number] => {
                let alert = AlertDescription::from(number);
                return Err(invalid(format!("received fatal alert: {alert:?}")));
            }
            _ => return Err(invalid("an alert is broken")),
        }
        Ok(())
    }

    /// Messages of the handshake have come after its end.
    fn obey(&mut self, mut messages: &[u8]) -> io::Result<()> {
        while let Some((&[kind, high, middle, low], rest)) = messages.split_first_chunk::<4>() {
            let len = u32::from_be_bytes([0, high, middle, low]);
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let (body, rest) = rest
                .split_at_checked(len)
                .ok_or_else(|| invalid("a message is longer than its record"))?;
            messages = rest;
            match (kind, body) {
                // Nobody comes back to an NBD server often enough to save a handshake.
                (NEW_SESSION_TICKET, _) => {}
                (KEY_UPDATE, [wanted @ (0 | 1)]) if rest.is_empty() => {
                    let keys = self.renewal.receiving().map_err(invalid)?;
                    self.next = keys.next;
                    self.decrypter = keys.decrypter();
                    if *wanted == 1 {
                        self.renewal.want();
                    }
                }
                _ => return Err(invalid(format!("message {kind} came after the handshake"))),
            }
        }
        if messages.is_empty() { Ok(()) } else { Err(invalid("a message is cut off")) }
    }
}

impl<R: Read> TlsReading<R> {
    /// Gets more encrypted bytes; false if there are none any more.
    fn gulp(&mut self) -> io::Result<bool> {
        self.gulp.copy_within(self.raw.clone(), 0);
        self.raw = 0..self.raw.len();
        // A record fits, so there is always room.
        let room = self.gulp.get_mut(self.raw.end..).unwrap_or_default();
        let len = self.source.read(room)?;
        self.raw.end = self.raw.end.saturating_add(len);
        Ok(len > 0)
    }
}

impl<R: Read> Read for TlsReading<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut taken = 0_usize;
        while let Some(rest) = buf.get_mut(taken..).filter(|rest| !rest.is_empty()) {
            taken = taken.saturating_add(self.take(rest));
            if taken == buf.len() || self.is_over {
                break;
            }
            let opened = match self.failure.take() {
                Some(error) => Err(error),
                None => self.whole_record().and_then(|record| match record {
                    Some(len) => self.open(len).map(|()| true),
                    None => Ok(false),
                }),
            };
            match opened {
                Ok(true) => {}
                Ok(false) if taken > 0 => break,
                Ok(false) => {
                    if !self.gulp()? {
                        break;
                    }
                }
                Err(error) if taken > 0 => {
                    self.failure = Some(error);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }
}

impl<W> TlsWriting<W> {
    pub(super) fn new(sink: W, keys: Keys, renewal: Arc<Renewal>) -> Self {
        let (next, most_records) = (keys.next, keys.most_records());
        let is_new = keys.can_be_renewed();
        Self {
            sink,
            encrypter: keys.encrypter(),
            next,
            most_records,
            is_new,
            renewal,
            records: Vec::new(),
            is_broken: false,
        }
    }

    /// Where the encrypted bytes go.
    pub(crate) fn sink_mut(&mut self) -> &mut W {
        &mut self.sink
    }

    /// Adds a record to those that are to be sent.
    fn seal(&mut self, kind: ContentType, text: OutboundChunks<'_>) -> io::Result<()> {
        let version = ProtocolVersion::TLSv1_2;
        let message = OutboundPlainMessage { typ: kind, version, payload: text };
        let record = self.encrypter.encrypt(message, self.next).map_err(invalid)?;
        self.next = self.next.checked_add(1).ok_or_else(|| invalid("too many records"))?;
        self.records.push(record.encode());
        Ok(())
    }

    /// Renews the keys if they have been used enough, or the other side wants it.
    fn renew(&mut self) -> io::Result<()> {
        // A batch has room below the limit, which is far below what the cipher could take.
        let is_due = self.next >= self.most_records.saturating_sub(16);
        if is_due && !self.is_new {
            return Err(invalid("too many records for keys that cannot be renewed"));
        }
        if is_due || self.renewal.is_wanted() {
            self.seal(ContentType::Handshake, OutboundChunks::Single(KEYS_RENEWED))?;
            let keys = self.renewal.sending().map_err(invalid)?;
            self.next = keys.next;
            self.encrypter = keys.encrypter();
        }
        Ok(())
    }
}

impl<W: Write> TlsWriting<W> {
    /// Says that nothing more comes.
    ///
    /// # Errors
    ///
    /// The connection is broken.
    pub fn finish(&mut self) -> io::Result<()> {
        self.seal(ContentType::Alert, OutboundChunks::Single(CLOSE_NOTIFY))?;
        self.send()
    }

    /// Sends everything that is encrypted already.
    fn send(&mut self) -> io::Result<()> {
        if self.is_broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut bufs: Vec<IoSlice<'_>> =
            self.records.iter().map(|record| IoSlice::new(record)).collect();
        let mut left = bufs.as_mut_slice();
        let mut sent = Ok(());
        while !left.is_empty() {
            match self.sink.write_vectored(left) {
                Ok(0) => sent = Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => IoSlice::advance_slices(&mut left, len),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => sent = Err(error),
            }
            if sent.is_err() {
                break;
            }
        }
        self.is_broken = sent.is_err();
        self.records.clear();
        sent
    }
}

impl<W: Write> Write for TlsWriting<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    /// A batch is encrypted and sent before the next, so that both ends work at once.
    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut taken = 0_usize;
        let mut parts: [&[u8]; PIECES] = [&[]; PIECES];
        for (part, buf) in parts.iter_mut().zip(bufs) {
            *part = buf.get(..BATCH.saturating_sub(taken)).unwrap_or(buf);
            taken = taken.saturating_add(part.len());
        }
        if taken == 0 {
            return Ok(0);
        }
        self.renew()?;
        // A short head shares a record with what follows it.
        let mut text = OutboundChunks::new(&parts);
        while !text.is_empty() {
            let (now, rest) = text.split_at(LONGEST_TEXT);
            self.seal(ContentType::ApplicationData, now)?;
            text = rest;
        }
        self.send()?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}
