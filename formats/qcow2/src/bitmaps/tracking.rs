// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeping enabled bitmaps true while the disk is written.
//!
//! From the first write on they are marked as in use in the file and kept in memory; they
//! are stored when the image is closed. Who is killed in between leaves them inconsistent,
//! which everybody can see.

use super::BitmapContent;
use super::content::Chunk;
use super::directory::{self, AUTO, Directory, Entry, IN_USE, UP_TO_DATE};
use crate::first_cluster::{FirstCluster, field};
use crate::geometry::to_usize;
use crate::header::DATA_FILE;
use crate::image::Qcow2;
use crate::refcounts::to_bytes;
use std::sync::PoisonError;
use tranship_block::{Error, Result, Span, Storage};

/// Autoclear bit 1: the data file alone is a raw disk of the same contents.
pub(crate) const DATA_FILE_RAW: u64 = 1 << 1;

/// Bytes of bits that are kept in memory; further bitmaps are lost.
const MOST_BYTES: u64 = 512 << 20;

/// An enabled bitmap of an image that is being written.
#[derive(Debug)]
struct Tracked {
    name: String,
    content: BitmapContent,
    /// Its table as it is on disk.
    table: Vec<u64>,
}

/// The enabled bitmaps of an open image.
#[derive(Debug, Default)]
pub(crate) struct Tracking(Vec<Tracked>);

impl Tracking {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Marks `span` as written to.
    pub(crate) fn mark(&mut self, span: Span) {
        for bitmap in &mut self.0 {
            bitmap.content.mark(span);
        }
    }
}

impl Qcow2 {
    /// Loads enabled bitmaps and marks them as in use. Returns the autoclear bits that stay
    /// true while the image is written.
    ///
    /// A bitmap that cannot be loaded is left marked as in use: it is of no use any more.
    pub(crate) fn start_tracking(
        &self,
        storage: &dyn Storage,
        tracking: &mut Tracking,
    ) -> Result<u64> {
        let first = FirstCluster::read(storage, &self.header)?;
        let has_data_file = self.header.incompatible_features & DATA_FILE != 0;
        let autoclear = first.u64(field::AUTOCLEAR);
        let kept = if has_data_file { autoclear & DATA_FILE_RAW } else { 0 };
        if autoclear & UP_TO_DATE == 0 {
            return Ok(kept);
        }
        if !tracking.0.is_empty() {
            // Prepared again after lazy reference counts were written: the bits are here.
            return Ok(kept | UP_TO_DATE);
        }
        let Ok(Some(mut directory)) = Directory::read(storage, &first, self.geometry) else {
            // What nobody can read is not up to date.
            return Ok(kept);
        };
        let mut tracked = Vec::new();
        let is_tracked = |entry: &Entry| entry.flags & (AUTO | IN_USE) == AUTO;
        let mut left = MOST_BYTES;
        for entry in directory.entries.iter_mut().filter(|entry| is_tracked(entry)) {
            let bytes = u64::from(entry.table_size).saturating_mul(self.geometry.cluster());
            if let Some(rest) = left.checked_sub(bytes)
                && let Ok((content, table)) = BitmapContent::load(storage, &self.header, entry)
            {
                left = rest;
                tracked.push(Tracked { name: entry.name.clone(), content, table });
            }
            entry.flags |= IN_USE;
        }
        write(storage, &directory)?;
        *tracking = Tracking(tracked);
        Ok(kept | UP_TO_DATE)
    }

    /// Stores the bitmaps that were kept since the first write; nothing is marked any more.
    pub(crate) fn stop_tracking(&self) -> Result<()> {
        // Held to the end: whoever writes next finds them stored, and starts anew.
        let mut tracking = self.tracking.lock().unwrap_or_else(PoisonError::into_inner);
        let tracked = std::mem::take(&mut *tracking);
        let Some(storage) = self.storage.as_ref().filter(|_| !tracked.0.is_empty()) else {
            return Ok(());
        };
        let first = FirstCluster::read(storage, &self.header)?;
        let gone = || Error::corrupt("bitmap directory has gone while the image was open");
        let mut directory = Directory::read(storage, &first, self.geometry)?.ok_or_else(gone)?;
        for bitmap in tracked.0 {
            let entry = directory.entries.iter_mut().find(|entry| entry.name == bitmap.name);
            let entry = entry.ok_or_else(gone)?;
            self.store_bitmap(&**storage, entry, bitmap)?;
            entry.flags &= !IN_USE;
        }
        // Counts, bits and tables have to be there before the marks go.
        self.flush_all()?;
        storage.flush()?;
        write(&**storage, &directory)?;
        self.end_preparation();
        Ok(())
    }

    /// Writes bits over the old ones, which nobody reads while the bitmap is in use.
    fn store_bitmap(&self, storage: &dyn Storage, entry: &Entry, bitmap: Tracked) -> Result<()> {
        let mut table = bitmap.table;
        for (word, chunk) in table.iter_mut().zip(&bitmap.content.chunks) {
            let bits = match chunk {
                Chunk::Bits(bits) => bits,
                // Nothing was marked in it, or everything had been before.
                Chunk::Clear | Chunk::Set => continue,
            };
            if *word == 0 {
                let mut metadata = self.lock();
                let run = metadata.allocate(&self.file, 1)?;
                self.reach(&metadata)?;
                metadata.refcounts.metadata.insert(run.first);
                *word = self.geometry.offset(run.first);
            }
            storage.write_at(bits, *word)?;
        }
        storage.write_at(&to_bytes(&table), entry.table_offset)
    }
}

/// Writes the directory over the old one: only flags have changed.
fn write(storage: &dyn Storage, directory: &Directory) -> Result<()> {
    let bytes = directory::encode(&directory.entries);
    let old = to_usize(directory.size)?;
    if bytes.len() != old {
        return Err(Error::corrupt("bitmap directory has padding where none is expected"));
    }
    storage.write_at(&bytes, directory.offset)?;
    storage.flush()
}
