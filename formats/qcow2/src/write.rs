// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Moving payload into the image.
//!
//! Clusters that belong to one guest cluster alone are overwritten where they are. All
//! others get new clusters: they are taken under the lock, filled without it, and mapped
//! under it again. In between, the guest clusters are in `busy`, so that a second writer
//! to one of them waits instead of losing bytes.
//!
//! With extended L2 entries a cluster may have its place in the file while some of its
//! subclusters have no data yet: these are mapped in the same way, in the place they have.

use crate::geometry::{COPIED, Host, Mapping, to_u64, to_usize, unit_bits, unit_mask};
use crate::image::Qcow2;
use crate::metadata::{Metadata, Run};
use std::io::IoSlice;
use std::sync::{MutexGuard, PoisonError};
use tranship_block::{Error, Result, Span, Storage};

/// Most growth of the file at once, so that its length changes rarely.
const STEP: u64 = 16 << 20;
/// The same for a file that is written from front to back.
const BULK_STEP: u64 = 256 << 20;
/// A bitmap that says that all subclusters are allocated.
pub(crate) const ALL_ALLOCATED: u64 = 0xffff_ffff;

/// Where the next bytes go.
enum Target {
    /// Over the bytes of clusters that are mapped already: byte offset and length.
    InPlace { host: u64, len: u64 },
    /// Into clusters that are to be mapped.
    Fresh(Fresh),
}

/// Clusters of the file for as many clusters of the guest.
struct Fresh {
    guest: Run,
    host: Run,
    /// The clusters were reserved for these guest clusters before.
    reserved: bool,
    /// All of the clusters is filled, not only the subclusters that are written to.
    whole: bool,
    /// The guest's byte where this ends.
    end: u64,
}

/// Clusters of the guest that are to be mapped; in the file they may have a place already.
struct Unmapped {
    guest: Run,
    reserved: Option<Host>,
    whole: bool,
    end: u64,
}

/// A new L2 entry: its index, its words, and whether what the old one referred to goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) cluster: u64,
    pub(crate) entry: u64,
    pub(crate) bitmap: u64,
    pub(crate) free: bool,
}

/// Makes the storage long enough for every cluster that was given out.
pub(crate) fn reach(metadata: &Metadata, storage: &dyn Storage) -> Result<()> {
    let end = metadata.geometry.offset(metadata.refcounts.end);
    if end <= storage.size() {
        return Ok(());
    }
    let most = if metadata.bulk.is_some() { BULK_STEP } else { STEP };
    let more = metadata.geometry.clusters_for((end / 4).min(most));
    let generous = end.saturating_add(metadata.geometry.offset(more));
    // A block device has the length that it has; exactly enough may still fit.
    storage.set_len(generous).or_else(|_| storage.set_len(end))
}

