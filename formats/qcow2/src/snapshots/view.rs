// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reading the disk as a snapshot has kept it.

use super::{find, list};
use crate::first_cluster::field;
use crate::header::Header;
use crate::image::{OpenOptions, Qcow2};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Extent, ExtentKind, Result, Span, Zeroing};

/// Bytes of the file that differ: the fields up to the place of the L1 table.
const CHANGED: usize = 48;

/// A file with another header, which has a snapshot's L1 table as the active one.
#[derive(Debug)]
struct View {
    file: Arc<dyn BlockDevice>,
    start: [u8; CHANGED],
}

impl Qcow2 {
    /// Opens for reading what the snapshot with the identifier or name `wanted` has kept in
    /// the image in `file`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] without such a snapshot; as [`Self::open`].
    pub fn open_snapshot(
        file: Arc<dyn BlockDevice>,
        wanted: &str,
        options: OpenOptions,
    ) -> Result<Self> {
        Self::open_read_only_with(snapshot_view(file, wanted)?, options)
    }
}

/// The file of an image as if its snapshot `wanted` (identifier or name) was the active
/// state; to be opened read-only.
///
/// # Errors
///
/// As [`Qcow2::open_snapshot`].
pub fn snapshot_view(file: Arc<dyn BlockDevice>, wanted: &str) -> Result<Arc<dyn BlockDevice>> {
    let header = Header::read(&file)?;
    let (snapshots, _) = list(&file, &header)?;
    let snapshot = find(&snapshots, wanted).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("image has no snapshot {wanted:?}"))
    })?;
    let mut start = [0; CHANGED];
    file.read_at(&mut start, 0)?;
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(slot) = start.get_mut(at..at.saturating_add(bytes.len())) {
            slot.copy_from_slice(bytes);
        }
    };
    put(field::SIZE, &snapshot.disk_size.unwrap_or(header.size).to_be_bytes());
    put(field::L1_SIZE, &snapshot.l1_size.to_be_bytes());
    put(field::L1_TABLE_OFFSET, &snapshot.l1_table_offset.to_be_bytes());
    Ok(Arc::new(View { file, start }))
}

impl BlockDevice for View {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_at(buf, offset)?;
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, changed) in buf.iter_mut().zip(self.start.get(at..).unwrap_or_default()) {
            *byte = *changed;
        }
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("a snapshot is read-only").at(span.start))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let extent = self.file.extent_at(offset)?;
        Ok(if offset < 512 { Extent::new(ExtentKind::Data, extent.len) } else { extent })
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
