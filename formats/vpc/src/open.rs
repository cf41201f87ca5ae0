// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening an image: what has to be true before anything in it is used.

use crate::bitmaps::{self, Bitmaps, Bits};
use crate::disk::{Body, Vpc};
use crate::footer::{FOOTER, Footer, Found, Kind, MAX_SIZE, SizeSource, find};
use crate::geometry::SECTOR;
use crate::header::{HEADER, Header};
use crate::parent::{self, Parent};
use crate::space::Space;
use crate::sparse::Sparse;
use crate::table::{Layout, Occupied, Table, survey, touches};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};
use tranship_block::{BlockDevice, Error, Result, Span, Storage, is_zero};

/// Blocks whose bitmaps are compared with their data at opening.
const SAMPLED_BLOCKS: usize = 4;
/// Bytes of a sampled block that are looked at.
const SAMPLED_BYTES: u64 = 64 << 10;

/// How an image is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Give what is there of a damaged image: read-only, zeroes for the rest, and a
    /// warning for everything that would be refused otherwise.
    pub salvage: bool,
    /// Which of the footer's sizes counts, whoever made the image.
    pub force_size_calc: Option<SizeSource>,
    /// Take all sectors of a dynamic disk's blocks as present, as QEMU does: for images of
    /// writers that never set bits. Has no effect on differencing disks.
    pub ignore_bitmaps: bool,
    /// The parent of a differencing disk.
    pub parent: Option<Parent>,
}

impl Vpc {
    /// Opens the image in `storage`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if the image contradicts itself, is cut off
    /// or asks for another parent, [`tranship_block::ErrorKind::Usage`] for a differencing
    /// image without parent or a parent for any other, and I/O errors.
    pub fn open(storage: Arc<dyn Storage>, options: OpenOptions) -> Result<Self> {
        let writable = !(options.read_only || options.salvage || storage.is_read_only());
        let file: Arc<dyn BlockDevice> = storage.clone();
        open(file, writable.then_some(storage), options)
    }

    /// Opens the image in `file` for reading.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_read_only(file: Arc<dyn BlockDevice>, options: OpenOptions) -> Result<Self> {
        open(file, None, options)
    }
}

fn open(
    file: Arc<dyn BlockDevice>,
    storage: Option<Arc<dyn Storage>>,
    options: OpenOptions,
) -> Result<Vpc> {
    let mut found = find(&file, options.salvage)?;
    let size = found.footer.virtual_size(options.force_size_calc);
    let mut warnings = std::mem::take(&mut found.warnings);
    if options.parent.is_some() && found.footer.kind != Kind::Differencing {
        return Err(Error::usage("the disk is not differencing, but a parent was given"));
    }
    let body = if found.footer.kind == Kind::Fixed {
        fixed(&file, &found, size, options.salvage, &mut warnings)?
    } else {
        if storage.is_some() {
            refuse_batmap(&file, &Header::read(&file, &found.footer, false)?)?;
        }
        Body::Sparse(Box::new(sparse(file.clone(), &found, size, options, &mut warnings)?))
    };
    Ok(Vpc::new(file, storage, found.footer, size, body, warnings))
}

fn fixed(
    file: &dyn BlockDevice,
    found: &Found,
    size: u64,
    salvage: bool,
    warnings: &mut Vec<String>,
) -> Result<Body> {
    let stored = found.end.unwrap_or_else(|| file.size());
    if stored < size {
        let text = format!(
            "fixed disk has {size} bytes, but the file has {stored} in front of the footer"
        );
        if !salvage {
            return Err(Error::corrupt(text).at(stored));
        }
        warnings.push(format!("{text}: the rest reads as zero"));
    }
    let product = found.footer.geometry.bytes();
    if stored > size.max(found.footer.current_size) {
        warnings.push(format!(
            "the file has {stored} bytes in front of the footer, more than the {size} bytes of \
             the disk: the rest is left out"
        ));
    } else if stored > size {
        warnings.push(format!(
            "the geometry {} gives {product} bytes and hides {} that the file has: \
             force_size_calc=current_size shows them",
            found.footer.geometry,
            stored.saturating_sub(size)
        ));
    }
    Ok(Body::Fixed { stored: stored.min(size) })
}

/// The parts of a file of `file_size` bytes that are neither blocks nor the footer at the
/// end.
pub(crate) fn metadata(
    file_size: u64,
    header: &Header,
    footer: &Footer,
) -> Vec<(Span, &'static str)> {
    let len = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
    let table = u64::from(header.max_entries).saturating_mul(4).next_multiple_of(SECTOR);
    let mut parts = vec![
        (Span::new(0, len(FOOTER)), "copy of the footer"),
        (Span::new(footer.data_offset, len(HEADER)), "dynamic header"),
        (Span::new(header.table_offset, table), "block allocation table"),
    ];
    let is_child = footer.kind == Kind::Differencing;
    let locators = header.locators.iter().filter(|locator| is_child && locator.code != [0; 4]);
    let names = locators.map(|locator| {
        let space = u64::from(locator.len).next_multiple_of(SECTOR);
        (Span::new(locator.offset, space), "name of the parent")
    });
    parts.extend(names.filter(|(span, _)| span.check_within(file_size).is_ok()));
    parts
}

