// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An open image.

use crate::bat::{Bat, Entry, Geometry, State, Subject};
use crate::bitmap::Bitmaps;
use crate::bytes::to_u64;
use crate::journal::Journal;
use crate::locator::ParentLocator;
use crate::overlay::Overlay;
use crate::space::Space;
use crate::structure::{Rules, SALVAGED_LEN, Start, Structure, parent_missing};
use crate::{Guid, replay};
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
    overlay: Option<Arc<Overlay<Arc<dyn BlockDevice>>>>,
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
    creator: String,
    log_state: LogState,
    warnings: Vec<String>,
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
    /// Opens the image in `storage`. A log that has to be replayed is: into the file, or
    /// in memory if `options` asks for reading only.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Denied`] if it needs a parent that was not given,
    /// [`tranship_block::ErrorKind::Unsupported`] if it is of an unknown kind,
    /// [`tranship_block::ErrorKind::Corrupt`] if it contradicts the format, is incomplete,
    /// or the parent is not the one it names.
    pub fn open(storage: Arc<dyn Storage>, options: OpenOptions) -> Result<Self> {
        if options.read_only || options.salvage {
            return Self::open_read_only(storage, options);
        }
        Self::open_for_writing(storage, options, true)
    }

    /// Opens the image in `file` for reading alone: a member of an archive, for example.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_read_only(file: Arc<dyn BlockDevice>, options: OpenOptions) -> Result<Self> {
        let mut warnings = Vec::new();
        let start = Start::read(&file, options.salvage, &mut warnings)?;
        let log_state = match (&start.replay, start.headers.current.log_guid.is_nil()) {
            (Some(_), _) => LogState::ReplayedInMemory,
            (None, true) => LogState::Clean,
            (None, false) => LogState::Lost,
        };
        let file_len = file.size();
        let mut overlay = None;
        let mut contents = file;
        if start.replay.is_some() || options.salvage {
            let len = if options.salvage { SALVAGED_LEN } else { 0 };
            let len = start.replay.as_ref().map_or(len, |replay| replay.last.max(len));
            let mut patched = Overlay::new(contents, len);
            for change in start.replay.iter().flat_map(|replay| &replay.changes) {
                patched.apply(change.clone());
            }
            let patched = Arc::new(patched);
            contents = Arc::<Overlay<_>>::clone(&patched);
            overlay = Some(patched);
        }
        let file_len = if options.salvage { file_len } else { contents.size() };
        let opening = Opening { file: contents, overlay, storage: None, file_len, log_state };
        opening.finish(start, options, true, warnings)
    }

    /// Opens for writing; compaction and repair do without a parent.
    pub(crate) fn open_for_writing(
        storage: Arc<dyn Storage>,
        options: OpenOptions,
        needs_parent: bool,
    ) -> Result<Self> {
        if storage.is_read_only() {
            return Err(Error::usage("image cannot be written: its file is open for reading only"));
        }
        let mut warnings = Vec::new();
        let mut start = Start::read(&storage, false, &mut warnings)?;
        replay::check_place(&start.headers.current, storage.size())?;
        let mut log_state = LogState::Clean;
        if let Some(replay) = &start.replay {
            replay::apply(&*storage, replay)?;
            let file_write = Guid::random()?;
            start.headers.update(&*storage, |header| {
                header.log_guid = Guid::NIL;
                header.file_write = file_write;
            })?;
            log_state = LogState::Replayed;
        }
        let file: Arc<dyn BlockDevice> = Arc::<dyn Storage>::clone(&storage);
        let file_len = storage.size();
        let opening = Opening { file, overlay: None, storage: Some(storage), file_len, log_state };
        opening.finish(start, options, needs_parent, warnings)
    }

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

/// A file on its way to be an image.
struct Opening {
    file: Arc<dyn BlockDevice>,
    overlay: Option<Arc<Overlay<Arc<dyn BlockDevice>>>>,
    storage: Option<Arc<dyn Storage>>,
    /// Bytes that blocks may lie in.
    file_len: u64,
    log_state: LogState,
}

