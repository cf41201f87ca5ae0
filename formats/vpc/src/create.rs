// SPDX-License-Identifier: Apache-2.0 OR MIT
//! New images.

use crate::footer::{FOOTER, Footer, Kind, MAX_SIZE, RESERVED};
use crate::geometry::{Geometry, SECTOR};
use crate::header::{HEADER, Header, LOCATORS, Locator, MOST_ENTRIES};
use crate::parent::LONGEST_NAME;
use std::time::{Duration, SystemTime};
use tranship_block::{Error, Result, Storage};

/// Start of 2000 in seconds after that of 1970.
const EPOCH: u64 = 946_684_800;
const MIB: u64 = 1 << 20;
/// Smallest disk that Azure takes.
const AZURE_LEAST: u64 = 20 * MIB;
/// Largest disk that Azure takes: 4095 GiB.
const AZURE_MOST: u64 = 4095 << 30;
/// Bytes of the table that one write stores.
const PIECE: usize = 1 << 20;

/// What size a new disk gets, and who believes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sizing {
    /// Raised until a geometry holds it, as `qemu-img` does: every reader agrees about
    /// the size. Creator `qemu`.
    #[default]
    Geometry,
    /// As asked for, in whole sectors, with the geometry that stands for no geometry:
    /// `qemu-img -o force_size`. Creator `qem2`.
    Exact,
    /// Raised to whole MiB and to 20 MiB at least, for fixed disks that Azure takes.
    Azure,
}

/// What a differencing disk says about its parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewParent {
    /// Unique id in the parent's footer.
    pub unique_id: [u8; 16],
    /// When the parent was last changed, in seconds since 2000.
    pub timestamp: u32,
    /// Its name relative to the folder of the child.
    pub relative: Option<String>,
    /// Its full name.
    pub absolute: Option<String>,
}

/// What a new image is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, at least; see [`Self::virtual_size`].
    pub size: u64,
    /// How the disk is stored.
    pub kind: Kind,
    /// How the size is rounded.
    pub sizing: Sizing,
    /// Bytes of a block, a power of two; 2 MiB is what every reader takes.
    pub block_size: u32,
    /// The parent of a differencing disk.
    pub parent: Option<NewParent>,
    /// Names the image: its children refer to it.
    pub unique_id: [u8; 16],
    /// Seconds since the start of 2000.
    pub timestamp: u32,
}

impl CreateOptions {
    /// A dynamic disk of `size` bytes with blocks of 2 MiB, a random id and the time of
    /// now.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            kind: Kind::Dynamic,
            sizing: Sizing::Geometry,
            block_size: 2 << 20,
            parent: None,
            unique_id: random_id(),
            timestamp: timestamp(SystemTime::now()),
        }
    }

    /// A disk of exactly `size` bytes that holds the differences to `parent`.
    pub fn differencing(size: u64, parent: NewParent) -> Self {
        Self {
            kind: Kind::Differencing,
            sizing: Sizing::Exact,
            parent: Some(parent),
            ..Self::new(size)
        }
    }

    /// Bytes that the disk is going to have.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] for sizes that the format, or Azure, does not
    /// take.
    pub fn virtual_size(&self) -> Result<u64> {
        let (most, size) = match self.sizing {
            Sizing::Azure => {
                let size = self.size.max(AZURE_LEAST);
                (AZURE_MOST, size.checked_next_multiple_of(MIB).unwrap_or(u64::MAX))
            }
            Sizing::Exact | Sizing::Geometry => {
                (MAX_SIZE, self.size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX))
            }
        };
        if size > most {
            return Err(Error::usage(format!(
                "disk would have {size} bytes, expected at most {most}"
            )));
        }
        Ok(if self.sizing == Sizing::Geometry {
            size.max(self.geometry(size).bytes_unless_full())
        } else {
            size
        })
    }

    fn geometry(&self, size: u64) -> Geometry {
        match self.sizing {
            Sizing::Geometry => Geometry::holding(size),
            Sizing::Exact | Sizing::Azure => Geometry::MAX,
        }
    }

    fn check(&self) -> Result<()> {
        if !self.block_size.is_power_of_two() || u64::from(self.block_size) < SECTOR {
            return Err(Error::usage(format!(
                "block size is {}, expected a power of two of at least 512",
                self.block_size
            )));
        }
        if self.sizing == Sizing::Azure && self.kind != Kind::Fixed {
            return Err(Error::usage("Azure takes fixed disks only"));
        }
        if self.parent.is_some() != (self.kind == Kind::Differencing) {
            return Err(Error::usage("differencing disks have a parent, and no others have"));
        }
        Ok(())
    }

    fn footer(&self, size: u64) -> Footer {
        let (creator, creator_version) = match self.sizing {
            Sizing::Geometry => (*b"qemu", 0x0005_0003),
            Sizing::Exact => (*b"qem2", 0x0005_0003),
            // Unknown to everybody; the geometry makes all of them take the other size.
            Sizing::Azure => (*b"trns", 0x0001_0000),
        };
        let first = u64::try_from(FOOTER).unwrap_or(SECTOR);
        Footer {
            features: 2,
            data_offset: if self.kind == Kind::Fixed { u64::MAX } else { first },
            timestamp: self.timestamp,
            creator,
            creator_version,
            creator_host: *b"Wi2k",
            original_size: size,
            current_size: size,
            geometry: self.geometry(size),
            kind: self.kind,
            unique_id: self.unique_id,
            saved_state: false,
            reserved: vec![0; RESERVED],
        }
    }
}

