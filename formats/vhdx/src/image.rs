// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An open image.

use crate::Guid;
use crate::bat::{Bat, Geometry};
use crate::bitmap::Bitmaps;
use crate::bytes::to_u64;
use crate::journal::Journal;
use crate::locator::ParentLocator;
use crate::overlay::Overlay;
use crate::space::Space;
use crate::structure::Structure;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use tranship_block::{BlockDevice, Error, Extent, Result, Span, Storage, Zeroing};

/// How an image is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Refuse writes, and touch nothing of the file.
    pub read_only: bool,
    /// Give what is there of a damaged image, with warnings, and zeroes for the rest.
    /// The image is then read-only.
    pub salvage: bool,
    /// The disk below a differencing one; [`crate::read_parent`] tells which.
    pub parent: Option<Parent>,
}

/// The disk that a differencing one is based on.
#[derive(Clone, Debug)]
pub struct Parent {
    /// The parent's bytes.
    pub device: Arc<dyn BlockDevice>,
    /// The data-write GUID of the parent's image, which the child's linkage must name.
    pub data_write_guid: Guid,
}

/// What kind of disk it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subformat {
    /// All blocks have their place from the start and keep it.
    Fixed,
    /// Blocks get their place when they are written.
    Dynamic,
    /// As dynamic, based on a parent.
    Differencing,
}

/// What was found in the log when the image was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogState {
    /// Nothing: the image was closed cleanly.
    Clean,
    /// Changes, which are now in the file.
    Replayed,
    /// Changes, which are applied in memory while the image is open for reading.
    ReplayedInMemory,
    /// Changes that could not be read; salvage goes on without them.
    Lost,
}

/// The disk inside a VHDX image.
///
/// Any number of threads may use it at once. Writes are durable after
/// [`BlockDevice::flush`]; dropping it empties the log, but reports no errors.
#[derive(Debug)]
pub struct Vhdx {
    /// What is read: the storage, or a file with an overlay.
    pub(crate) file: Arc<dyn BlockDevice>,
    /// The overlay alone, which knows what is not where the file has it.
    pub(crate) overlay: Option<Arc<Overlay<Arc<dyn BlockDevice>>>>,
    /// The same file, if it may be changed.
    pub(crate) storage: Option<Arc<dyn Storage>>,
    pub(crate) parent: Option<Arc<dyn BlockDevice>>,
    pub(crate) structure: Structure,
    pub(crate) geometry: Geometry,
    /// Virtual size.
    pub(crate) size: AtomicU64,
    pub(crate) state: Mutex<Table>,
    /// A block has left [`Table::busy`].
    pub(crate) idle: Condvar,
    /// Held for reading while payload moves, so that no freed block is given to somebody
    /// else under a reader's feet; taken before every other lock.
    pub(crate) in_use: RwLock<()>,
    /// Held while metadata is written; taken before [`Self::state`].
    pub(crate) journal: Mutex<Journal>,
    /// The headers say that somebody writes.
    pub(crate) prepared: AtomicBool,
    /// Writing metadata failed: what is on disk is consistent, but not what was promised.
    pub(crate) failed: AtomicBool,
    /// Length of the file when it was opened: a fixed disk keeps it.
    pub(crate) original_len: u64,
    pub(crate) creator: String,
    pub(crate) log_state: LogState,
    pub(crate) warnings: Vec<String>,
}

/// What maps the guest's blocks to the file.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) bat: Bat,
    pub(crate) bitmaps: Bitmaps,
    pub(crate) space: Space,
    /// Blocks that are being filled.
    pub(crate) busy: BTreeSet<u64>,
    /// Space that nothing refers to any more once the changes of the BAT are durable.
    pub(crate) freed: Vec<Span>,
}

impl Vhdx {
    /// What the user should know, each a sentence without a full stop.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Which program made the file, as it says.
    pub fn creator(&self) -> &str {
        &self.creator
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u32 {
        self.structure.metadata.block_size
    }

    /// Physical sector size in bytes that the guest sees: 512 or 4096.
    pub fn physical_sector_size(&self) -> u32 {
        self.structure.metadata.physical_sector
    }

    /// What kind of disk it is.
    pub fn subformat(&self) -> Subformat {
        match (&self.structure.metadata.parent, self.structure.metadata.leave_allocated) {
            (Some(_), _) => Subformat::Differencing,
            (None, true) => Subformat::Fixed,
            (None, false) => Subformat::Dynamic,
        }
    }

    /// What was found in the log when the image was opened.
    pub fn log_state(&self) -> LogState {
        self.log_state
    }

    /// The id of the virtual disk, which the guest sees as SCSI page 83.
    pub fn disk_id(&self) -> Guid {
        self.structure.metadata.disk_id
    }

    /// What a child has to name as its linkage. It changes with the first write after
    /// opening.
    pub fn data_write_guid(&self) -> Guid {
        self.journal().headers.current.data_write
    }

    /// What the image says about its parent.
    pub fn parent_locator(&self) -> Option<&ParentLocator> {
        self.structure.metadata.parent.as_ref()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Table> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn writable(&self, at: u64) -> Result<&dyn Storage> {
        self.storage.as_deref().ok_or_else(|| Error::usage("device is read-only").at(at))
    }

    /// Whether blocks keep their place whatever happens.
    pub(crate) fn is_fixed(&self) -> bool {
        self.structure.metadata.leave_allocated
    }

    /// Whether the file itself has these bytes, not only what is in front of it.
    pub(crate) fn is_in_file(&self, span: Span) -> bool {
        self.overlay.as_ref().is_none_or(|overlay| overlay.is_untouched(span))
    }
}

impl BlockDevice for Vhdx {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn is_read_only(&self) -> bool {
        self.storage.is_none()
    }

    /// Blocks are large, but I/O in much smaller pieces costs no more.
    fn preferred_block(&self) -> u32 {
        64 << 10
    }

    fn sector_size(&self) -> u32 {
        self.structure.metadata.logical_sector
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        Span::new(offset, to_u64(buf.len())).check_within(self.size())?;
        self.read_payload(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.start_writing(offset)?;
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        Span::new(offset, to_u64(buf.len())).check_within(self.size())?;
        self.write_payload(crate::write::Payload::Bytes(buf), offset)
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.start_writing(span.start)?;
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        span.check_within(self.size())?;
        self.zero(span, mode)
    }

    /// Whole blocks read as zero afterwards and give their space back; parts of blocks,
    /// and fixed disks, stay as they are.
    fn discard(&self, span: Span) -> Result<()> {
        self.start_writing(span.start)?;
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        span.check_within(self.size())?;
        self.discard_blocks(span);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        Span::new(offset, 1).check_within(self.size())?;
        self.extent(offset)
    }

    fn flush(&self) -> Result<()> {
        self.flush_all()
    }
}

impl Drop for Vhdx {
    fn drop(&mut self) {
        // Errors have nobody to go to here: who needs to know calls flush first. What a
        // failure leaves behind is a log that the next one who opens the image replays.
        let _ = self.close();
    }
}
