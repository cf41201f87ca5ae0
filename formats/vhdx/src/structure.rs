// SPDX-License-Identifier: Apache-2.0 OR MIT
//! All that a file says about itself, apart from its BAT.

use crate::bat::{Bat, Entry, Geometry, State, Subject};
use crate::bytes::{MIB, mib_up};
use crate::header::{Headers, read_creator};
use crate::locator::ParentLocator;
use crate::log::Replay;
use crate::metadata::Metadata;
use crate::overlay::Overlay;
use crate::region::{Regions, check_apart};
use crate::replay;
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Span};

/// Size that salvage assumes for a file that was cut: more than any image has.
pub(crate) const SALVAGED_LEN: u64 = 80 << 40;

/// What can be read before the log is replayed.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) creator: String,
    pub(crate) headers: Headers,
    pub(crate) replay: Option<Replay>,
}

impl Start {
    /// With `salvage`, a lost log and lost headers become warnings.
    pub(crate) fn read(
        file: &dyn BlockDevice,
        salvage: bool,
        warnings: &mut Vec<String>,
    ) -> Result<Self> {
        let creator = read_creator(file)?;
        let headers = match Headers::read(file) {
            Err(error) if salvage => Headers::lost(error.to_string()),
            other => other?,
        };
        warnings.extend(headers.damage.iter().cloned());
        let replay = match replay::find(file, &headers.current) {
            Err(error) if salvage => {
                warnings.push(format!("changes in the log are lost: {error}"));
                None
            }
            other => other?,
        };
        Ok(Self { creator, headers, replay })
    }
}

/// What can be read afterwards.
#[derive(Debug)]
pub(crate) struct Structure {
    pub(crate) regions: Regions,
    pub(crate) metadata: Metadata,
    pub(crate) geometry: Geometry,
    /// The log, if there is a place for it.
    pub(crate) log: Span,
}

impl Structure {
    pub(crate) fn read(
        file: &dyn BlockDevice,
        headers: &Headers,
        warnings: &mut Vec<String>,
    ) -> Result<Self> {
        let regions = Regions::read(file)?;
        warnings.extend(regions.damage.iter().cloned());
        let log = headers.current.log.span();
        let log_and_header = [Span::new(0, MIB), log].into_iter().filter(|span| !span.is_empty());
        check_apart(log_and_header.chain(regions.spans()))?;
        let metadata = Metadata::read(file, regions.metadata)
            .map_err(|error| error.at(regions.metadata.start))?;
        let geometry =
            Geometry::new(metadata.block_size, metadata.logical_sector, metadata.parent.is_some());
        Ok(Self { regions, metadata, geometry, log })
    }

    pub(crate) fn read_bat(&self, file: &dyn BlockDevice) -> Result<Bat> {
        Bat::read(file, self.regions.bat, self.geometry.entries(self.metadata.size))
    }

    /// Everything in the file that is no block.
    pub(crate) fn reserved(&self) -> Vec<Span> {
        let mut spans = vec![Span::new(0, MIB), self.log];
        spans.extend(self.regions.spans());
        spans.retain(|span| !span.is_empty());
        for span in &mut spans {
            span.len = mib_up(span.len);
        }
        spans.sort_by_key(|span| span.start);
        spans
    }
}

/// What an entry of the BAT has to keep to.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) geometry: Geometry,
    /// Virtual size.
    pub(crate) size: u64,
    pub(crate) file_len: u64,
    /// Sorted and apart.
    pub(crate) reserved: Vec<Span>,
}

impl Rules {
    /// Bytes of the file that `entry` needs, if it stores anything.
    pub(crate) fn place(&self, index: u64, entry: Entry) -> Option<Span> {
        let len = match self.geometry.subject(index) {
            Subject::Block(_) => self.geometry.block(),
            Subject::Bitmap(_) => MIB,
        };
        entry.is_stored().then(|| Span::new(entry.offset(), len))
    }

    /// Checks entry `index` of `bat`.
    pub(crate) fn check(&self, bat: &Bat, index: u64, entry: Entry) -> Result<()> {
        let subject = self.geometry.subject(index);
        let used = match subject {
            Subject::Block(block) => {
                let left = self.size.saturating_sub(self.geometry.offset(block));
                left.min(self.geometry.block())
            }
            Subject::Bitmap(_) => MIB,
        };
        let corrupt = |text: String| {
            Err(Error::corrupt(match subject {
                Subject::Block(block) => format!("block {block} {text}"),
                Subject::Bitmap(chunk) => format!("sector bitmap {chunk} {text}"),
            }))
        };
        match (entry.state(), subject) {
            (State::Invalid, _) => {
                return corrupt(format!("has the reserved state {}", entry.0 & 7));
            }
            (State::NotPresent | State::Full, Subject::Bitmap(_)) => {}
            (_, Subject::Bitmap(_)) => {
                return corrupt(format!("has state {}, expected 0 or 6", entry.0 & 7));
            }
            (State::Partial, Subject::Block(block)) => {
                let bitmap = bat.get(self.geometry.bitmap_entry(self.geometry.chunk(block)));
                if !self.geometry.has_parent || bitmap.state() != State::Full {
                    return corrupt(
                        "is partially present, but no sector bitmap says where".to_owned(),
                    );
                }
            }
            _ => {}
        }
        let Some(place) = self.place(index, entry) else { return Ok(()) };
        let before = self.reserved.partition_point(|span| span.start < place.end());
        let neighbour = before.checked_sub(1).and_then(|last| self.reserved.get(last));
        if neighbour.is_some_and(|span| span.end() > place.start) {
            return corrupt(format!(
                "lies at {:#x}, where the image has its own structures",
                place.start
            ));
        }
        // The last block of a disk by QEMU may be cut where the disk ends.
        if place.start.saturating_add(used) > self.file_len {
            return corrupt(format!(
                "of {used} bytes at {:#x} ends past the file's {} bytes: the image is incomplete",
                place.start, self.file_len
            ));
        }
        Ok(())
    }
}

/// What the image in `file` says about its parent; nothing if it needs none.
///
/// This is read before the image is opened, since the caller has to find and open the
/// parent. Changes that wait in the log are taken into account, and nothing is written.
///
/// # Errors
///
/// As [`crate::Vhdx::open`].
pub fn read_parent(file: &dyn BlockDevice) -> Result<Option<ParentLocator>> {
    let mut ignored = Vec::new();
    let start = Start::read(file, false, &mut ignored)?;
    let mut overlay = Overlay::new(file, start.replay.as_ref().map_or(0, |replay| replay.last));
    for change in start.replay.into_iter().flat_map(|replay| replay.changes) {
        overlay.apply(change);
    }
    let structure = Structure::read(&overlay, &start.headers, &mut ignored)?;
    Ok(structure.metadata.parent)
}

/// The data-write GUID of the image in `file`: what a child has to name as its linkage.
///
/// # Errors
///
/// [`ErrorKind::Corrupt`] if the file is no VHDX image or both headers are damaged.
pub fn read_data_write_guid(file: &dyn BlockDevice) -> Result<crate::Guid> {
    read_creator(file)?;
    Ok(Headers::read(file)?.current.data_write)
}

/// The error for a differencing image that is opened without its parent.
pub(crate) fn parent_missing(parent: &ParentLocator) -> Error {
    let name = parent.names.first().map_or("without a name", |name| name.name.as_str());
    Error::new(ErrorKind::Denied, format!("the image needs parent {name:?}, which was not given"))
}