impl Geometry {
    fn bytes_unless_full(self) -> u64 {
        if self == Self::MAX { 0 } else { self.bytes() }
    }
}

/// Makes a new image in `storage`, which loses what it has. The footers come last, so
/// that an interrupted creation is no image.
///
/// Space for a fixed disk is only reserved if the caller zeroes it with
/// [`tranship_block::Zeroing::KeepAllocated`] before or afterwards.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Usage`] for options that contradict each other or the
/// format, [`tranship_block::ErrorKind::Unsupported`] for storage of fixed length, and
/// I/O errors.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    options.check()?;
    let size = options.virtual_size()?;
    let footer = options.footer(size);
    let bytes = footer.to_bytes();
    storage.set_len(0)?;
    if storage.size() != 0 {
        return Err(Error::unsupported(
            "a VHD cannot be made on a block device: its footer has to be at the end",
        ));
    }
    if options.kind == Kind::Fixed {
        storage.set_len(size.saturating_add(SECTOR))?;
        storage.write_at(&bytes, size)?;
        return storage.flush();
    }
    let end = write_tables(storage, options, size)?;
    storage.flush()?;
    storage.write_at(&bytes, end)?;
    storage.write_at(&bytes, 0)?;
    storage.flush()
}

/// Writes header, names and table; returns where the footer at the end belongs.
fn write_tables(storage: &dyn Storage, options: &CreateOptions, size: u64) -> Result<u64> {
    let entries = size.div_ceil(u64::from(options.block_size).max(1));
    if entries > MOST_ENTRIES {
        return Err(Error::usage(format!(
            "disk would have {entries} blocks, expected at most {MOST_ENTRIES}: larger blocks \
             are needed"
        )));
    }
    let header_at = u64::try_from(FOOTER).unwrap_or(SECTOR);
    let mut at = header_at.saturating_add(u64::try_from(HEADER).unwrap_or(1024));
    let default = NewParent::default();
    let parent = options.parent.as_ref().unwrap_or(&default);
    let mut names = Vec::new();
    let mut locators = [Locator::default(); LOCATORS];
    let stored = stored_names(parent);
    for (locator, (code, name)) in locators.iter_mut().zip(&stored) {
        let bytes: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= LONGEST_NAME);
        let len = len.ok_or_else(|| Error::usage("the name of the parent is too long"))?;
        let space = len.next_multiple_of(512);
        *locator = Locator { code: *code, space, len, offset: at };
        names.push((at, bytes));
        at = at.saturating_add(u64::from(space));
    }
    let field = stored.last().map_or("", |(_, name)| name);
    let header = Header {
        table_offset: at,
        max_entries: u32::try_from(entries).unwrap_or(u32::MAX),
        block_size: options.block_size,
        parent_id: parent.unique_id,
        parent_timestamp: parent.timestamp,
        // The last unit stays zero.
        parent_name: field.encode_utf16().take(255).collect(),
        locators,
        reserved: Vec::new(),
        warnings: Vec::new(),
    };
    let end = at.saturating_add(entries.saturating_mul(4).next_multiple_of(SECTOR));
    storage.set_len(end.saturating_add(SECTOR))?;
    storage.write_at(&header.to_bytes(), header_at)?;
    for (at, bytes) in names {
        storage.write_at(&bytes, at)?;
    }
    fill_absent(storage, at, end)?;
    Ok(end)
}

