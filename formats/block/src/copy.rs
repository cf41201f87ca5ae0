// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copying one device onto another: only what is there, with every core, restartable.
//!
//! The disk is cut into pieces at multiples of the chunk. Threads take them in ascending
//! order, and each reads, looks for zeroes, hashes and writes its piece while the bytes
//! are still in the processor's cache.

mod job;
mod packed;
mod piece;
mod queued;
mod runs;
mod salvage;
mod turn;
mod work;

use crate::{BlockDevice, Error, HashedChunk, Result, Span};
use job::Job;
pub use packed::copy_packed;

/// Bytes of the longest piece, so that memory stays bounded whatever is asked for.
const LONGEST_CHUNK: u64 = 16 << 20;

/// Larger blocks of a target are taken in parts: looking for zeroes in whole blocks of
/// 32 MiB would find none.
const LARGEST_BLOCK: u64 = 1 << 20;

/// How to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub struct CopyOptions {
    /// First byte to copy; everything below counts as done by an earlier run.
    pub start: u64,
    /// How many pieces are in flight at the same time; at least 1.
    pub threads: usize,
    /// Reads in flight at a source that answers many at a time
    /// ([`BlockDevice::read_queues`]); of others, and if this is 0, each thread reads for
    /// itself, and there are as many threads as this says.
    pub in_flight: usize,
    /// Bytes of one piece; rounded up to whole preferred blocks of the target, and at most
    /// 16 MiB.
    pub chunk: u64,
    /// Bytes that are read at a time.
    pub step: u64,
    /// What the source's extents say about zeroes is believed; otherwise all of it is read.
    pub extents: bool,
    /// The target reads as zero from `start` onward, so zeroes need not be written.
    pub target_is_zero: bool,
    /// Zeroes in the data that go on for at least this many bytes are left out, in whole
    /// blocks of the target; 0 does not look for any.
    pub zero_block: u64,
    /// Every byte of the target gets storage, whether it is zero or not.
    pub allocate: bool,
    /// Extents that a layer deeper than this answers for are left alone: the target has
    /// them from its own backing image.
    pub deepest: Option<u32>,
    /// Pieces are written in ascending order, one at a time.
    pub ordered: bool,
    /// Ranges of the source that cannot be read become zeroes, and are reported.
    pub salvage: bool,
    /// The kernel copies from file to file where nobody has to see the bytes: without
    /// `zero_block`, `hash` and `salvage`.
    pub offload: bool,
    /// Bytes of a chunk of the manifest, of which the observer is told the hashes; `None`
    /// hashes nothing.
    pub hash: Option<u64>,
    /// Neither disk is left in the page cache.
    pub drop_cache: bool,
    /// Flushes the target and reports a checkpoint each time this many bytes more are
    /// done; 0 never does.
    pub checkpoint_every: u64,
    /// The target is flushed in the end. A copy with checkpoints always does that.
    pub flush: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            start: 0,
            threads: default_threads(),
            in_flight: 0,
            chunk: 1 << 20,
            // They are still in the core's own cache when they are looked at.
            step: 256 << 10,
            extents: true,
            target_is_zero: false,
            zero_block: 4096,
            allocate: false,
            deepest: None,
            ordered: false,
            salvage: false,
            offload: true,
            hash: None,
            drop_cache: false,
            checkpoint_every: 0,
            flush: true,
        }
    }
}

/// One thread for each core, but more than four only fight for the same memory.
pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).min(4)
}

/// What somebody who waits for a copy is told. Every call can come from any thread,
/// but never two at the same time, and holds up the copy.
pub trait CopyObserver: Sync {
    /// `done` of `total` bytes need no more work; `done` never goes back.
    fn progress(&self, _done: u64, _total: u64) {}

    /// Everything below `offset` is on stable storage: a copy may start again there.
    fn checkpoint(&self, _offset: u64) {}

    /// A chunk that is not all zero has this hash. Chunks ascend, and those below a
    /// checkpoint come before it.
    fn hashed(&self, _chunk: HashedChunk) {}

