// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The footer: 512 bytes at the end of every image, and again at the start of those that
//! have a block allocation table.

use crate::geometry::{Geometry, SECTOR};
use tranship_block::{BigEndian, BlockDevice, Error, Result};

/// First bytes of a footer.
pub const MAGIC: [u8; 8] = *b"conectix";
/// Largest disk in bytes: 2040 GiB, since sector numbers have 32 bits.
pub const MAX_SIZE: u64 = 0xff00_0000 * SECTOR;
/// Bytes of a footer.
pub(crate) const FOOTER: usize = 512;
/// Where the part begins that the specification leaves free, and its length.
const RESERVED_AT: usize = 85;
pub(crate) const RESERVED: usize = 427;
/// Where the checksum is; it counts as zero in the sum.
const CHECKSUM_AT: usize = 64;
/// Creators whose images have the size that their geometry gives: Virtual PC and QEMU.
const GEOMETRY_CREATORS: [[u8; 4]; 2] = [*b"vpc ", *b"qemu"];

/// How an image stores its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The disk's bytes and then the footer.
    Fixed,
    /// Blocks that were written, by way of a table.
    Dynamic,
    /// Sectors that differ from a parent's.
    Differencing,
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }
}

/// Which of the footer's two sizes counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SizeSource {
    /// The product of the geometry.
    Chs,
    /// The field `current size`.
    CurrentSize,
}

/// The fields of a footer that mean something to a reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Features; bit 0 marks a temporary disk.
    pub features: u32,
    /// Byte of the dynamic header; all ones for fixed disks.
    pub data_offset: u64,
    /// Seconds since the start of 2000, UTC.
    pub timestamp: u32,
    /// Four letters for the program that made the image.
    pub creator: [u8; 4],
    /// Version of that program.
    pub creator_version: u32,
    /// Four letters for the system that it ran on.
    pub creator_host: [u8; 4],
    /// Bytes of the disk when it was made.
    pub original_size: u64,
    /// Bytes of the disk now.
    pub current_size: u64,
    /// The size as old BIOSes count it.
    pub geometry: Geometry,
    /// How the disk is stored.
    pub kind: Kind,
    /// Names the image: children refer to it.
    pub unique_id: [u8; 16],
    /// Whether the machine was suspended, so that its disk is in the middle of something.
    pub saved_state: bool,
    /// What is behind the fields that the specification has: kept as it is.
    pub reserved: Vec<u8>,
}

