// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The headers of seSparse extents: snapshot deltas of ESXi 6.5 and newer.

use crate::SECTOR;
use crate::header::{MAX_DIRECTORY_ENTRIES, bytes_of};
use crate::layout::{Entries, Layout};
use crate::line::ExtentType;
use std::num::NonZeroU64;
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span};

/// First bytes of a seSparse extent: the number 0xCAFEBABE in 64 bits.
pub(crate) const MAGIC: &[u8] = &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0];
const VERSION: u64 = 0x2_0000_0001;
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
const GRAIN_SECTORS: u64 = 8;
const TABLE_SECTORS: u64 = 64;
const GRAIN: NonZeroU64 = NonZeroU64::new(GRAIN_SECTORS * SECTOR).expect("it is not zero");
const TABLE_ENTRIES: NonZeroU64 =
    NonZeroU64::new(TABLE_SECTORS * SECTOR / 8).expect("it is not zero");

/// Reads the constant and the volatile header of `file`. A journal that has to be
/// replayed is refused, unless a disk is salvaged: then the journal is left out.
pub(crate) fn read(file: &dyn BlockDevice, salvage: bool) -> Result<Layout> {
    let sector = |at: u64| {
        let mut bytes = [0; 512];
        if Span::new(at, SECTOR).check_within(file.size()).is_err() {
            return Err(Error::corrupt(format!(
                "file of {} bytes ends inside the headers of the seSparse extent",
                file.size()
            ))
            .at(at));
        }
        file.read_at(&mut bytes, at)?;
        Ok(bytes)
    };
    let bytes = sector(0)?;
    let (layout, volatile) = parse(&bytes)?;
    let bytes = sector(volatile)?;
    let fields = LittleEndian(&bytes, "seSparse volatile header");
    let magic = fields.u64("magic", 0)?;
    if magic != VOLATILE_MAGIC && !salvage {
        return Err(Error::corrupt(format!(
            "magic of the volatile header is {magic:#x}, expected {VOLATILE_MAGIC:#x}"
        ))
        .at(volatile));
    }
    let unclean = fields.u64("replay_journal", 24)? != 0;
    if unclean && !salvage {
        return Err(Error::unsupported(
            "the journal of the seSparse extent has to be replayed: open the disk on its ESXi \
             host, consolidate the snapshots of the VM or clone it with vmkfstools -i",
        )
        .at(volatile));
    }
    Ok(Layout { unclean, ..layout })
}

/// What the constant header says, and where the volatile one is.
fn parse(bytes: &[u8]) -> Result<(Layout, u64)> {
    let fields = LittleEndian(bytes, "seSparse header");
    let number = |name: &str, index: usize| fields.u64(name, index.saturating_mul(8));
    let expect = |name: &str, index: usize, expected: u64| match number(name, index)? {
        value if value == expected => Ok(()),
        value => Err(Error::unsupported(format!(
            "{name} of the seSparse header is {value:#x}, expected {expected:#x}"
        ))),
    };
    if !bytes.starts_with(MAGIC) {
        return Err(Error::corrupt("the seSparse header has no magic number"));
    }
    expect("version", 1, VERSION)?;
    expect("grain size", 3, GRAIN_SECTORS)?;
    expect("grain table size", 4, TABLE_SECTORS)?;
    expect("flags", 5, 0)?;
    let area = |name: &str, index: usize| {
        let start = bytes_of(name, number(name, index)?)?;
        let len = bytes_of(name, number(name, index.saturating_add(1))?)?;
        Ok::<_, Error>(Span::new(start, len))
    };
    let capacity = bytes_of("capacity", number("capacity", 2)?)?;
    let directory_entries = capacity.div_ceil(GRAIN.get().saturating_mul(TABLE_ENTRIES.get()));
    let directory = area("grain directory", 16)?;
    if directory_entries > MAX_DIRECTORY_ENTRIES || directory.len / 8 < directory_entries {
        return Err(Error::corrupt(format!(
            "the grain directory has room for {} tables, but {capacity} bytes need \
             {directory_entries}, of at most {MAX_DIRECTORY_ENTRIES}",
            directory.len / 8
        )));
    }
    let layout = Layout {
        kind: ExtentType::SeSparse,
        capacity,
        grain: GRAIN,
        table_entries: TABLE_ENTRIES,
        directory_entries,
        entries: Entries::SeSparse {
            tables: area("grain tables", 18)?,
            grains: area("grains", 24)?.start,
        },
        descriptor: None,
        directory: Some(directory.start),
        has_footer: false,
        redundant: None,
        overhead: SECTOR,
        compressed: false,
        unclean: false,
    };
    Ok((layout, area("volatile header", 10)?.start))
}
