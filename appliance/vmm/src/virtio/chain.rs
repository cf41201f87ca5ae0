// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One request of the driver: buffers to read, then buffers to write (section 2.7).

use crate::memory::Ram;
use std::os::fd::AsRawFd;
use tranship_block::FileRange;
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

/// Writes `data` to the front of `buffers` and removes what was filled; `false` if there was
/// too little room.
pub(crate) fn put_front(buffers: &mut Vec<Buffer>, ram: &Ram, data: &[u8]) -> bool {
    let filled = fill(buffers, ram, data);
    remove_front(buffers, filled);
    filled == data.len()
}

fn remove_front(buffers: &mut Vec<Buffer>, count: usize) {
    let mut left = count;
    let mut used: usize = 0;
    for buffer in buffers.iter_mut() {
        let now = buffer.len.min(left);
        shorten_front(buffer, now);
        left = left.saturating_sub(now);
        if buffer.len > 0 {
            break;
        }
        used = used.saturating_add(1);
    }
    buffers.drain(..used);
}

/// The most pieces of memory that one system call fills: what the kernel takes (`IOV_MAX`).
const MOST_PIECES: usize = 1024;

/// Fills the front of `buffers` from a file, at most `range.len` bytes and without a copy in
/// this process, and removes what was filled. How many bytes that were, 0 at the file's end.
///
/// # Errors
///
/// The system's; [`Broken`] inside if part of a buffer is no memory.
pub(crate) fn fill_from_file(
    buffers: &mut Vec<Buffer>,
    ram: &Ram,
    range: &FileRange<'_>,
) -> Result<std::io::Result<usize>, Broken> {
    let mut left = usize::try_from(range.len).unwrap_or(usize::MAX);
    let mut guards = Vec::new();
    'buffers: for buffer in buffers.iter() {
        let len = buffer.len.min(left);
        left = left.saturating_sub(len);
        for slice in GuestMemoryBackend::get_slices(ram, buffer.address, len) {
            let slice = slice.map_err(|_| Broken("a buffer lies outside of memory"))?;
            guards.push(slice.ptr_guard_mut());
            if guards.len() == MOST_PIECES {
                break 'buffers;
            }
        }
        if left == 0 {
            break;
        }
    }
    let pieces: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let (Ok(count), Ok(offset)) = (i32::try_from(pieces.len()), i64::try_from(range.offset)) else {
        return Ok(Err(std::io::ErrorKind::InvalidInput.into()));
    };
    // SAFETY: each piece is mapped guest memory of that length, which stays mapped as long as
    // `ram` is borrowed. It is reached by pointers alone, so that it does no harm that a
    // guest names the same memory twice, or looks at it and changes it meanwhile.
    let filled = unsafe { libc::preadv(range.file.as_raw_fd(), pieces.as_ptr(), count, offset) };
    let Ok(filled) = usize::try_from(filled) else {
        return Ok(Err(std::io::Error::last_os_error()));
    };
    remove_front(buffers, filled);
    Ok(Ok(filled))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, Memory};
    use std::io::Write;
    use std::os::fd::AsFd;

    fn buffer(address: u64, len: usize) -> Buffer {
        Buffer { address: GuestAddress(address), len }
    }

    #[test]
    fn files_go_straight_into_buffers_that_may_be_the_same() {
        let memory = Memory::new(64, &Backing::Anonymous).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        file.write_all(&bytes).unwrap();
        let mut buffers = vec![buffer(0x1000, 100), buffer(0x1000, 50), buffer(0x5000, 5000)];
        let range = FileRange { file: file.as_fd(), offset: 10, len: 1150 };
        let filled = fill_from_file(&mut buffers, &memory.ram, &range).unwrap().unwrap();
        assert_eq!(filled, 1150);
        assert_eq!(buffers, [buffer(0x5000 + 1000, 4000)]);
        let mut seen = vec![0; 1000];
        memory.ram.read_slice(&mut seen, GuestAddress(0x5000)).unwrap();
        assert_eq!(seen, bytes[160..1160]);
        let end = FileRange { file: file.as_fd(), offset: 10_000, len: 5 };
        assert_eq!(fill_from_file(&mut buffers, &memory.ram, &end).unwrap().unwrap(), 0);
        assert!(put_front(&mut buffers, &memory.ram, &[7; 4000]));
        assert!(buffers.is_empty());
        assert!(!put_front(&mut buffers, &memory.ram, &[7]));
    }
}
