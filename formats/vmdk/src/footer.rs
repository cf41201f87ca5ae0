// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Markers: how streams name their own parts, and finding the footer among them.

use crate::SECTOR;
use crate::header::{self, HEADER_LEN, MAGIC};
use crate::layout::Layout;
use tranship_block::{BlockDevice, Error, LittleEndian, Result};

/// Bytes at the end of a file in which the footer is looked for at once.
const TAIL: u64 = 4 << 20;
/// Bytes that a scan reads at a time.
const WINDOW: u64 = 1 << 20;
/// Grains that a scan keeps in mind: 4 TiB of 64 KiB grains, 512 MiB of memory.
const MOST_GRAINS: usize = 64 << 20;

/// Bytes of a grain marker: u64 sector, u32 size.
pub(crate) const MARKER: u64 = 12;
/// Metadata marker in front of nothing: the stream ends.
pub(crate) const END_OF_STREAM: u32 = 0;
/// Metadata marker in front of a grain table.
pub(crate) const GRAIN_TABLE: u32 = 1;
/// Metadata marker in front of the grain directory.
pub(crate) const GRAIN_DIRECTORY: u32 = 2;
/// Metadata marker in front of the footer.
pub(crate) const FOOTER: u32 = 3;

/// The footer of a stream: 1024 bytes before the end if nothing follows the end-of-stream
/// marker, further in front if a tar or a download left padding behind it.
pub(crate) fn find(file: &dyn BlockDevice, header: &Layout) -> Result<Option<Layout>> {
    for window in [3 * SECTOR, TAIL] {
        let end = (file.size() / SECTOR).saturating_mul(SECTOR);
        let start = end.saturating_sub(window);
        let len = end.saturating_sub(start);
        let mut tail = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(&mut tail, start)?;
        let (sectors, _) = tail.as_chunks::<HEADER_LEN>();
        for pair in sectors.windows(2).rev() {
            let [marker, candidate] = pair else { continue };
            if is_footer_marker(marker) && candidate.starts_with(MAGIC) {
                return checked(candidate, start).map(Some);
            }
        }
    }
    Ok(scan(file, header, false)?.footer)
}

fn checked(footer: &[u8], at: u64) -> Result<Layout> {
    let found = header::parse(footer)?;
    if found.directory.is_none() {
        return Err(Error::corrupt("the footer names no grain directory").at(at));
    }
    Ok(found)
}

fn is_footer_marker(sector: &[u8]) -> bool {
    let fields = LittleEndian(sector, "marker");
    matches!((fields.u32("size", 8), fields.u32("type", 12)), (Ok(0), Ok(FOOTER)))
}

/// What the markers of a stream tell.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Number and sector of every grain, in the order of the guest.
    pub(crate) grains: Vec<(u32, u32)>,
    /// The footer, if the scan came to it.
    pub(crate) footer: Option<Layout>,
    /// Whether the stream goes on to its directory: no grain is missing at its end.
    pub(crate) complete: bool,
    /// Where the scan ended.
    pub(crate) end: u64,
}

/// Walks the markers of a stream from its first grain to its end, or to where they stop
/// making sense; `keep` the grains, or look for the footer alone.
pub(crate) fn scan(file: &dyn BlockDevice, header: &Layout, keep: bool) -> Result<Scan> {
    let mut found = Scan::default();
    let mut window = Window { file, bytes: Vec::new(), start: 0 };
    // Padding in front of the first marker is zero and would look like the end.
    let mut at = header.overhead.max(SECTOR);
    while let Some(sector) = window.sector(at)? {
        let fields = LittleEndian(sector, "marker");
        let (value, size) = (fields.u64("val", 0)?, u64::from(fields.u32("size", 8)?));
        let body = at.saturating_add(SECTOR);
        let next = if size > 0 {
            let per_grain = header.grain.get() / SECTOR;
            let number = value.checked_div(per_grain).unwrap_or(0);
            let whole = value.checked_rem(per_grain) == Some(0) && number < header.grains();
            let end = at.saturating_add(MARKER).saturating_add(size);
            if !whole || size > crate::compressed::max_stored(header) || end > file.size() {
                break;
            }
            let (Ok(grain), Ok(sector)) = (u32::try_from(number), u32::try_from(at / SECTOR))
            else {
                break;
            };
            if keep {
                if found.grains.len() >= MOST_GRAINS {
                    return Err(Error::unsupported(format!(
                        "the stream has more than {MOST_GRAINS} grains and no directory"
                    )));
                }
                found.grains.push((grain, sector));
            }
            end.div_ceil(SECTOR).saturating_mul(SECTOR)
        } else {
            match fields.u32("type", 12)? {
                GRAIN_TABLE => body.saturating_add(value.saturating_mul(SECTOR)),
                GRAIN_DIRECTORY => {
                    found.complete = true;
                    body.saturating_add(value.saturating_mul(SECTOR))
                }
                FOOTER => {
                    found.complete = true;
                    if let Some(candidate) = window.sector(body)? {
                        found.footer = checked(candidate, body).ok();
                    }
                    body.saturating_add(SECTOR)
                }
                _ => break,
            }
        };
        at = next;
    }
    found.end = at;
    // Of a grain that is there twice the later one counts, as for a reader of the stream.
    found.grains.reverse();
    found.grains.sort_by_key(|(grain, _)| *grain);
    found.grains.dedup_by_key(|(grain, _)| *grain);
    Ok(found)
}

/// A piece of the file, so that markers close to each other cost one read.
struct Window<'a> {
    file: &'a dyn BlockDevice,
    bytes: Vec<u8>,
    start: u64,
}

impl Window<'_> {
    fn sector(&mut self, at: u64) -> Result<Option<&[u8]>> {
        let size = self.file.size();
        if at.saturating_add(SECTOR) > size {
            return Ok(None);
        }
        let held = u64::try_from(self.bytes.len()).unwrap_or(0);
        let end = self.start.saturating_add(held);
        if at < self.start || at.saturating_add(SECTOR) > end {
            let len = size.saturating_sub(at).min(WINDOW);
            self.bytes.resize(usize::try_from(len).unwrap_or(0), 0);
            self.file.read_at(&mut self.bytes, at)?;
            self.start = at;
        }
        let from = usize::try_from(at.saturating_sub(self.start)).unwrap_or(usize::MAX);
        Ok(self.bytes.get(from..).and_then(|tail| tail.get(..HEADER_LEN)))
    }
}
