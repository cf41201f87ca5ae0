// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening an image: replaying its log, finding its parent, taking stock of its blocks.

use crate::Guid;
use crate::bat::{Bat, Entry, State, Subject};
use crate::bitmap::Bitmaps;
use crate::image::{LogState, OpenOptions, Table, Vhdx};
use crate::journal::Journal;
use crate::overlay::Overlay;
use crate::replay;
use crate::space::Space;
use crate::structure::{Rules, SALVAGED_LEN, Start, Structure, parent_missing};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use tranship_block::{BlockDevice, Error, Result, Span, Storage};

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
