// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Work on a disk piece by piece, with several threads.

use crate::failure::Failure;
use std::sync::{Mutex, PoisonError};
use std::thread;
use tranship_appliance::CancelToken;
use tranship_block::{BlockDevice, Extent};
use tranship_convert::ErrorKind;

/// Bytes of a piece that has to be read.
pub(crate) const PIECE: u64 = 2 << 20;

/// Threads that work: more only compete for the same memory.
const MOST_THREADS: usize = 4;

/// Does `work` for each piece that `next` gives, several at the same time; every thread
/// has scratch space of its own. The first failure ends it.
///
/// # Errors
///
/// What `next` and `work` report; [`ErrorKind::Interrupted`] once `cancel` says so.
pub(crate) fn each<T: Send, S: Default>(
    next: impl FnMut() -> Result<Option<T>, Failure> + Send,
    cancel: &CancelToken,
    work: impl Fn(T, &mut S) -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    let next = Mutex::new((next, false));
    let failure = Mutex::new(None);
    let take = || {
        let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.1 {
            return Ok(None);
        }
        if cancel.is_cancelled() {
            return Err(Failure::new(ErrorKind::Interrupted, "interrupted"));
        }
        (next.0)()
    };
    let run = || {
        let mut scratch = S::default();
        let outcome = loop {
            match take() {
                Ok(Some(piece)) => match work(piece, &mut scratch) {
                    Ok(()) => {}
                    Err(error) => break Err(error),
                },
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if let Err(error) = outcome {
            next.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    };
    let threads = thread::available_parallelism().map_or(2, usize::from).min(MOST_THREADS);
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

/// The extent at `offset`, which is past the end of a shorter disk a hole without end.
///
/// # Errors
///
/// What the disk reports.
pub(crate) fn extent_at(device: &dyn BlockDevice, offset: u64) -> Result<Extent, Failure> {
    if offset >= device.size() {
        return Ok(Extent::new(tranship_block::ExtentKind::Hole, u64::MAX - offset));
    }
    let extent = device.extent_at(offset)?.limited_to(device.size() - offset);
    if extent.len == 0 {
        return Err(tranship_block::Error::corrupt("device reported an empty extent").into());
    }
    Ok(extent)
}

/// Fills `buf` from `offset` on; past the end of the disk with zeroes.
///
/// # Errors
///
/// What the disk reports.
pub(crate) fn read(device: &dyn BlockDevice, buf: &mut [u8], offset: u64) -> Result<(), Failure> {
    let left = device.size().saturating_sub(offset);
    let there = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
    let (there, behind) = buf.split_at_mut(there);
    behind.fill(0);
    if !there.is_empty() {
        device.read_at(there, offset)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn all_pieces_are_done_until_one_fails() {
        let sum = AtomicU64::new(0);
        let mut numbers = 0..100;
        each(
            || Ok(numbers.next()),
            &CancelToken::default(),
            |number, (): &mut ()| {
                sum.fetch_add(number, Ordering::Relaxed);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(sum.into_inner(), 4950);

        let mut numbers = 0..u64::MAX;
        let outcome = each(
            || Ok(numbers.next()),
            &CancelToken::default(),
            |number, (): &mut ()| match number {
                10 => Err(Failure::usage("ten")),
                _ => Ok(()),
            },
        );
        assert_eq!(outcome.unwrap_err().message(), "ten");
    }

    #[test]
    fn an_interrupt_ends_it() {
        let cancel = CancelToken::default();
        cancel.cancel();
        let failure = each(|| Ok(Some(())), &cancel, |(), (): &mut ()| Ok(())).unwrap_err();
        assert_eq!(failure.kind(), ErrorKind::Interrupted);
    }
}
