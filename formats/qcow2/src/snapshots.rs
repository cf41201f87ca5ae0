// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of internal snapshots.

mod operations;
mod view;

pub use operations::{apply_snapshot, create_snapshot, delete_snapshot};
pub use view::snapshot_view;

use crate::geometry::{to_u64, to_usize};
use crate::header::{Header, LARGEST_L1};
use crate::refcounts::read_table;
use tranship_block::{BigEndian, BlockDevice, Error, Result};

const LARGEST_TABLE: u64 = 64 << 20;
const LARGEST_EXTRA: u32 = 1024;
/// Bytes of an entry before its extra data.
const FIXED: u64 = 40;
/// No instruction count was recorded.
const NO_ICOUNT: u64 = u64::MAX;

/// Where a snapshot's L1 table is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) l1_table_offset: u64,
    pub(crate) l1_size: u32,
}

/// An internal snapshot, as the image's table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Unique identifier, usually a decimal number.
    pub id: String,
    /// Name that a person gave it.
    pub name: String,
    /// Seconds since 1970 when it was taken.
    pub date_seconds: u32,
    /// Nanoseconds to be added.
    pub date_nanoseconds: u32,
    /// Nanoseconds that the guest had been running.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of saved machine state, which lie after the end of the disk.
    pub vm_state_size: u64,
    /// Virtual size in bytes when it was taken, where it was recorded.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, where they were recorded.
    pub icount: Option<u64>,
    pub(crate) l1_table_offset: u64,
    pub(crate) l1_size: u32,
    /// The entry's bytes, with padding.
    pub(crate) raw: Vec<u8>,
}

impl Snapshot {
    pub(crate) fn place(&self) -> Place {
        Place { l1_table_offset: self.l1_table_offset, l1_size: self.l1_size }
    }