impl Opening {
    fn finish(
        self,
        start: Start,
        options: OpenOptions,
        needs_parent: bool,
        mut warnings: Vec<String>,
    ) -> Result<Vhdx> {
        let structure = Structure::read(&self.file, &start.headers, &mut warnings)?;
        let geometry = structure.geometry;
        let size = structure.metadata.size;
        let parent = match (&structure.metadata.parent, options.parent) {
            (None, Some(_)) => {
                return Err(Error::usage("the image needs no parent, but one was given"));
            }
            (Some(wanted), None) if options.salvage => {
                warnings.push(format!(
                    "{}: what it has reads as zero",
                    parent_missing(wanted).message()
                ));
                None
            }
            (Some(wanted), None) if needs_parent => return Err(parent_missing(wanted)),
            (Some(wanted), Some(parent)) => {
                if !wanted.accepts(parent.data_write_guid) {
                    let text = format!(
                        "parent has data-write GUID {}, expected {}: it was changed, or is \
                         another disk",
                        parent.data_write_guid,
                        wanted.linkage.first().copied().unwrap_or_default()
                    );
                    if !options.salvage {
                        return Err(Error::corrupt(text));
                    }
                    warnings.push(text);
                }
                Some(parent.device)
            }
            (_, None) => None,
        };
        let mut bat = structure.read_bat(&self.file)?;
        let rules =
            Rules { geometry, size, file_len: self.file_len, reserved: structure.reserved() };
        check_bat(&mut bat, &rules, options.salvage, &mut warnings)?;
        let mut table = Table {
            bat,
            bitmaps: Bitmaps::default(),
            space: Space::default(),
            busy: BTreeSet::new(),
            freed: Vec::new(),
        };
        if self.storage.is_some() {
            table.take_stock(&rules)?;
        }
        Ok(Vhdx {
            file: self.file,
            overlay: self.overlay,
            storage: self.storage,
            parent,
            geometry,
            size: AtomicU64::new(size),
            state: Mutex::new(table),
            idle: Condvar::new(),
            in_use: RwLock::new(()),
            journal: Mutex::new(Journal::new(start.headers)),
            prepared: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            original_len: self.file_len,
            creator: start.creator,
            log_state: self.log_state,
            warnings,
            structure,
        })
    }
}

/// Refuses entries that lie; salvage takes them for zeroes instead.
fn check_bat(
    bat: &mut Bat,
    rules: &Rules,
    salvage: bool,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let end = rules.geometry.entries(rules.size);
    loop {
        let mut lost = Vec::new();
        for (index, entry) in bat.entries(end) {
            if let Err(error) = rules.check(bat, index, entry) {
                let at = bat.region.start.saturating_add(index.saturating_mul(8));
                if !salvage {
                    return Err(error.at(at));
                }
                lost.push((index, entry, error.at(at)));
            }
        }
        let mut has_changed = false;
        for (index, entry, error) in lost {
            // A block that is cut keeps what is left of it.
            let is_cut = entry.state() == State::Full && entry.offset() < rules.file_len;
            let is_block = matches!(rules.geometry.subject(index), Subject::Block(_));
            let reads_as = if is_block && is_cut && error.message().ends_with("incomplete") {
                "what is missing reads as zero"
            } else {
                let state = if is_block { State::Undefined } else { State::NotPresent };
                bat.set(index, Entry::new(state, 0));
                has_changed = true;
                "it reads as zero"
            };
            let warning = format!("{error}: {reads_as}");
            if warnings.len() < MOST_WARNINGS && !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
        // Without its sector bitmap, a block that was fine is not.
        if !has_changed {
            return Ok(());
        }
    }
}

/// Warnings that are kept.
const MOST_WARNINGS: usize = 100;

impl Table {
    /// Finds out what is free. Places that dropped blocks still name are given up: their
    /// space is free once the BAT says so on disk.
    fn take_stock(&mut self, rules: &Rules) -> Result<()> {
        let end = rules.geometry.entries(rules.size);
        let mut used = rules.reserved.clone();
        let mut anchored = Vec::new();
        for (index, entry) in self.bat.entries(end) {
            if let Some(place) = rules.place(index, entry) {
                match used.last_mut() {
                    Some(last) if last.end() == place.start => {
                        last.len = last.len.saturating_add(place.len);
                    }
                    _ => used.push(place),
                }
            } else if entry.offset() != 0 {
                anchored.push((index, entry));
            }
        }
        self.space = Space::around(used)?;
        for (index, entry) in anchored {
            let len = match rules.geometry.subject(index) {
                Subject::Block(_) => rules.geometry.block(),
                Subject::Bitmap(_) => crate::bytes::MIB,
            };
            let place = Span::new(entry.offset(), len);
            if place.end() <= rules.file_len && self.space.claim(place) {
                self.freed.push(place);
            }
            self.bat.set(index, Entry::new(entry.state(), 0));
        }
        Ok(())
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
