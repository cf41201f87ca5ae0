// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One request of the driver: buffers to read, then buffers to write (section 2.7).

use crate::memory::Ram;
use std::io::IoSliceMut;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// What a driver did that no driver may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) &'static str);

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffer {
    pub(crate) address: GuestAddress,
    pub(crate) len: usize,
}

/// The buffers of one request. All lie inside guest memory.
#[derive(Debug)]
pub(crate) struct Chain {
    /// Number under which it goes back.
    pub(crate) head: u16,
    pub(crate) readable: Vec<Buffer>,
    pub(crate) writable: Vec<Buffer>,
}

/// Takes the next request off the queue.
pub(crate) fn next(queue: &mut Queue, ram: &Ram) -> Result<Option<Chain>, Broken> {
    let size = usize::from(queue.size());
    let mut available = queue.iter(ram).map_err(|_| Broken("available ring"))?;
    available.next().map(|chain| take(chain, ram, size)).transpose()
}

fn take(chain: DescriptorChain<&Ram>, ram: &Ram, limit: usize) -> Result<Chain, Broken> {
    let mut taken = Chain { head: chain.head_index(), readable: Vec::new(), writable: Vec::new() };
    let mut last: Option<Descriptor> = None;
    for descriptor in chain {
        let count = taken.readable.len().saturating_add(taken.writable.len());
        if count >= limit {
            return Err(Broken("a chain is longer than its queue"));
        }
        let buffer = Buffer {
            address: descriptor.addr(),
            len: usize::try_from(descriptor.len()).unwrap_or(usize::MAX),
        };
        if buffer.len == 0 || !GuestMemoryBackend::check_range(ram, buffer.address, buffer.len) {
            return Err(Broken("a buffer lies outside of memory"));
        }
        if descriptor.is_write_only() {
            taken.writable.push(buffer);
        } else if taken.writable.is_empty() {
            taken.readable.push(buffer);
        } else {
            return Err(Broken("a readable buffer comes after a writable one"));
        }
        last = Some(descriptor);
    }
    // The iterator ends early and without a word at anything that it does not like.
    match last {
        None => Err(Broken("a chain without buffers")),
        Some(descriptor) if descriptor.has_next() => Err(Broken("a chain breaks off")),
        Some(_) => Ok(taken),
    }
}

/// How many bytes these buffers have.
pub(crate) fn total(buffers: &[Buffer]) -> u64 {
    buffers
        .iter()
        .map(|buffer| u64::try_from(buffer.len).unwrap_or(u64::MAX))
        .fold(0, u64::saturating_add)
}

/// Removes the first `count` bytes from `buffers` into `into`; `false` if there are fewer.
pub(crate) fn take_front(buffers: &mut Vec<Buffer>, ram: &Ram, into: &mut [u8]) -> bool {
    let mut into = into;
    let mut used = 0;
    for buffer in buffers.iter_mut() {
        if into.is_empty() {
            break;
        }
        let count = buffer.len.min(into.len());
        let (now, later) = into.split_at_mut(count);
        if ram.read_slice(now, buffer.address).is_err() {
            return false;
        }
        into = later;
        shorten_front(buffer, count);
        if buffer.len == 0 {
            used += 1;
        }
    }
    buffers.drain(..used);
    into.is_empty()
}

fn shorten_front(buffer: &mut Buffer, count: usize) {
    buffer.address = GuestAddress(buffer.address.0.saturating_add(count as u64));
    buffer.len = buffer.len.saturating_sub(count);
}

/// Removes the last byte of `buffers`: where a status goes.
pub(crate) fn take_last_byte(buffers: &mut Vec<Buffer>) -> Option<GuestAddress> {
    let last = buffers.last_mut()?;
    last.len = last.len.checked_sub(1)?;
    let at = GuestAddress(last.address.0.checked_add(last.len as u64)?);
    if last.len == 0 {
        buffers.pop();
    }
    Some(at)
}

/// Writes `data` to the front of `buffers`; returns how much found room.
pub(crate) fn fill(buffers: &[Buffer], ram: &Ram, data: &[u8]) -> usize {
    let mut rest = data;
    for buffer in buffers {
        let (now, later) = rest.split_at(buffer.len.min(rest.len()));
        if now.is_empty() || ram.write_slice(now, buffer.address).is_err() {
            break;
        }
        rest = later;
    }
    data.len().saturating_sub(rest.len())
}

/// Passes the memory of `buffers` to `with` as slices to fill, without a copy.
///
/// The guest may look at this memory or change it at any time, so `with` must only write to
/// it, and must not trust what it finds there afterwards. [`Broken`] if part of a buffer is
/// no memory.
pub(crate) fn with_slices<T>(
    buffers: &[Buffer],
    ram: &Ram,
    with: impl FnOnce(&mut [IoSliceMut<'_>]) -> T,
) -> Result<T, Broken> {
    let mut guards = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        for slice in GuestMemoryBackend::get_slices(ram, buffer.address, buffer.len) {
            let slice = slice.map_err(|_| Broken("a buffer lies outside of memory"))?;
            guards.push(slice.ptr_guard_mut());
        }
    }
    let mut slices: Vec<IoSliceMut<'_>> = guards
        .iter()
        .map(|guard| {
            // SAFETY: the guard stands for mapped guest memory of this length, which stays
            // mapped as long as `ram` is borrowed. No other reference to it exists in this
            // process: all other access goes through raw pointers. Only the guest itself can
            // change the bytes meanwhile, as with every buffer that a kernel fills; they are
            // plain bytes, and what is read back is never trusted.
            IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), guard.len()) })
        })
        .collect();
    Ok(with(&mut slices))
}
