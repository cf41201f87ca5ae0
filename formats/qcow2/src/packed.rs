// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writing compressed clusters: many at once into a new image, or one into an open image.
//!
//! Streams are stored byte after byte. Several share a cluster of the file, which counts
//! all of them; what does not shrink gets a cluster of its own.

use crate::compress::{entry, pack};
use crate::create::{CreateOptions, create_for_writing};
use crate::geometry::{COPIED, to_u64};
use crate::image::Qcow2;
use crate::metadata::{Metadata, Run};
use crate::write::{ALL_ALLOCATED, Change};
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{
    BlockDevice, Encoding, Error, ErrorKind, PackedTarget, PackedUnit, Result, Span, Storage,
};

/// A new image of compressed clusters.
#[derive(Debug)]
pub struct PackedQcow2 {
    image: Qcow2,
    /// The guest's byte after the last one that was stored.
    stored: Mutex<u64>,
}

/// Makes an image in `storage`, whose contents are lost, to be filled with compressed
/// clusters; until [`PackedTarget::finish`] it is no image.
///
/// # Errors
///
/// As [`crate::create`]; [`ErrorKind::Usage`] if the image has a data file, which has no
/// place for compressed clusters.
pub fn create_packed(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<PackedQcow2> {
    if options.data_file.is_some() {
        return Err(Error::usage("an image with a data file cannot have compressed clusters"));
    }
    let image = create_for_writing(storage, options)?;
    Ok(PackedQcow2 { image, stored: Mutex::new(0) })
}

impl PackedQcow2 {
    /// The image as far as it was stored, for reading.
    pub fn image(&self) -> &Qcow2 {
        &self.image
    }
}

impl PackedTarget for PackedQcow2 {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn unit(&self) -> u32 {
        self.image.preferred_block()
    }

    fn pack(&self, bytes: &[u8], arena: &mut Vec<u8>) -> Result<Encoding> {
        let cluster_len = self.image.geometry.cluster_len();
        if bytes.len() > cluster_len {
            return Err(Error::usage(format!(
                "a unit has {} bytes, expected at most {cluster_len}",
                bytes.len()
            )));
        }
        if bytes.len() == cluster_len {
            return pack(self.image.compression(), bytes, arena);
        }
        let mut whole = bytes.to_vec();
        whole.resize(cluster_len, 0);
        pack(self.image.compression(), &whole, arena)
    }

    fn store(&self, arena: &[u8], units: &[PackedUnit]) -> Result<()> {
        let image = &self.image;
        let geometry = image.geometry;
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        let _in_use = image.in_use.read().unwrap_or_else(PoisonError::into_inner);
        let mut pieces = Vec::new();
        let mut at = 0_usize;
        for unit in units {
            let is_aligned = geometry.within(unit.offset) == 0;
            if !is_aligned || unit.offset < *stored || unit.offset >= image.size() {
                return Err(
                    Error::usage("unit is out of order, or no unit of the disk").at(unit.offset)
                );
            }
            *stored = unit.offset.saturating_add(geometry.cluster());
            let cluster = geometry.index(unit.offset);
            let len = to_u64(unit.len);
            let is_right = match unit.encoding {
                Encoding::Compressed => unit.len > 0 && len < geometry.cluster(),
                Encoding::Plain => len == geometry.cluster(),
            };
            if !is_right {
                return Err(Error::usage(format!("unit has {len} bytes")).at(unit.offset));
            }
            let mut metadata = image.lock();
            let host = image.place(&mut metadata, cluster, len, unit.encoding)?;
            drop(metadata);
            join(&mut pieces, host, (at, unit.len));
            at = at.saturating_add(unit.len);
            image.make_room()?;
        }
        let metadata = image.lock();
        image.reach(&metadata)?;
        drop(metadata);
        let storage = image.writable(0)?;
        for (host, at, len) in pieces {
            let bytes = arena.get(at..at.saturating_add(len)).ok_or_else(|| {
                Error::usage("units have more bytes than the arena that they are in")
            })?;
            storage.write_at(bytes, host)?;
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.image.finish()
    }
}

/// Adds a piece of the arena that goes to `host`: to the last one, if it continues it.
fn join(pieces: &mut Vec<(u64, usize, usize)>, host: u64, (at, len): (usize, usize)) {
    match pieces.last_mut() {
        Some((start, _, before)) if start.checked_add(to_u64(*before)) == Some(host) => {
            *before = before.saturating_add(len);
        }
        _ => pieces.push((host, at, len)),
    }
}

impl Qcow2 {
    /// Stores `bytes`, a whole cluster or the disk's end, at guest offset `offset`:
    /// compressed, if that makes them shorter.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] for other ranges; [`ErrorKind::Unsupported`] for images with
    /// a data file or encryption, which cannot have compressed clusters; I/O errors.
    pub fn write_compressed(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let geometry = self.geometry;
        let span = Span::new(offset, to_u64(bytes.len()));
        let is_whole = span.len == geometry.cluster()
            || (span.len < geometry.cluster() && span.end() == self.size());
        if geometry.within(offset) != 0 || !is_whole {
            return Err(Error::usage(format!(
                "{} bytes are no cluster of {}",
                span.len,
                geometry.cluster()
            ))
            .at(offset));
        }
        if geometry.external || self.cipher.is_some() {
            return Err(Error::unsupported(
                "compressed clusters in an image with a data file or encryption",
            ));
        }
        let mut whole = bytes.to_vec();
        whole.resize(geometry.cluster_len(), 0);
        let mut stream = Vec::new();
        if pack(self.compression(), &whole, &mut stream)? == Encoding::Plain {
            return self.write_at(bytes, offset);
        }
        self.start_writing(span)?;
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        let run = Run { first: geometry.index(offset), count: 1 };
        let mut metadata = self.wait_for(run);
        let len = to_u64(stream.len());
        let host = metadata.allocate_bytes(&self.file, len)?;
        metadata.busy.push(run);
        let reached = self.reach(&metadata);
        drop(metadata);
        let written = reached.and_then(|()| self.writable(offset)?.write_at(&stream, host));
        let mut metadata = self.lock();
        let result = written.and_then(|()| {
            let entry = entry(geometry, host, len).ok_or_else(too_far)?;
            self.own_tables(&mut metadata, run)?;
            let change = Change { cluster: run.first, entry, bitmap: 0, free: true };
            self.replace(&mut metadata, change)
        });
        if result.is_err() {
            // Nothing refers to them: they are free at once. If even that fails, they leak.
            let first = geometry.index(host);
            let last = geometry.index(host.saturating_add(len).saturating_sub(1));
            let count = last.saturating_sub(first).saturating_add(1);
            let _ = metadata.refcounts.release(&self.file, Run { first, count });
        }
        self.end_busy(&mut metadata, run);
        drop(metadata);
        result?;
        self.make_room()
    }

    /// Takes a place for `len` bytes of guest cluster `cluster` and maps it there.
    fn place(
        &self,
        metadata: &mut Metadata,
        cluster: u64,
        len: u64,
        encoding: Encoding,
    ) -> Result<u64> {
        let geometry = self.geometry;
        let (host, entry, bitmap) = match encoding {
            Encoding::Compressed => {
                let host = metadata.allocate_bytes(&self.file, len)?;
                (host, entry(geometry, host, len).ok_or_else(too_far)?, 0)
            }
            Encoding::Plain => {
                let run = metadata.allocate(&self.file, 1)?;
                let host = geometry.offset(run.first);
                (host, host | COPIED, ALL_ALLOCATED)
            }
        };
        self.own_tables(metadata, Run { first: cluster, count: 1 })?;
        self.replace(metadata, Change { cluster, entry, bitmap, free: true })?;
        Ok(host)
    }
}

fn too_far() -> Error {
    Error::new(ErrorKind::NoSpace, "the file is too large for another compressed cluster")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_that_follow_each_other_are_one_write() {
        let mut pieces = Vec::new();
        join(&mut pieces, 1000, (0, 100));
        join(&mut pieces, 1100, (100, 50));
        join(&mut pieces, 65_536, (150, 65_536));
        join(&mut pieces, 1150, (65_686, 10));
        assert_eq!(pieces, [(1000, 0, 150), (65_536, 150, 65_536), (1150, 65_686, 10)]);
    }
}
