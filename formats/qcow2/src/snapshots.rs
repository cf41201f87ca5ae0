// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of internal snapshots, as far as reference counts depend on it.

use crate::header::{Header, LARGEST_L1};
use crate::refcounts::read_table;
use tranship_block::{BigEndian, BlockDevice, Error, Result};

const LARGEST_TABLE: u64 = 64 << 20;
const LARGEST_EXTRA: u32 = 1024;

/// Where a snapshot's L1 table is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    pub(crate) l1_table_offset: u64,
    pub(crate) l1_size: u32,
}

/// All snapshots, and the size of their table in bytes.
pub(crate) fn read(file: &dyn BlockDevice, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let mut snapshots = Vec::new();
    let mut at = header.snapshots_offset;
    for number in 0..header.nb_snapshots {
        let mut raw = [0; 40];
        file.read_at(&mut raw, at).map_err(|error| {
            Error::corrupt(format!("snapshot {number} of {} cannot be read", header.nb_snapshots))
                .at(at)
                .because(error)
        })?;
        let fields = BigEndian(&raw, "snapshot table entry");
        let extra = fields.u32("extra_data_size", 36)?;
        if extra > LARGEST_EXTRA {
            return Err(Error::corrupt(format!(
                "snapshot {number} has {extra} bytes of extra data, expected at most \
                 {LARGEST_EXTRA}"
            ))
            .at(at));
        }
        let names = u64::from(fields.u16("id_str_size", 12)?)
            .saturating_add(u64::from(fields.u16("name_size", 14)?));
        snapshots.push(Snapshot {
            l1_table_offset: fields.u64("l1_table_offset", 0)?,
            l1_size: fields.u32("l1_size", 8)?,
        });
        let len = 40_u64.saturating_add(u64::from(extra)).saturating_add(names);
        at = at.saturating_add(len.next_multiple_of(8));
        if at.saturating_sub(header.snapshots_offset) > LARGEST_TABLE {
            return Err(Error::corrupt(format!(
                "snapshot table is larger than {LARGEST_TABLE} bytes"
            ))
            .at(header.snapshots_offset));
        }
    }
    Ok((snapshots, at.saturating_sub(header.snapshots_offset)))
}

/// The entries of a snapshot's L1 table.
pub(crate) fn l1_entries(file: &dyn BlockDevice, snapshot: Snapshot) -> Result<Vec<u64>> {
    let bytes = u64::from(snapshot.l1_size).saturating_mul(8);
    let end = snapshot.l1_table_offset.saturating_add(bytes);
    if bytes > LARGEST_L1 || end > file.size() {
        return Err(Error::corrupt(format!(
            "a snapshot's L1 table of {} entries ends past its limit or the file",
            snapshot.l1_size
        ))
        .at(snapshot.l1_table_offset));
    }
    read_table(file, snapshot.l1_table_offset, u64::from(snapshot.l1_size))
}