impl Qcow2 {
    /// Writes `buf`, whose range was checked and which the caller protects by `in_use`.
    pub(crate) fn write_payload(&self, mut buf: &[u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let len = match self.target(offset, to_u64(buf.len()))? {
                Target::InPlace { host, len } => {
                    let now = buf.get(..to_usize(len)?).unwrap_or(buf);
                    self.store(&[IoSlice::new(now)], host, offset)?;
                    len
                }
                Target::Fresh(fresh) => {
                    let len = fresh.end.saturating_sub(offset).min(to_u64(buf.len()));
                    let now = buf.get(..to_usize(len)?).unwrap_or(buf);
                    self.fill_and_map(&fresh, now, offset)?;
                    self.make_room()?;
                    len
                }
            };
            buf = buf.get(to_usize(len)?..).unwrap_or_default();
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    fn target(&self, offset: u64, len: u64) -> Result<Target> {
        let geometry = self.geometry;
        let unit = geometry.unit();
        let within = offset & unit.wrapping_sub(1);
        let first_unit = offset.wrapping_shr(geometry.unit_bits());
        let most_units = len.saturating_add(within).div_ceil(unit);
        let mut metadata = self.lock();
        loop {
            if let Some((host, count)) = metadata.in_place(&self.file, first_unit, most_units)? {
                let len = count.saturating_mul(unit).saturating_sub(within).min(len);
                let host = host.saturating_add(within);
                self.reach_to(&mut metadata, host.saturating_add(len))?;
                return Ok(Target::InPlace { host, len });
            }
            let found = self.unmapped(&mut metadata, offset, len)?;
            let guest = found.guest;
            if metadata.busy.iter().any(|busy| busy.overlaps(guest)) {
                metadata = self.idle.wait(metadata).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let host = if geometry.external {
                guest
            } else if let Some(host) = found.reserved {
                let run = Run { first: geometry.index(host.offset), count: guest.count };
                metadata.check_exclusive(&self.file, run)?;
                self.reach_to(&mut metadata, geometry.offset(run.end()))?;
                run
            } else {
                self.take(&mut metadata, guest.count)?
            };
            let guest = Run { count: host.count, ..guest };
            metadata.busy.push(guest);
            return Ok(Target::Fresh(Fresh {
                guest,
                host,
                reserved: found.reserved.is_some(),
                whole: found.whole,
                end: found.end.min(geometry.offset(guest.end())),
            }));
        }
    }

    /// Up to `want` neighbouring clusters that the file reaches.
    fn take(&self, metadata: &mut Metadata, want: u64) -> Result<Run> {
        let run = metadata.allocate(&self.file, want)?;
        if let Err(error) = self.reach(metadata) {
            metadata.refcounts.release(&self.file, run)?;
            return Err(error);
        }
        Ok(run)
    }

    /// The clusters from `offset` on that have to be mapped anew, and where they are
    /// reserved, if they are.
    fn unmapped(&self, metadata: &mut Metadata, offset: u64, len: u64) -> Result<Unmapped> {
        let geometry = self.geometry;
        let first = geometry.index(offset);
        let most = geometry.clusters_for(len.saturating_add(geometry.within(offset)));
        // All of their tables have to be in memory when they are mapped.
        let (_, l2_index) = geometry.l1_l2(first);
        let tables = to_u64(metadata.l2.capacity() / 2).max(1);
        let most =
            most.min(tables.saturating_mul(geometry.entries()).saturating_sub(to_u64(l2_index)));
        if geometry.extended {
            return self.unmapped_units(metadata, offset, most);
        }
        let owned = |host: Host| host.copied || geometry.external;
        let mut guest = Run { first, count: 0 };
        let mut reserved = None;
        while guest.count < most {
            let left = most.saturating_sub(guest.count);
            let (mapping, count) = metadata.lookup(&self.file, guest.end(), left)?;
            match mapping {
                Mapping::Zero { reserved: Some(host) } if owned(host) => {
                    if guest.count == 0 {
                        guest.count = count;
                        reserved = Some(host);
                    }
                    break;
                }
                Mapping::Data(host) if owned(host) => break,
                _ => guest.count = guest.count.saturating_add(count),
            }
        }
        let end = geometry.offset(guest.end());
        Ok(Unmapped { guest, reserved, whole: true, end })
    }

    /// The same for clusters with subclusters; those from `offset` on that have data in
    /// their place already are left out.
    fn unmapped_units(&self, metadata: &mut Metadata, offset: u64, most: u64) -> Result<Unmapped> {
        let geometry = self.geometry;
        let first = geometry.index(offset);
        let mut guest = Run { first, count: 0 };
        let mut reserved: Option<Host> = None;
        let mut end = offset;
        while guest.count < most {
            let start = geometry.offset(guest.end());
            let (entry, bitmap) = metadata.entry_of(&self.file, guest.end())?;
            match geometry.mapping(entry, start)? {
                Mapping::Data(host) if host.copied || geometry.external => {
                    let distance = geometry.offset(guest.count);
                    let follows = match reserved {
                        None => guest.count == 0,
                        Some(host_of_first) => {
                            host_of_first.offset.checked_add(distance) == Some(host.offset)
                        }
                    };
                    let from =
                        geometry.within(offset.max(start)).wrapping_shr(geometry.unit_bits());
                    let until =
                        (from..32).find(|unit| bitmap & unit_bits(*unit).0 != 0).unwrap_or(32);
                    if !follows || until == from {
                        break;
                    }
                    reserved.get_or_insert(host);
                    guest.count = guest.count.saturating_add(1);
                    end = start.saturating_add(until.saturating_mul(geometry.unit()));
                    if until < 32 {
                        break;
                    }
                }
                Mapping::Data(_) | Mapping::Compressed { .. } => {
                    if guest.count > 0 {
                        break;
                    }
                    // All of what is read from elsewhere so far moves.
                    let end = geometry.offset(first.saturating_add(1));
                    let guest = Run { first, count: 1 };
                    return Ok(Unmapped { guest, reserved: None, whole: true, end });
                }
                _ => {
                    if reserved.is_some() {
                        break;
                    }
                    guest.count = guest.count.saturating_add(1);
                    end = geometry.offset(guest.end());
                }
            }
        }
        Ok(Unmapped { guest, reserved, whole: false, end })
    }

    /// Makes the file long enough for the clusters up to `end`, which others gave out: not
    /// all writers fill the file's last one.
    fn reach_to(&self, metadata: &mut Metadata, end: u64) -> Result<()> {
        if self.geometry.external || end <= self.file.size() {
            return Ok(());
        }
        let clusters = self.geometry.clusters_for(end);
        let last = self.geometry.offset(clusters.saturating_sub(1));
        if last >= self.file.size() {
            return Err(Error::corrupt(format!(
                "cluster at {last:#x} lies past the file's {} bytes: the image is incomplete",
                self.file.size()
            ))
            .at(last));
        }
        metadata.refcounts.end = metadata.refcounts.end.max(clusters);
        self.reach(metadata)
    }

    /// Makes the file long enough for every cluster that was given out.
    pub(crate) fn reach(&self, metadata: &Metadata) -> Result<()> {
        reach(metadata, &**self.writable(0)?)
    }

    /// Fills fresh clusters with `buf` and, where it does not cover them, with what the
    /// guest clusters hold; then maps them.
    fn fill_and_map(&self, fresh: &Fresh, buf: &[u8], offset: u64) -> Result<()> {
        let filled = self.fill(fresh, buf, offset);
        let mut metadata = self.lock();
        let result = filled.and_then(|filled| self.map(&mut metadata, fresh, filled));
        if result.is_err() && !fresh.reserved && !self.geometry.external {
            // Nothing refers to them: they are free at once. If even that fails, they leak.
            let _ = metadata.refcounts.release(&self.file, fresh.host);
        }
        self.end_busy(&mut metadata, fresh.guest);
        result
    }

    /// Lets others at the clusters of `guest`.
    pub(crate) fn end_busy(&self, metadata: &mut Metadata, guest: Run) {
        metadata.busy.retain(|busy| *busy != guest);
        self.idle.notify_all();
    }

    /// Returns what is filled now.
    fn fill(&self, fresh: &Fresh, buf: &[u8], offset: u64) -> Result<Span> {
        let geometry = self.geometry;
        let first = geometry.offset(fresh.guest.first);
        let end = offset.saturating_add(to_u64(buf.len()));
        let (start, mut stop) = if fresh.whole {
            (first, geometry.offset(fresh.guest.end()))
        } else {
            let rest = geometry.unit().wrapping_sub(1);
            (offset & !rest, end.saturating_add(rest) & !rest)
        };
        if geometry.external {
            // The data file ends where the disk does.
            stop = stop.min(self.header.size);
        }
        let host = geometry.offset(fresh.host.first).saturating_add(start.saturating_sub(first));
        if start == offset && stop == end {
            self.store(&[IoSlice::new(buf)], host, start)?;
        } else {
            let head = self.old(Span::new(start, offset.saturating_sub(start)))?;
            let tail = self.old(Span::new(end, stop.saturating_sub(end)))?;
            let all = [IoSlice::new(&head), IoSlice::new(buf), IoSlice::new(&tail)];
            self.store(&all, host, start)?;
        }
        Ok(Span::new(start, stop.saturating_sub(start)))
    }

    /// What the guest has in `span`, with zeroes past the end of the disk.
    fn old(&self, span: Span) -> Result<Vec<u8>> {
        let mut bytes = vec![0; to_usize(span.len)?];
        let there = self.header.size.saturating_sub(span.start).min(span.len);
        let part = bytes.get_mut(..to_usize(there)?).unwrap_or_default();
        self.read_payload(part, span.start)?;
        Ok(bytes)
    }

    fn map(&self, metadata: &mut Metadata, fresh: &Fresh, filled: Span) -> Result<()> {
        let geometry = self.geometry;
        self.own_tables(metadata, fresh.guest)?;
        for number in 0..fresh.guest.count {
            let cluster = fresh.guest.first.saturating_add(number);
            let host = geometry.offset(fresh.host.first.saturating_add(number));
            let mut bitmap = 0;
            if geometry.extended {
                let units = self.units_in(filled, cluster);
                let (_, old) = metadata.entry_of(&self.file, cluster)?;
                bitmap = if fresh.whole {
                    ALL_ALLOCATED
                } else {
                    (old & !units.wrapping_shl(32)) | units
                };
            }
            let free = !fresh.reserved;
            self.replace(metadata, Change { cluster, entry: host | COPIED, bitmap, free })?;
        }
        Ok(())
    }

    /// The allocation bits of the subclusters of `cluster` that `span` touches.
    pub(crate) fn units_in(&self, span: Span, cluster: u64) -> u64 {
        let geometry = self.geometry;
        let start = geometry.offset(cluster);
        let from = span.start.saturating_sub(start).wrapping_shr(geometry.unit_bits());
        let until = span.end().saturating_sub(start).div_ceil(geometry.unit());
        unit_mask(from, until.saturating_sub(from))
    }

    /// Makes sure that the L2 tables of `guest`'s clusters may be changed.
    pub(crate) fn own_tables(&self, metadata: &mut Metadata, guest: Run) -> Result<()> {
        let (mut l1_index, _) = self.geometry.l1_l2(guest.first);
        let (last, _) = self.geometry.l1_l2(guest.end().saturating_sub(1));
        while l1_index <= last {
            metadata.own_table(&self.file, l1_index)?;
            l1_index = l1_index.saturating_add(1);
        }
        self.reach(metadata)
    }

    /// Changes the entry of a cluster whose table may be changed, and frees what the old
    /// one referred to.
    pub(crate) fn replace(&self, metadata: &mut Metadata, change: Change) -> Result<()> {
        let old = metadata.set_entry(change.cluster, change.entry, change.bitmap)?;
        let guest = self.geometry.offset(change.cluster);
        if change.free
            && let Some(hosts) = metadata.hosts(self.geometry.mapping(old, guest)?)
        {
            metadata.free(hosts);
        }
        Ok(())
    }

    /// The lock, at a moment when nobody is about to map clusters of `run`.
    pub(crate) fn wait_for(&self, run: Run) -> MutexGuard<'_, Metadata> {
        let metadata = self.lock();
        self.idle
            .wait_while(metadata, |metadata| metadata.busy.iter().any(|busy| busy.overlaps(run)))
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Metadata {
    /// Changes the entry of a cluster whose table is in memory; returns the old first word.
    pub(crate) fn set_entry(&mut self, cluster: u64, entry: u64, bitmap: u64) -> Result<u64> {
        let (l1_index, l2_index) = self.geometry.l1_l2(cluster);
        let words = self.geometry.words();
        let at = l2_index.saturating_mul(words);
        let guest = self.geometry.offset(cluster);
        let table = self.table_offset(l1_index)?.unwrap_or(0);
        let old = self.l2.modify(table, |entries| {
            if words == 2
                && let Some(slot) = entries.get_mut(at.saturating_add(1))
            {
                *slot = bitmap;
            }
            entries.get_mut(at).map(|slot| std::mem::replace(slot, entry))
        });
        old.flatten()
            .ok_or_else(|| Error::corrupt("L2 table has gone while it was changed").at(guest))
    }
}
