// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests from several threads.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use tranship_block::{AlignedBuffer, BlockDevice, Error, Result, Span};

/// Threads that make requests at the same time.
const MOST_THREADS: u64 = 256;

/// Sizes of disks are multiples of this.
const SECTOR: u64 = 512;

/// Bytes that they may have under way.
const MOST_BYTES: u64 = 1 << 30;

/// What is asked of a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Requests.
    pub(super) count: u64,
    /// Where the first one starts.
    pub(super) start: u64,
    /// Bytes of a request.
    pub(super) len: u64,
    /// Bytes from one to the next; past the end of the disk they go on at its start.
    pub(super) step: u64,
    /// The byte that is written, if it is not read.
    pub(super) pattern: Option<u8>,
    /// Writes after which a flush follows; 0 never flushes.
    pub(super) flush_interval: u64,
    /// Nothing else is under way during a flush.
    pub(super) drains: bool,
}

/// How far it is.
#[derive(Debug, Default)]
struct State {
    sent: u64,
    under_way: u64,
    is_flushing: bool,
    failure: Option<Error>,
}

/// A load on its way.
struct Run<'a> {
    load: &'a Load,
    device: &'a dyn BlockDevice,
    state: Mutex<State>,
    idle: Condvar,
}

impl Load {
    /// Makes the requests, at most `depth` at the same time.
    pub(super) fn run(&self, device: &dyn BlockDevice, depth: u64) -> Result<()> {
        let run = Run { load: self, device, state: Mutex::default(), idle: Condvar::new() };
        let threads = depth.min(self.count).min(MOST_THREADS).min(MOST_BYTES / self.len);
        thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|| run.work());
            }
            run.work();
        });
        match run.state.into_inner().unwrap_or_else(PoisonError::into_inner).failure {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Where the request with this number starts.
    fn offset(&self, number: u64, size: u64) -> u64 {
        if number == 0 {
            return self.start;
        }
        let at = u128::from(self.start) + u128::from(self.step) * u128::from(number);
        let at = at.checked_rem(u128::from(size)).unwrap_or(0);
        u64::try_from(at).unwrap_or(0)
    }
}

impl Run<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let len = usize::try_from(self.load.len).unwrap_or(usize::MAX);
        let mut buffer = AlignedBuffer::new(len);
        buffer.fill(self.load.pattern.unwrap_or(0));
        while let Some(number) = self.next() {
            let outcome = self.request(number, &mut buffer);
            let mut state = self.state();
            state.under_way -= 1;
            self.idle.notify_all();
            let interval = self.load.flush_interval;
            let is_due = interval > 0 && (number + 1).is_multiple_of(interval);
            let outcome = match outcome {
                Ok(()) if is_due => self.flush(state),
                other => {
                    drop(state);
                    other
                }
            };
            if let Err(error) = outcome {
                self.state().failure.get_or_insert(error);
                self.idle.notify_all();
                return;
            }
        }
    }

    /// The next request's number.
    fn next(&self) -> Option<u64> {
        let mut state = self.state();
        while state.is_flushing && self.load.drains && state.failure.is_none() {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.failure.is_some() || state.sent == self.load.count {
            return None;
        }
        let number = state.sent;
        state.sent += 1;
        state.under_way += 1;
        Some(number)
    }

    fn request(&self, number: u64, buffer: &mut [u8]) -> Result<()> {
        // The guest sees whole sectors; of the last one there may be less.
        let stored = self.device.size();
        let size = stored.next_multiple_of(SECTOR);
        let at = self.load.offset(number, size);
        Span::new(at, self.load.len).check_within(size)?;
        let there = usize::try_from(stored.saturating_sub(at)).unwrap_or(usize::MAX);
        let (buffer, _) = buffer.split_at_mut(there.min(buffer.len()));
        match self.load.pattern {
            Some(_) => self.device.write_at(buffer, at),
            None => self.device.read_at(buffer, at),
        }
    }

    fn flush(&self, mut state: MutexGuard<'_, State>) -> Result<()> {
        if self.load.drains {
            while state.is_flushing && state.failure.is_none() {
                state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.is_flushing = true;
            while state.under_way > 0 {
                state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        drop(state);
        let outcome = self.device.flush();
        self.state().is_flushing = false;
        self.idle.notify_all();
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use tranship_block::{Extent, MemoryDevice, Zeroing};

    const LOAD: Load = Load {
        count: 100,
        start: 0,
        len: 4096,
        step: 4096,
        pattern: None,
        flush_interval: 0,
        drains: true,
    };

    #[derive(Debug)]
    struct Counting {
        disk: MemoryDevice,
        flushes: AtomicU64,
    }

    impl BlockDevice for Counting {
        fn size(&self) -> u64 {
            self.disk.size()
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            self.disk.read_at(buf, offset)
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
            self.disk.write_at(buf, offset)
        }
        fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
            self.disk.write_zeroes(span, mode)
        }
        fn extent_at(&self, offset: u64) -> Result<Extent> {
            self.disk.extent_at(offset)
        }
        fn flush(&self) -> Result<()> {
            self.flushes.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn requests_go_round_and_flushes_follow() {
        for (drains, depth) in [(true, 1), (true, 7), (false, 7), (true, 1000)] {
            let device =
                Counting { disk: MemoryDevice::new(vec![0; 64 << 10]), flushes: AtomicU64::new(0) };
            let load = Load { pattern: Some(3), flush_interval: 7, drains, ..LOAD };
            load.run(&device, depth).unwrap();
            assert_eq!(device.flushes.into_inner(), 14);
            let mut bytes = vec![0; 64 << 10];
            device.disk.read_at(&mut bytes, 0).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 3));
        }
    }

    #[test]
    fn offsets_start_again_behind_the_end() {
        let load = Load { start: 5, step: 3, ..LOAD };
        assert_eq!([0, 1, 2, 3].map(|number| load.offset(number, 10)), [5, 8, 1, 4]);
        assert_eq!(load.offset(u64::MAX, 10), 0);
        assert_eq!(load.offset(1, 0), 0);
    }

    #[test]
    fn a_request_past_the_end_fails() {
        let device = MemoryDevice::new(vec![0; 10_000]);
        assert!(LOAD.run(&device, 4).is_err());
        Load { count: 2, ..LOAD }.run(&device, 4).unwrap();
        // An odd end is that of a sector.
        Load { len: 512, step: 512, ..LOAD }.run(&device, 4).unwrap();
    }
}