/// Ones' complement of the sum of all bytes but the checksum's own four.
pub(crate) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let own = at..at.saturating_add(4);
    let others = bytes.iter().enumerate().filter(|(index, _)| !own.contains(index));
    !others.fold(0_u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

impl Footer {
    /// Reads the footer of the image in `file`: the one at its end, or the copy at its
    /// start if that one is damaged.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if there is no valid footer, and I/O errors.
    pub fn read(file: &dyn BlockDevice) -> Result<Self> {
        Ok(find(file, false)?.footer)
    }

    /// Takes `bytes` apart; `trusting` accepts a wrong checksum.
    pub(crate) fn parse(bytes: &[u8], trusting: bool) -> Result<Self> {
        let fields = BigEndian(bytes, "VHD footer");
        let cookie = fields.bytes("cookie", 0, 8)?;
        if cookie != MAGIC {
            return Err(Error::corrupt("VHD footer does not start with \"conectix\""));
        }
        let (stored, computed) =
            (fields.u32("checksum", CHECKSUM_AT)?, checksum(bytes, CHECKSUM_AT));
        if stored != computed && !trusting {
            return Err(Error::corrupt(format!(
                "VHD footer has checksum {stored:#010x}, expected {computed:#010x}"
            )));
        }
        let version = fields.u32("version", 12)?;
        if version >> 16 != 1 {
            return Err(Error::unsupported(format!(
                "VHD footer has format version {version:#x}, expected 0x10000"
            )));
        }
        let kind = match fields.u32("disk type", 60)? {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => {
                return Err(Error::corrupt(format!("disk type is {other}, expected 2, 3 or 4")));
            }
        };
        Ok(Self {
            features: fields.u32("features", 8)?,
            data_offset: fields.u64("data offset", 16)?,
            timestamp: fields.u32("timestamp", 24)?,
            creator: array(&fields, "creator application", 28)?,
            creator_version: fields.u32("creator version", 32)?,
            creator_host: array(&fields, "creator host system", 36)?,
            original_size: fields.u64("original size", 40)?,
            current_size: fields.u64("current size", 48)?,
            geometry: Geometry {
                cylinders: fields.u16("cylinders", 56)?,
                heads: fields.u8("heads", 58)?,
                sectors_per_track: fields.u8("sectors per track", 59)?,
            },
            kind,
            unique_id: array(&fields, "unique id", 68)?,
            saved_state: fields.u8("saved state", 84)? != 0,
            reserved: fields.bytes("reserved part", RESERVED_AT, RESERVED)?.to_vec(),
        })
    }

    /// The footer as it is stored, with its checksum.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FOOTER);
        bytes.extend(MAGIC);
        bytes.extend(self.features.to_be_bytes());
        bytes.extend(0x0001_0000_u32.to_be_bytes());
        bytes.extend(self.data_offset.to_be_bytes());
        bytes.extend(self.timestamp.to_be_bytes());
        bytes.extend(self.creator);
        bytes.extend(self.creator_version.to_be_bytes());
        bytes.extend(self.creator_host);
        bytes.extend(self.original_size.to_be_bytes());
        bytes.extend(self.current_size.to_be_bytes());
        bytes.extend(self.geometry.cylinders.to_be_bytes());
        bytes.extend([self.geometry.heads, self.geometry.sectors_per_track]);
        bytes.extend(self.kind.number().to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.unique_id);
        bytes.push(u8::from(self.saved_state));
        bytes.extend(&self.reserved);
        bytes.resize(FOOTER, 0);
        seal(&mut bytes, CHECKSUM_AT);
        bytes
    }

    /// Which of the two sizes this creator meant.
    pub fn size_source(&self) -> SizeSource {
        // A product of nothing is no size that anybody meant.
        let usable = self.geometry.sectors() != 0 && !self.is_geometry_full();
        if usable && GEOMETRY_CREATORS.contains(&self.creator) {
            SizeSource::Chs
        } else {
            SizeSource::CurrentSize
        }
    }

    /// Whether the geometry is the one that stands for any larger size, too.
    fn is_geometry_full(&self) -> bool {
        self.geometry.sectors() >= Geometry::MAX.sectors()
    }

    /// Bytes that the guest sees. `forced` overrules the creator, but not the maximal
    /// geometry, which says nothing about the size.
    pub fn virtual_size(&self, forced: Option<SizeSource>) -> u64 {
        match forced.unwrap_or_else(|| self.size_source()) {
            SizeSource::Chs if !self.is_geometry_full() => self.geometry.bytes(),
            SizeSource::Chs | SizeSource::CurrentSize => self.current_size,
        }
    }

    /// The same footer for a disk of `size` bytes, which every reader takes for its size.
    #[must_use]
    pub(crate) fn resized(&self, size: u64) -> Self {
        let mut new = Self { current_size: size, geometry: Geometry::of(size), ..self.clone() };
        if GEOMETRY_CREATORS.contains(&self.creator) && new.geometry.bytes() != size {
            new.geometry = Geometry::MAX;
        }
        new
    }
}

/// Puts the checksum of `bytes` at `at`.
pub(crate) fn seal(bytes: &mut [u8], at: usize) {
    let sum = checksum(bytes, at).to_be_bytes();
    if let Some(target) = bytes.get_mut(at..).and_then(|tail| tail.first_chunk_mut()) {
        *target = sum;
    }
}

