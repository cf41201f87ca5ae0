// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests as they come from a socket: many headers at once, payloads without a detour.

use std::io::{self, IoSliceMut, Read};

/// How many bytes are read at once.
pub(crate) const GULP: usize = 64 << 10;
/// How many bytes are read together with the end of a payload: enough for the next header,
/// and little enough that it does not matter that they are copied once more.
const AHEAD: usize = 512;

/// A stream and what was read of it too early.
#[derive(Debug)]
pub(crate) struct Input<R> {
    source: R,
    buffer: Vec<u8>,
    from: usize,
    to: usize,
    /// The last thing read was a payload: the next request is likely to bring one, too, and
    /// what is read of it together with its header is copied twice.
    after_payload: bool,
}

impl<R: Read> Input<R> {
    pub(crate) fn new(source: R) -> Self {
        Self { source, buffer: vec![0; GULP], from: 0, to: 0, after_payload: false }
    }

    /// What was read and not yet consumed.
    pub(crate) fn buffered(&self) -> &[u8] {
        self.buffer.get(self.from..self.to).unwrap_or_default()
    }

    pub(crate) fn consume(&mut self, len: usize) {
        self.from = self.from.saturating_add(len).min(self.to);
    }

    /// Reads until `len` bytes are buffered, at most [`GULP`]. `false` if the stream ends
    /// before the first of them. A stream whose reads time out may stay silent before the
    /// first byte if `may_wait`, and never after it.
    pub(crate) fn fill(&mut self, len: usize, may_wait: bool) -> io::Result<bool> {
        if self.buffered().len() >= len {
            return Ok(true);
        }
        self.buffer.copy_within(self.from..self.to, 0);
        self.to = self.to.saturating_sub(self.from);
        self.from = 0;
        let most = if std::mem::take(&mut self.after_payload) { len.max(AHEAD) } else { GULP };
        while self.to < len.min(GULP) {
            let room = self.buffer.get_mut(self.to..most.min(GULP)).unwrap_or_default();
            match self.source.read(room) {
                Ok(0) if self.to == 0 && may_wait => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.to = self.to.saturating_add(read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if self.to == 0 && may_wait && error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Fills `payload`.
    pub(crate) fn read_payload(&mut self, payload: &mut [u8]) -> io::Result<()> {
        let known = self.buffered().len().min(payload.len());
        let (head, mut rest) = payload.split_at_mut_checked(known).unwrap_or_default();
        head.copy_from_slice(self.buffered().get(..known).unwrap_or_default());
        self.consume(known);
        self.after_payload = true;
        while !rest.is_empty() {
            // Nothing is buffered here.
            let ahead = self.buffer.get_mut(..AHEAD).unwrap_or_default();
            let wanted = rest.len();
            let mut bufs = [IoSliceMut::new(rest), IoSliceMut::new(ahead)];
            match self.source.read_vectored(&mut bufs) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    (self.from, self.to) = (0, read.saturating_sub(wanted).min(AHEAD));
                    rest = rest.get_mut(read.min(wanted)..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads `len` bytes and forgets them.
    pub(crate) fn skip(&mut self, mut len: u64) -> io::Result<()> {
        while len > 0 {
            self.fill(1, false)?;
            let now = usize::try_from(len).unwrap_or(usize::MAX).min(self.buffered().len());
            self.consume(now);
            len = len.saturating_sub(u64::try_from(now).unwrap_or(u64::MAX));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives bytes in pieces of a size of its own, and nothing at first.
    struct Pieces {
        bytes: Vec<u8>,
        size: usize,
        silent: bool,
    }

    impl Read for Pieces {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.read_vectored(&mut [IoSliceMut::new(buf)])
        }

        fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
            if std::mem::take(&mut self.silent) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let mut now = &self.bytes[..self.size.min(self.bytes.len())];
            let mut given = 0;
            for buf in bufs {
                given = now.read(buf).unwrap().saturating_add(given);
            }
            self.bytes.drain(..given);
            Ok(given)
        }
    }

    #[test]
    fn headers_and_payloads_come_out_whole_whatever_the_pieces() {
        let bytes: Vec<u8> = (0..400_000_u32).map(|at| at.to_le_bytes()[0] ^ 7).collect();
        for size in [1, 27, 1000, 70_000, 1 << 20] {
            let mut input = Input::new(Pieces { bytes: bytes.clone(), size, silent: true });
            let mut at = 0;
            for len in [5, 100_000, 28, 1, 200_000, 0, 66_000] {
                assert!(input.fill(28, true).unwrap());
                assert_eq!(input.buffered()[..28], bytes[at..at + 28], "{size} {len}");
                input.consume(28);
                at += 28;
                let mut payload = vec![0; len];
                input.read_payload(&mut payload).unwrap();
                assert!(payload == bytes[at..at + len], "{size} {len}");
                at += len;
            }
            input.skip(30_000).unwrap();
            at += 30_000;
            assert!(input.fill(1, true).unwrap());
            assert_eq!(input.buffered()[0], bytes[at]);
            let left = u64::try_from(bytes.len() - at).unwrap();
            assert!(input.skip(left + 1).is_err());
            assert!(!input.fill(28, true).unwrap());
        }
    }

    #[test]
    fn silence_is_fine_between_requests_only() {
        let silent = |bytes: &[u8]| {
            Input::new(Pieces { bytes: bytes.to_vec(), size: 1 << 20, silent: true })
        };
        assert!(silent(&[1; 28]).fill(28, true).unwrap());
        assert!(silent(&[1; 28]).fill(28, false).is_err());
        assert!(silent(&[1; 28]).read_payload(&mut [0; 28]).is_err());
        let mut half = silent(&[1; 20]);
        assert!(half.fill(20, true).unwrap());
        half.source.silent = true;
        assert_eq!(half.fill(28, true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