    /// The same entry with at least the extra data that version 3 demands.
    pub(crate) fn encode(&self, disk_size: u64) -> Vec<u8> {
        let extra = self.raw.get(40..).unwrap_or_default();
        let old = BigEndian(&self.raw, "snapshot").u32("extra_data_size", 36).unwrap_or(0);
        let old = usize::try_from(old).unwrap_or(0).min(extra.len());
        let mut more = extra.get(..old).unwrap_or_default().to_vec();
        for value in [
            self.vm_state_size,
            self.disk_size.unwrap_or(disk_size),
            self.icount.unwrap_or(NO_ICOUNT),
        ]
        .iter()
        .skip(old / 8)
        {
            more.truncate(more.len() & !7);
            more.extend(value.to_be_bytes());
        }
        let narrow = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let short = |len: usize| u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
        let mut bytes = self.l1_table_offset.to_be_bytes().to_vec();
        bytes.extend(self.l1_size.to_be_bytes());
        bytes.extend(short(self.id.len()));
        bytes.extend(short(self.name.len()));
        bytes.extend(self.date_seconds.to_be_bytes());
        bytes.extend(self.date_nanoseconds.to_be_bytes());
        bytes.extend(self.vm_clock_nanoseconds.to_be_bytes());
        // The old field is too narrow for large states; then the extra data has it alone.
        bytes.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        bytes.extend(narrow(more.len()).to_be_bytes());
        bytes.extend(more);
        bytes.extend(self.id.as_bytes());
        bytes.extend(self.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

/// The internal snapshots of the image in `file`.
///
/// # Errors
///
/// As [`Header::read`]; [`tranship_block::ErrorKind::Corrupt`] for a table that contradicts
/// the format.
pub fn snapshots(file: &dyn BlockDevice) -> Result<Vec<Snapshot>> {
    list(file, &Header::read(file)?).map(|(snapshots, _)| snapshots)
}

/// What a check wants to know of the table.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) places: Vec<Place>,
    /// Size in bytes.
    pub(crate) bytes: u64,
    /// Entries without the sizes of state and disk that version 3 demands.
    pub(crate) incomplete: usize,
}

/// Where all snapshots are, and what their table is like.
pub(crate) fn read(file: &dyn BlockDevice, header: &Header) -> Result<Table> {
    let mut table = Table::default();
    let bytes = entries(file, header, |snapshot| {
        table.places.push(snapshot.place());
        table.incomplete =
            table.incomplete.saturating_add(usize::from(snapshot.disk_size.is_none()));
    })?;
    Ok(Table { bytes, ..table })
}

/// All snapshots, and the size of their table in bytes.
pub(crate) fn list(file: &dyn BlockDevice, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let mut snapshots = Vec::new();
    let bytes = entries(file, header, |snapshot| snapshots.push(snapshot))?;
    Ok((snapshots, bytes))
}

fn entries(file: &dyn BlockDevice, header: &Header, mut take: impl FnMut(Snapshot)) -> Result<u64> {
    let mut at = header.snapshots_offset;
    for number in 0..header.nb_snapshots {
        let read = |buf: &mut [u8]| {
            file.read_at(buf, at).map_err(|error| {
                Error::corrupt(format!(
                    "snapshot {number} of {} cannot be read",
                    header.nb_snapshots
                ))
                .at(at)
                .because(error)
            })
        };
        let mut fixed = [0; 40];
        read(&mut fixed)?;
        let fields = BigEndian(&fixed, "snapshot table entry");
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
        let len = FIXED.saturating_add(u64::from(extra)).saturating_add(names);
        let mut raw = vec![0; to_usize(len)?];
        read(&mut raw)?;
        take(parse(&raw, to_usize(u64::from(extra))?)?);
        at = at.saturating_add(len.next_multiple_of(8));
        if at.saturating_sub(header.snapshots_offset) > LARGEST_TABLE {
            return Err(Error::corrupt(format!(
                "snapshot table is larger than {LARGEST_TABLE} bytes"
            ))
            .at(header.snapshots_offset));
        }
    }
    Ok(at.saturating_sub(header.snapshots_offset))
}

fn parse(raw: &[u8], extra: usize) -> Result<Snapshot> {
    let fields = BigEndian(raw, "snapshot table entry");
    let id_len = usize::from(fields.u16("id_str_size", 12)?);
    let name_len = usize::from(fields.u16("name_size", 14)?);
    let id_at = extra.saturating_add(40);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let in_extra = |name, at: usize| -> Result<Option<u64>> {
        if extra >= at.saturating_add(8) {
            fields.u64(name, at.saturating_add(40)).map(Some)
        } else {
            Ok(None)
        }
    };
    let mut whole = raw.to_vec();
    whole.resize(raw.len().next_multiple_of(8), 0);
    let state = u64::from(fields.u32("vm_state_size", 32)?);
    Ok(Snapshot {
        id: text(fields.bytes("id", id_at, id_len)?),
        name: text(fields.bytes("name", id_at.saturating_add(id_len), name_len)?),
        date_seconds: fields.u32("date_sec", 16)?,
        date_nanoseconds: fields.u32("date_nsec", 20)?,
        vm_clock_nanoseconds: fields.u64("vm_clock_nsec", 24)?,
        vm_state_size: in_extra("vm_state_size", 0)?.unwrap_or(state),
        disk_size: in_extra("disk_size", 8)?,
        icount: in_extra("icount", 16)?.filter(|count| *count != NO_ICOUNT),
        l1_table_offset: fields.u64("l1_table_offset", 0)?,
        l1_size: fields.u32("l1_size", 8)?,
        raw: whole,
    })
}

/// The snapshot that `wanted` names: by its identifier, else by its name.
pub(crate) fn find<'a>(snapshots: &'a [Snapshot], wanted: &str) -> Option<&'a Snapshot> {
    snapshots
        .iter()
        .find(|snapshot| snapshot.id == wanted)
        .or_else(|| snapshots.iter().find(|snapshot| snapshot.name == wanted))
}

/// The entries of a snapshot's L1 table.
pub(crate) fn l1_entries(file: &dyn BlockDevice, snapshot: Place) -> Result<Vec<u64>> {
    let bytes = u64::from(snapshot.l1_size).saturating_mul(8);
    let end = snapshot.l1_table_offset.saturating_add(bytes);
    if bytes > LARGEST_L1 || end > file.size() {
        return Err(Error::corrupt(format!(
            "a snapshot's L1 table of {} entries ends past its limit or the file",
            snapshot.l1_size
        ))
        .at(snapshot.l1_table_offset));
    }
    read_table(file, snapshot.l1_table_offset, to_u64(to_usize(bytes)?) / 8)
}
