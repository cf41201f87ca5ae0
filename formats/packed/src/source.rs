// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A range of the packed file as the stream that decompressors want.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result, Span};

const BUFFER: usize = 256 << 10;

/// A buffered reader of a range of a file that knows where it is.
#[derive(Debug)]
pub(crate) struct Source {
    file: Arc<dyn BlockDevice>,
    /// What has not been read into the buffer yet.
    rest: Span,
    buffer: Vec<u8>,
    used: usize,
    most: usize,
}

impl Source {
    /// Reads `span`, of which the caller knows that it lies within `file`.
    pub(crate) fn new(file: &Arc<dyn BlockDevice>, span: Span) -> Self {
        Self::with_buffer(file, span, BUFFER)
    }

    /// As [`Self::new`], reading `most` bytes at a time.
    pub(crate) fn with_buffer(file: &Arc<dyn BlockDevice>, span: Span, most: usize) -> Self {
        Self { file: Arc::clone(file), rest: span, buffer: Vec::new(), used: 0, most }
    }

    /// Bytes of the range from `offset` of the file onward.
    pub(crate) fn remaining_from(&self, offset: u64) -> u64 {
        self.rest.end().saturating_sub(offset)
    }

    fn buffered(&self) -> u64 {
        u64::try_from(self.buffer.len().saturating_sub(self.used)).unwrap_or(0)
    }

    /// Offset in the file of the next byte.
    pub(crate) fn position(&self) -> u64 {
        self.rest.start.saturating_sub(self.buffered())
    }

    /// The bytes that come next; none only at the end of the range.
    pub(crate) fn fill(&mut self) -> Result<&[u8]> {
        if self.used >= self.buffer.len() {
            let len = usize::try_from(self.rest.len).unwrap_or(usize::MAX).min(self.most);
            self.buffer.resize(len, 0);
            self.used = 0;
            if let Err(error) = self.file.read_at(&mut self.buffer, self.rest.start) {
                self.buffer.clear();
                return Err(error);
            }
            let len = u64::try_from(len).unwrap_or(u64::MAX);
            self.rest = Span::new(
                self.rest.end().min(self.rest.start.saturating_add(len)),
                self.rest.len.saturating_sub(len),
            );
        }
        Ok(self.buffer.get(self.used..).unwrap_or_default())
    }

    pub(crate) fn skip_buffered(&mut self, bytes: usize) {
        self.used = self.used.saturating_add(bytes).min(self.buffer.len());
    }

    /// Goes `bytes` forward without reading what the buffer does not have.
    pub(crate) fn skip(&mut self, bytes: u64) -> Result<()> {
        let buffered = self.buffered();
        if let Some(more) = bytes.checked_sub(buffered) {
            if more > self.rest.len {
                return Err(self.truncated());
            }
            self.used = self.buffer.len();
            self.rest =
                Span::new(self.rest.start.saturating_add(more), self.rest.len.saturating_sub(more));
        } else {
            self.skip_buffered(usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        Ok(())
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            *byte = match self.fill()?.first() {
                Some(next) => *next,
                None => return Err(self.truncated()),
            };
            self.skip_buffered(1);
        }
        Ok(bytes)
    }

    pub(crate) fn truncated(&self) -> Error {
        Error::corrupt("packed file ends in the middle of its data").at(self.position())
    }
}

impl Read for Source {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let len = bytes.len().min(out.len());
        for (to, from) in out.iter_mut().zip(bytes) {
            *to = *from;
        }
        self.consume(len);
        Ok(len)
    }
}

impl BufRead for Source {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.fill().map_err(io::Error::other)
    }

    fn consume(&mut self, bytes: usize) {
        self.skip_buffered(bytes);
    }
}

/// What a decompressor's failure means: the file's own error, or damaged data.
pub(crate) fn failure(error: io::Error, what: &str) -> Error {
    match error.downcast::<Error>() {
        Ok(error) => error,
        Err(error) => {
            Error::corrupt(format!("compressed data of {what} is damaged")).because(error)
        }
    }
}