/// The `N` bytes called `name` at `at`.
pub(crate) fn array<const N: usize>(
    fields: &BigEndian<'_>,
    name: &str,
    at: usize,
) -> Result<[u8; N]> {
    let bytes = fields.bytes(name, at, N)?;
    bytes.first_chunk().copied().ok_or_else(|| Error::corrupt(format!("{name} is cut")))
}

/// What was found at the two places of an image where footers are.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) footer: Footer,
    /// Where the footer at the end starts, if there is a valid one.
    pub(crate) end: Option<u64>,
    /// Whether one of the copies has to be written again.
    pub(crate) is_stale: bool,
    pub(crate) warnings: Vec<String>,
}

/// Where a footer at the end of a file of `len` bytes starts. Virtual PC before 2004
/// left its last byte out.
pub(crate) fn end_offset(len: u64) -> Option<u64> {
    len.checked_sub(if len % SECTOR == 511 { 511 } else { SECTOR })
}

fn read_at(file: &dyn BlockDevice, at: Option<u64>, trusting: bool) -> Result<Footer> {
    let too_short =
        || Error::corrupt(format!("file of {} bytes is too short for a VHD footer", file.size()));
    let at = at.ok_or_else(too_short)?;
    let len = file.size().saturating_sub(at).min(SECTOR);
    if len < 511 {
        return Err(too_short());
    }
    let mut bytes = vec![0; FOOTER];
    let stored = bytes.get_mut(..usize::try_from(len).unwrap_or(FOOTER)).unwrap_or_default();
    file.read_at(stored, at)?;
    Footer::parse(&bytes, trusting).map_err(|error| error.at(at))
}

/// Looks for the footer of the image in `file`.
pub(crate) fn find(file: &dyn BlockDevice, salvage: bool) -> Result<Found> {
    let end = end_offset(file.size());
    let last = read_at(file, end, false);
    let first = read_at(file, Some(0), false);
    let mut found = match (last, first) {
        (Ok(last), _) if last.kind == Kind::Fixed => whole(last, end),
        (Ok(last), Ok(first)) if last == first => whole(last, end),
        (Ok(last), Ok(_)) => {
            let text = "the two copies of the footer differ: the one at the end is used";
            Found { is_stale: true, warnings: vec![text.into()], ..whole(last, end) }
        }
        (Ok(last), Err(error)) => {
            let text = format!("the copy of the footer at the start is damaged: {error}");
            Found { is_stale: true, warnings: vec![text], ..whole(last, end) }
        }
        (Err(error), Ok(first)) if first.kind != Kind::Fixed => {
            let text = format!("no footer at the end, the copy at the start is used: {error}");
            Found { footer: first, end: None, is_stale: true, warnings: vec![text] }
        }
        (Err(error), first) if salvage => {
            let last = read_at(file, end, true);
            let at_end = last.is_ok();
            let Ok(footer) = last.or_else(|_| read_at(file, Some(0), true)) else {
                return Err(first.err().unwrap_or(error));
            };
            let text = format!("no footer has a valid checksum, one is used even so: {error}");
            let end = end.filter(|_| at_end);
            Found { is_stale: true, warnings: vec![text], ..whole(footer, end) }
        }
        (Err(error), _) => return Err(error),
    };
    if found.footer.saved_state {
        found.warnings.push(
            "the footer says that the machine was suspended: its disk may be in the middle of \
             something"
                .into(),
        );
    }
    Ok(found)
}

