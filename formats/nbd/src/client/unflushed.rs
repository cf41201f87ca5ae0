// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes that a server has acknowledged and not made stable.

use tranship_block::{Error, ErrorKind, Result, Span};

/// Writes since the last flush: where they begin and end, and how many bytes they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Writes {
    start: u64,
    end: u64,
    bytes: u64,
}

impl Writes {
    fn and(self, other: Self) -> Self {
        Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }
}

fn join(a: Option<Writes>, b: Option<Writes>) -> Option<Writes> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.and(b)),
        (a, b) => a.or(b),
    }
}

/// What would be lost with the server.
#[derive(Debug, Default)]
pub(super) struct Unflushed {
    /// Acknowledged, and no flush was sent since.
    pending: Option<Writes>,
    /// Acknowledged before the flush that is under way.
    flushing: Option<Writes>,
    /// Acknowledged by a server that is not there any more.
    lost: Option<Writes>,
}

impl Unflushed {
    pub(super) fn wrote(&mut self, span: Span) {
        let writes = Writes { start: span.start, end: span.end(), bytes: span.len };
        self.pending = join(self.pending, Some(writes));
    }

    /// Requests go to another server from now on, or to the same one started again.
    pub(super) fn server_changed(&mut self) {
        self.lost = join(self.lost, join(self.pending.take(), self.flushing.take()));
    }

    pub(super) fn start_flush(&mut self) {
        self.flushing = join(self.flushing, self.pending.take());
    }

    /// Ends a flush with what the server says about it. What it cannot know is said here,
    /// once.
    pub(super) fn end_flush(&mut self, result: Result<()>) -> Result<()> {
        if result.is_err() {
            self.pending = join(self.pending, self.flushing.take());
            return result;
        }
        self.flushing = None;
        match self.lost.take() {
            None => Ok(()),
            Some(writes) => Err(Error::new(
                ErrorKind::Lost,
                format!(
                    "the NBD server went away and came back after it had acknowledged writes of \
                     {} bytes before byte {} and not flushed them: they may be lost and have to \
                     be written again",
                    writes.bytes, writes.end
                ),
            )
            .at(writes.start)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_lost_server_had_not_flushed_is_told_once() {
        let mut writes = Unflushed::default();
        writes.wrote(Span::new(0, 512));
        writes.start_flush();
        writes.end_flush(Ok(())).unwrap();
        writes.server_changed();
        writes.start_flush();
        writes.end_flush(Ok(())).unwrap();
        writes.wrote(Span::new(4096, 512));
        writes.start_flush();
        // The flush itself is what has to wait for the new server.
        writes.wrote(Span::new(8192, 512));
        writes.server_changed();
        let error = writes.end_flush(Ok(())).unwrap_err();
        assert!(error.message().contains("1024 bytes before byte 8704"), "{error}");
        assert_eq!(error.offset(), Some(4096));
        writes.start_flush();
        writes.end_flush(Ok(())).unwrap();
    }

    #[test]
    fn a_failed_flush_makes_nothing_stable() {
        let mut writes = Unflushed::default();
        writes.wrote(Span::new(0, 512));
        writes.start_flush();
        writes.end_flush(Err(Error::usage("no"))).unwrap_err();
        writes.server_changed();
        writes.start_flush();
        writes.end_flush(Ok(())).unwrap_err();
    }
}
