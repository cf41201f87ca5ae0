// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Inflating compressed clusters, and keeping the last ones for readers of small pieces.
//!
//! Neighbours in the guest are neighbours in the file, as a rule: many are read at once.

use crate::geometry::{to_u64, to_usize};
use crate::header::Compression;
use flate2::{Decompress, FlushDecompress, Status};
use libdeflater::Decompressor;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result};
use zstd::zstd_safe::{DCtx, InBuffer, OutBuffer, ResetDirective, get_error_name};

/// Inflated clusters that are kept.
const KEPT: usize = 8;
/// Most bytes that are read at once.
const MOST_READ: u64 = 4 << 20;
/// Bytes between two clusters that are read along rather than skipped.
const SMALL_GAP: u64 = 64 << 10;

/// Start and length in the file.
pub(crate) type Place = (u64, u64);

/// The last inflated clusters by their place in the file; emptied when clusters are freed.
#[derive(Debug, Default)]
pub(crate) struct Inflated(Vec<(Place, Arc<Vec<u8>>)>);

impl Inflated {
    pub(crate) fn get(&self, place: Place) -> Option<Arc<Vec<u8>>> {
        self.0.iter().find(|(kept, _)| *kept == place).map(|(_, bytes)| bytes.clone())
    }

    pub(crate) fn put(&mut self, place: Place, bytes: Arc<Vec<u8>>) {
        if self.0.len() >= KEPT {
            self.0.remove(0);
        }
        self.0.push((place, bytes));
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

thread_local! {
    /// What was read last, for its memory alone. It is taken out while it is in use, since
    /// the file may be a disk that is compressed as well.
    static PACKED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    static INFLATER: RefCell<Option<Decompressor>> = const { RefCell::new(None) };
    static ZSTD: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// Fills `buf` with the clusters at `places`, each of `cluster_len` bytes.
pub(crate) fn read(
    file: &dyn BlockDevice,
    compression: Compression,
    places: &[Place],
    buf: &mut [u8],
    cluster_len: usize,
) -> Result<()> {
    let mut places = places;
    let mut clusters = buf.chunks_exact_mut(cluster_len);
    while !places.is_empty() {
        let (start, end, count) = together(places);
        let (now, rest) = places.split_at_checked(count).unwrap_or((places, &[]));
        // Lengths are rounded up to sectors, so the last one may end past the file.
        let len = to_usize(end.min(file.size()).saturating_sub(start))?;
        if len == 0 {
            return Err(Error::corrupt(format!(
                "compressed cluster starts past the file's {} bytes",
                file.size()
            ))
            .at(start));
        }
        let mut packed = PACKED.take();
        packed.resize(packed.len().max(len), 0);
        let all = packed.get_mut(..len).unwrap_or_default();
        let result = file.read_at(all, start).and_then(|()| {
            for ((at, len), cluster) in now.iter().zip(&mut clusters) {
                let from = to_usize(at.saturating_sub(start))?;
                let tail = all.get(from..).unwrap_or_default();
                let len = to_usize(*len)?.min(tail.len());
                unpack(compression, tail.get(..len).unwrap_or_default(), cluster).map_err(
                    |fault| Error::corrupt(format!("compressed cluster {fault}")).at(*at),
                )?;
            }
            Ok(())
        });
        PACKED.set(packed);
        result?;
        places = rest;
    }
    Ok(())
}

/// Start and end of the first places that are worth one read, and how many they are.
fn together(places: &[Place]) -> (u64, u64, usize) {
    let (start, len) = places.first().copied().unwrap_or_default();
    let mut end = start.saturating_add(len);
    let mut count = 1_usize;
    for (at, len) in places.iter().skip(1) {
        let next = at.saturating_add(*len).max(end);
        if *at < start
            || *at > end.saturating_add(SMALL_GAP)
            || next.saturating_sub(start) > MOST_READ
        {
            break;
        }
        end = next;
        count = count.saturating_add(1);
    }
    (start, end, count)
}

/// Fills `cluster` from a stream that yields exactly as many bytes; padding may follow it.
fn unpack(
    compression: Compression,
    packed: &[u8],
    cluster: &mut [u8],
) -> std::result::Result<(), String> {
    if packed.is_empty() {
        return Err("starts past the end of the file".to_owned());
    }
    let found = match compression {
        Compression::Deflate => inflate(packed, cluster)?,
        Compression::Zstd => unpack_zstd(packed, cluster)?,
    };
    if found == cluster.len() {
        Ok(())
    } else {
        Err(format!("inflates to {found} bytes, expected {}", cluster.len()))
    }
}

fn inflate(packed: &[u8], cluster: &mut [u8]) -> std::result::Result<usize, String> {
    let fast = INFLATER.with_borrow_mut(|inflater| {
        inflater.get_or_insert_with(Decompressor::new).deflate_decompress(packed, cluster)
    });
    match fast {
        Ok(found) => Ok(found),
        // Stricter than zlib about the end of a stream; and zlib says what is wrong.
        Err(_) => inflate_slowly(packed, cluster),
    }
}

/// Only as much as the cluster holds is inflated: what a stream claims beyond is an error.
fn inflate_slowly(packed: &[u8], cluster: &mut [u8]) -> std::result::Result<usize, String> {
    let mut stream = Decompress::new(false);
    let status = stream
        .decompress(packed, cluster, FlushDecompress::Finish)
        .map_err(|error| format!("is no deflate stream: {error}"))?;
    let out = usize::try_from(stream.total_out()).unwrap_or(usize::MAX);
    match status {
        Status::StreamEnd => Ok(out),
        // The cluster is full. The stream's end mark may still be to come, but no bytes.
        _ if out == cluster.len() => {
            let used = usize::try_from(stream.total_in()).unwrap_or(usize::MAX);
            let rest = packed.get(used..).unwrap_or_default();
            match stream.decompress(rest, &mut [0], FlushDecompress::Finish) {
                Ok(Status::StreamEnd) if stream.total_out() == to_u64(out) => Ok(out),
                _ => Err(format!("inflates to more than {out} bytes")),
            }
        }
        _ => Ok(out),
    }
}

/// One frame that fills the cluster; what follows it is padding.
fn unpack_zstd(packed: &[u8], cluster: &mut [u8]) -> std::result::Result<usize, String> {
    let fault = |code| format!("is no zstd frame of its size: {}", get_error_name(code));
    ZSTD.with_borrow_mut(|context| {
        let context = context.get_or_insert_with(DCtx::create);
        context.reset(ResetDirective::SessionOnly).map_err(fault)?;
        let mut input = InBuffer::around(packed);
        let mut output = OutBuffer::around(cluster);
        loop {
            let before = (input.pos(), output.pos());
            let left = context.decompress_stream(&mut output, &mut input).map_err(fault)?;
            if left == 0 {
                return Ok(output.pos());
            }
            if before == (input.pos(), output.pos()) {
                break;
            }
        }
        let found = output.pos();
        if found < output.capacity() {
            return Ok(found);
        }
        // The cluster is full, but the frame goes on: its end may follow, but no bytes.
        let mut more = [0];
        let mut beyond = OutBuffer::around(more.as_mut_slice());
        context.decompress_stream(&mut beyond, &mut input).map_err(fault)?;
        if beyond.pos() > 0 {
            return Err(format!("inflates to more than {found} bytes"));
        }
        Ok(found)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_read_together_up_to_a_limit() {
        assert_eq!(together(&[(1000, 512)]), (1000, 1512, 1));
        // A length rounded up to a sector reaches into the next stream.
        assert_eq!(together(&[(1000, 536), (1400, 648), (3000, 72)]), (1000, 3072, 3));
        assert_eq!(together(&[(1000, 536), (900, 648)]), (1000, 1536, 1));
        assert_eq!(together(&[(1000, 536), (70_000, 648)]).2, 1);
        let far: Vec<Place> = (0..100).map(|number| (number << 16, 1 << 16)).collect();
        assert_eq!(together(&far), (0, MOST_READ, 64));
    }

    #[test]
    fn zstd_frames_fill_a_cluster_exactly() {
        for len in [4096_usize, 4095, 4097] {
            let bytes: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let mut packed = zstd::stream::encode_all(bytes.as_slice(), 3).unwrap();
            packed.extend([0; 100]);
            let mut cluster = vec![0; 4096];
            let result = unpack(Compression::Zstd, &packed, &mut cluster);
            assert_eq!(result.is_ok(), len == 4096, "{len}: {result:?}");
            assert!(len != 4096 || cluster == bytes);
        }
    }
}