    /// `span` of the source could not be read and is zero in the target.
    fn unreadable(&self, _span: Span, _error: &Error) {}

    /// A chunk that does not have the hash that its manifest says.
    fn mismatch(&self, _span: Span) {}

    /// Asked before each piece; once it is true the copy ends.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Nobody waits.
impl CopyObserver for () {}

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes written to the target.
    pub bytes_written: u64,
    /// Bytes that are zero and were not written: known so from the source's extents,
    /// found so in its data, or behind the source's end.
    pub bytes_zero: u64,
    /// Bytes that the kernel copied from file to file.
    pub bytes_offloaded: u64,
    /// Bytes left to the target's backing image.
    pub bytes_skipped: u64,
    /// Bytes that could not be read, and count as zero.
    pub bytes_unreadable: u64,
}

impl Copied {
    /// Counts what another copy did as well.
    pub fn add(&mut self, other: Self) {
        for (sum, more) in [
            (&mut self.bytes_read, other.bytes_read),
            (&mut self.bytes_written, other.bytes_written),
            (&mut self.bytes_zero, other.bytes_zero),
            (&mut self.bytes_offloaded, other.bytes_offloaded),
            (&mut self.bytes_skipped, other.bytes_skipped),
            (&mut self.bytes_unreadable, other.bytes_unreadable),
        ] {
            *sum = sum.saturating_add(more);
        }
    }
}

/// Copies `source` onto `target`, and flushes the target unless that is not wanted.
///
/// The target may be larger; what it has behind the source's end becomes zero. Memory is
/// one chunk per thread, however large the disks are.
///
/// # Errors
///
/// [`crate::ErrorKind::Usage`] if the target is smaller than the source, if `start` lies
/// behind its end, or for options that contradict one another.
/// [`crate::ErrorKind::Cancelled`] if the observer said so. Otherwise the
/// failure with the lowest offset; its text tells the side, and its cause what happened.
/// In every case the target holds what was done until then, and the last checkpoint
/// stands.
pub fn copy(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    options: &CopyOptions,
    observer: &dyn CopyObserver,
) -> Result<Copied> {
    let keeps_rest = options.target_is_zero && !options.allocate;
    let end = if keeps_rest { source.size() } else { target.size() };
    if target.size() < source.size() {
        return Err(Error::usage(format!(
            "target has {} bytes, expected at least the source's {}",
            target.size(),
            source.size()
        )));
    }
    check(options, end)?;
    let block = u64::from(target.preferred_block()).clamp(4096, LARGEST_BLOCK);
    Job::new(source, target, options, observer, block, end).run_all()
}

fn check(options: &CopyOptions, end: u64) -> Result<()> {
    if options.start > end {
        return Err(Error::usage(format!("copy cannot start behind its end at byte {end}"))
            .at(options.start));
    }
    if options.deepest.is_some() && (options.target_is_zero || options.hash.is_some()) {
        return Err(Error::usage(
            "a copy onto a backing image needs a target that shows it, and has no manifest",
        ));
    }
    if options.deepest.is_some() && !options.extents {
        return Err(Error::usage("without extents nobody knows what a backing image has"));
    }
    if let Some(chunk) = options.hash {
        crate::manifest::check_chunk(chunk).map_err(|error| Error::usage(error.message()))?;
        if !options.start.is_multiple_of(chunk) && options.start != end {
            return Err(Error::usage(format!(
                "copy with hashes starts in the middle of a chunk of {chunk} bytes"
            ))
            .at(options.start));
        }
    }
    Ok(())
}

/// The distance of the places where pieces end.
fn grid(options: &CopyOptions, block: u64) -> u64 {
    let unit = options.hash.unwrap_or(1).max(block);
    let chunk = options.chunk.clamp(1, LONGEST_CHUNK);
    chunk.checked_next_multiple_of(unit).unwrap_or(unit)
}

fn failed(what: &str, span: Span, cause: Error) -> Error {
    // The cause's own offset may be one of a file: this one is the disk's.
    Error::new(cause.kind(), what).at(span.start).because(cause)
}

#[cfg(test)]
mod tests;