/// Makes all entries between two bytes of the file absent.
pub(crate) fn fill_absent(storage: &dyn Storage, mut at: u64, end: u64) -> Result<()> {
    let left = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
    let piece = vec![0xff; left.min(PIECE)];
    while at < end {
        let left = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
        let now = piece.get(..left.min(PIECE)).unwrap_or(&piece);
        storage.write_at(now, at)?;
        at = at.saturating_add(u64::try_from(now.len()).unwrap_or(u64::MAX));
    }
    Ok(())
}

/// The names of the parent as Windows writes them, with the codes of their locators.
fn stored_names(parent: &NewParent) -> Vec<([u8; 4], String)> {
    let relative = parent.relative.as_ref().map(|name| {
        let name = name.replace('/', "\\");
        (*b"W2ru", if name.starts_with('.') { name } else { format!(".\\{name}") })
    });
    let absolute = parent.absolute.as_ref().map(|name| (*b"W2ku", name.replace('/', "\\")));
    relative.into_iter().chain(absolute).collect()
}

/// `time` as the format counts it: seconds since the start of 2000.
pub fn timestamp(time: SystemTime) -> u32 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u32::try_from(since.as_secs().saturating_sub(EPOCH)).unwrap_or(u32::MAX)
}

/// A random id, marked as such (RFC 9562, version 4).
fn random_id() -> [u8; 16] {
    let mut id = [0; 16];
    // Sixteen bytes come at once or not at all; a kernel without them leaves the time.
    if rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()).is_err() {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        id = now.unwrap_or(Duration::ZERO).as_nanos().to_be_bytes();
    }
    let [_, _, _, _, _, _, version, _, variant, ..] = &mut id;
    *version = *version & 0x0f | 0x40;
    *variant = *variant & 0x3f | 0x80;
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_as_asked() {
        let size =
            |size, sizing| CreateOptions { sizing, ..CreateOptions::new(size) }.virtual_size();
        let cases = [
            (10 << 20, Sizing::Geometry, 10_514_432),
            (10 << 20, Sizing::Exact, 10 << 20),
            (1000, Sizing::Exact, 1024),
            (1000, Sizing::Geometry, 4 * 17 * 512),
            (0, Sizing::Geometry, 0),
            (200 << 30, Sizing::Geometry, 200 << 30),
            (MAX_SIZE, Sizing::Geometry, MAX_SIZE),
            (1, Sizing::Azure, 20 << 20),
            ((30 << 20) + 1, Sizing::Azure, 31 << 20),
            (4095 << 30, Sizing::Azure, 4095 << 30),
        ];
        for (asked, sizing, expected) in cases {
            assert_eq!(size(asked, sizing).unwrap(), expected, "{asked} {sizing:?}");
        }
        assert!(size(MAX_SIZE + 1, Sizing::Exact).is_err());
        assert!(size((4095 << 30) + 1, Sizing::Azure).is_err());
        assert!(size(u64::MAX, Sizing::Geometry).is_err());
    }

    #[test]
    fn ids_differ_and_times_count_from_2000() {
        assert_ne!(random_id(), random_id());
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH);
        assert_eq!(timestamp(start + Duration::from_secs(5)), 5);
        assert_eq!(timestamp(SystemTime::UNIX_EPOCH), 0);
    }
}