/// Checks that the parts in `metadata` that are written do not lie on each other.
pub(crate) fn check_metadata(metadata: &[(Span, &str)]) -> Result<()> {
    // The names of the parent are never written.
    let written = metadata.get(..3).unwrap_or(metadata);
    for (number, (other, second)) in written.iter().enumerate() {
        let before = written.iter().take(number).find(|(one, _)| touches(*one, *other));
        if let Some((_, first)) = before {
            return Err(Error::corrupt(format!("{second} lies on the {first}")).at(other.start));
        }
    }
    Ok(())
}

/// Where blocks have to end: at the footer, or at the end of a file without one.
pub(crate) fn limit(file: &dyn BlockDevice, found: &Found) -> u64 {
    found.end.unwrap_or_else(|| file.size())
}

pub(crate) fn check_size(size: u64) -> Result<()> {
    if size > MAX_SIZE {
        return Err(Error::unsupported(format!(
            "disk has {size} bytes, expected at most {MAX_SIZE} (2040 GiB)"
        )));
    }
    Ok(())
}

fn sparse(
    file: Arc<dyn BlockDevice>,
    found: &Found,
    size: u64,
    options: OpenOptions,
    warnings: &mut Vec<String>,
) -> Result<Sparse> {
    let salvage = options.salvage;
    check_size(size)?;
    let mut header = Header::read(&file, &found.footer, salvage)?;
    warnings.append(&mut header.warnings);
    header.check(file.size(), size, salvage)?;
    let layout = Layout::new(&header, found.footer.data_offset);
    let is_differencing = found.footer.kind == Kind::Differencing;
    if is_differencing {
        warnings.extend(parent::check(&header, options.parent.as_ref(), salvage)?);
    }
    let mut table = Table::read(&file, &header, size)?;
    let metadata = metadata(file.size(), &header, &found.footer);
    if let Err(error) = check_metadata(&metadata) {
        if !salvage {
            return Err(error);
        }
        warnings.push(error.to_string());
    }
    let occupied = survey(&table, &layout, size, &metadata, limit(&file, found));
    for fault in &occupied.faults {
        if !salvage {
            return Err(Error::corrupt(fault.text.clone()).at(layout.entry_at(fault.index)));
        }
        table.ignore(fault.index);
    }
    if let Some(first) = occupied.faults.first() {
        let count = occupied.faults.len();
        warnings.push(format!("{count} blocks read as zero, the first because {}", first.text));
    }
    let space = Space::new(&occupied, &layout, &metadata, found.end);
    let bitmaps = Bitmaps::new(options.ignore_bitmaps && !is_differencing);
    if !is_differencing && !bitmaps.is_ignored() {
        warnings.extend(doubt(&file, &layout, &bitmaps, &occupied)?);
    }
    Ok(Sparse {
        file,
        layout,
        is_differencing,
        parent: options.parent.map(|parent| parent.device),
        header: Mutex::new(header),
        is_stale: AtomicBool::new(found.is_stale),
        flushing: Mutex::default(),
        bitmaps,
        space: Mutex::new(space),
        table: RwLock::new(table),
    })
}

/// XenServer keeps a map of full blocks behind the table, of which the specification knows
/// nothing: writing here would make it wrong, and XenServer believes it.
fn refuse_batmap(file: &dyn BlockDevice, header: &Header) -> Result<()> {
    let table = u64::from(header.max_entries).saturating_mul(4).next_multiple_of(SECTOR);
    let at = header.table_offset.saturating_add(table);
    let mut cookie = [0; 8];
    if Span::new(at, 8).check_within(file.size()).is_ok() {
        file.read_at(&mut cookie, at)?;
    }
    if cookie == *b"tdbatmap" {
        return Err(Error::unsupported(
            "the image has a map of full blocks that only XenServer can keep: it can be read, but \
             not written",
        )
        .at(at));
    }
    Ok(())
}

/// Looks at a few blocks of a dynamic disk for data in sectors that count as not written.
/// Whoever never sets bits leaves them clear in every block.
fn doubt(
    file: &dyn BlockDevice,
    layout: &Layout,
    bitmaps: &Bitmaps,
    occupied: &Occupied,
) -> Result<Option<String>> {
    for (entry, index) in occupied.blocks.iter().take(SAMPLED_BLOCKS) {
        let Bits::Some(bits) = bitmaps.get(file, layout, *entry)? else { continue };
        let (mut sector, sectors) = (0, layout.block / SECTOR);
        let mut budget = SAMPLED_BYTES;
        while sector < sectors && budget > 0 {
            let (is_here, end) = bitmaps::run(&bits, sector, sectors);
            let at = layout.data_at(*entry).saturating_add(sector.saturating_mul(SECTOR));
            let len = end.saturating_sub(sector).saturating_mul(SECTOR).min(budget);
            let len = len.min(file.size().saturating_sub(at));
            sector = end;
            if is_here || len == 0 {
                continue;
            }
            budget = budget.saturating_sub(len);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            file.read_at(&mut bytes, at)?;
            if !is_zero(&bytes) {
                return Ok(Some(format!(
                    "block {index} has data in sectors whose bits are clear: they read as zero, \
                     unless ignore_bitmaps is set"
                )));
            }
        }
    }
    Ok(None)
}
