// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reading from a socket with as few calls and copies as replies allow.

use std::io::{self, IoSliceMut, Read};

/// Bytes that are asked for at once where replies are short.
const LONG: usize = 32 << 10;
/// Bytes that are asked for behind a long payload: the head of the next reply, and hardly
/// anything of what follows it, which has to be copied.
const SHORT: usize = 64;
/// From this length on bytes go straight to their target.
const LARGE: usize = 16 << 10;

/// A source of bytes with what was read too far.
///
/// What is long is received where it belongs. The same call asks for what comes behind it,
/// so that a reply's head costs no call of its own.
#[derive(Debug)]
pub(super) struct Ahead<R> {
    source: R,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// How much is asked for.
    gulp: usize,
}

impl<R: Read> Ahead<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, bytes: vec![0; LONG], start: 0, end: 0, gulp: LONG }
    }

    /// What was read too far.
    pub(super) fn buffer(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    pub(super) fn into_inner(self) -> R {
        self.source
    }

    fn take(&mut self, target: &mut [u8]) -> usize {
        let buffered = self.bytes.get(self.start..self.end).unwrap_or_default();
        let len = buffered.len().min(target.len());
        if let (Some(target), Some(buffered)) = (target.get_mut(..len), buffered.get(..len)) {
            target.copy_from_slice(buffered);
        }
        self.start = self.start.saturating_add(len);
        len
    }
}

impl<R: Read> Read for Ahead<R> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        if self.start < self.end || target.is_empty() {
            return Ok(self.take(target));
        }
        (self.start, self.end) = (0, 0);
        if target.len() >= LARGE {
            self.gulp = SHORT;
            let asked = target.len();
            let behind = self.bytes.get_mut(..SHORT).unwrap_or_default();
            let mut parts = [IoSliceMut::new(target), IoSliceMut::new(behind)];
            let count = self.source.read_vectored(&mut parts)?;
            self.end = count.saturating_sub(asked).min(SHORT);
            return Ok(count.min(asked));
        }
        let gulp = self.gulp.max(target.len());
        // What is short is followed by more that is short.
        self.gulp = LONG;
        let room = self.bytes.get_mut(..gulp).unwrap_or_default();
        self.end = self.source.read(room)?.min(gulp);
        Ok(self.take(target))
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, reason = "the numbers are the test's own")]
mod tests {
    use super::*;

    /// Gives at most so many bytes at a time, and counts the calls.
    struct Drops<'a>(&'a [u8], usize, usize);

    impl Read for Drops<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.read_vectored(&mut [IoSliceMut::new(buf)])
        }

        fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
            self.2 += 1;
            let mut used = 0;
            for buf in bufs {
                let len = buf.len().min(self.0.len()).min(self.1 - used);
                buf[..len].copy_from_slice(&self.0[..len]);
                self.0 = &self.0[len..];
                used += len;
            }
            Ok(used)
        }
    }

    #[test]
    fn bytes_come_in_order_whatever_is_asked_for() {
        let bytes: Vec<u8> = (0..=250).cycle().take(500_000).collect();
        for most in [1, 63, 40_000, usize::MAX] {
            let mut ahead = Ahead::new(Drops(&bytes, most, 0));
            let mut seen = Vec::new();
            for len in [4, 16, 8, 100_000, 4, 28, 4096, 16_384, 1, 200_000, 32, 7].iter().cycle() {
                let mut part = vec![0; (*len).min(bytes.len() - seen.len())];
                ahead.read_exact(&mut part).unwrap();
                seen.extend(part);
                if seen.len() == bytes.len() {
                    break;
                }
            }
            assert!(seen == bytes, "{most}");
            assert!(ahead.buffer().is_empty());
        }
    }

    #[test]
    fn a_head_comes_with_the_payload_before_it() {
        let bytes = vec![1; 4 * 100_028];
        let mut ahead = Ahead::new(Drops(&bytes, usize::MAX, 0));
        let mut payload = vec![0; 100_000];
        for _ in 0..4 {
            ahead.read_exact(&mut [0; 28]).unwrap();
            ahead.read_exact(&mut payload).unwrap();
        }
        assert!(ahead.source.2 <= 5, "{} calls", ahead.source.2);
    }
}