fn whole(footer: Footer, end: Option<u64>) -> Found {
    Found { footer, end, is_stale: false, warnings: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::{ErrorKind, MemoryDevice};

    fn footer(creator: [u8; 4], size: u64) -> Footer {
        Footer {
            features: 2,
            data_offset: 512,
            timestamp: 7,
            creator,
            creator_version: 1,
            creator_host: *b"Wi2k",
            original_size: size,
            current_size: size,
            geometry: Geometry::of(size),
            kind: Kind::Dynamic,
            unique_id: [9; 16],
            saved_state: false,
            reserved: vec![5; RESERVED],
        }
    }

    #[test]
    fn a_footer_survives_being_stored() {
        let footer = footer(*b"test", 10 << 20);
        assert_eq!(Footer::parse(&footer.to_bytes(), false).unwrap(), footer);
    }

    #[test]
    fn the_creator_decides_which_size_counts() {
        let size = 41_943_040;
        let product = 963 * 5 * 17 * 512;
        let cases: [([u8; 4], u64); 9] = [
            (*b"vpc ", product),
            (*b"qemu", product),
            (*b"win ", size),
            (*b"qem2", size),
            (*b"d2v\0", size),
            (*b"tap\0", size),
            (*b"CTXS", size),
            (*b"wa\0\0", size),
            (*b"????", size),
        ];
        for (creator, expected) in cases {
            let footer = footer(creator, size);
            assert_eq!(footer.virtual_size(None), expected, "{creator:?}");
            assert_eq!(footer.virtual_size(Some(SizeSource::Chs)), product);
            assert_eq!(footer.virtual_size(Some(SizeSource::CurrentSize)), size);
            let full = Footer { geometry: Geometry::MAX, ..footer };
            assert_eq!(full.virtual_size(None), size);
            assert_eq!(full.virtual_size(Some(SizeSource::Chs)), size);
        }
        let none = Footer { geometry: Geometry::of(0), ..footer(*b"qemu", size) };
        assert_eq!(none.virtual_size(None), size);
    }

    #[test]
    fn a_resized_footer_has_exactly_the_new_size() {
        for creator in [*b"qemu", *b"vpc ", *b"win "] {
            for size in [512, 41_943_040, 10 << 20, 200 << 30] {
                assert_eq!(footer(creator, 1 << 20).resized(size).virtual_size(None), size);
            }
        }
    }

    #[test]
    fn either_copy_is_used_when_the_other_is_damaged() {
        let plain = Footer { reserved: vec![0; RESERVED], ..footer(*b"test", 1 << 20) };
        let good = plain.to_bytes();
        let bad = [0x11; 512].to_vec();
        let file =
            |first: &[u8], last: &[u8]| MemoryDevice::read_only([first, &[0; 2048], last].concat());
        let found = find(&file(&good, &good), false).unwrap();
        assert_eq!((found.end, found.is_stale), (Some(2560), false));
        let found = find(&file(&bad, &good), false).unwrap();
        assert_eq!((found.end, found.is_stale, found.warnings.len()), (Some(2560), true, 1));
        let found = find(&file(&good, &bad), false).unwrap();
        assert_eq!((found.end, found.is_stale, found.warnings.len()), (None, true, 1));
        let found = find(&file(&bad, &good[..511]), false).unwrap();
        assert_eq!(found.end, Some(2560));

        let mut wrong = good.clone();
        wrong[100] ^= 1;
        let error = find(&file(&wrong, &wrong), false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("has checksum"), "{error}");
        assert_eq!(find(&file(&wrong, &wrong), true).unwrap().warnings.len(), 1);
        assert!(find(&file(&bad, &bad), true).is_err());
        assert!(find(&MemoryDevice::read_only(vec![1; 100]), true).is_err());
    }

    #[test]
    fn a_fixed_disk_may_contain_an_image() {
        let inner = footer(*b"test", 1 << 20);
        let outer = Footer { kind: Kind::Fixed, data_offset: u64::MAX, ..inner.clone() };
        let bytes = [inner.to_bytes(), vec![0; 1024], outer.to_bytes()].concat();
        let found = find(&MemoryDevice::read_only(bytes), false).unwrap();
        assert_eq!((found.footer.kind, found.is_stale), (Kind::Fixed, false));
        // The copy at the start is not trusted to be one of a fixed disk.
        let lone = [outer.to_bytes(), vec![0; 1024]].concat();
        assert!(find(&MemoryDevice::read_only(lone), false).is_err());
    }
}
