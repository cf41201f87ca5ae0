// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Moving payload into the image.
//!
//! Clusters that belong to one guest cluster alone are overwritten where they are. All
//! others get new clusters: they are taken under the lock, filled without it, and mapped
//! under it again. In between, the guest clusters are in `busy`, so that a second writer
//! to one of them waits instead of losing bytes.

use crate::geometry::{COPIED, Host, Mapping, ZERO, to_u64, to_usize};
use crate::image::Qcow2;
use crate::metadata::{Metadata, Run};
use std::io::IoSlice;
use std::sync::{MutexGuard, PoisonError};
use tranship_block::{BlockDevice, Error, Result, Span, Zeroing};

/// Growth of the file, so that its length changes rarely.
const STEP: u64 = 16 << 20;

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
}

impl Qcow2 {
    /// Writes `buf`, whose range was checked and which the caller protects by `in_use`.
    pub(crate) fn write_payload(&self, mut buf: &[u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let len = match self.target(offset, to_u64(buf.len()))? {
                Target::InPlace { host, len } => {
                    let now = buf.get(..to_usize(len)?).unwrap_or(buf);
                    self.writable(offset)?.write_at(now, host)?;
                    len
                }
                Target::Fresh(fresh) => {
                    let span = self.part(&fresh, offset, to_u64(buf.len()));
                    let now = buf.get(..to_usize(span.len)?).unwrap_or(buf);
                    self.fill_and_map(&fresh, now, offset)?;
                    span.len
                }
            };
            buf = buf.get(to_usize(len)?..).unwrap_or_default();
            offset = offset.saturating_add(len);
            self.make_room()?;
        }
        Ok(())
    }

    /// The part of the guest's clusters that `len` bytes from `offset` cover.
    fn part(&self, fresh: &Fresh, offset: u64, len: u64) -> Span {
        let end = self.geometry.offset(fresh.guest.end()).min(offset.saturating_add(len));
        Span::new(offset, end.saturating_sub(offset))
    }

    fn target(&self, offset: u64, len: u64) -> Result<Target> {
        let geometry = self.geometry;
        let first = geometry.index(offset);
        let within = geometry.within(offset);
        let mut most = geometry.clusters_for(len.saturating_add(within));
        let (_, l2_index) = geometry.l1_l2(first);
        most = most.min(geometry.entries().saturating_sub(to_u64(l2_index)));
        let mut metadata = self.lock();
        loop {
            if let Some((host, count)) = metadata.in_place(&self.file, first, most)? {
                let len = geometry.offset(count).saturating_sub(within).min(len);
                return Ok(Target::InPlace { host: host.saturating_add(within), len });
            }
            let (guest, reserved) = self.unmapped(&mut metadata, first, most)?;
            if metadata.busy.iter().any(|busy| busy.overlaps(guest)) {
                metadata = self.idle.wait(metadata).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let host = if let Some(host) = reserved {
                let run = Run { first: geometry.index(host.offset), count: guest.count };
                metadata.check_exclusive(&self.file, run)?;
                run
            } else {
                let run = metadata.allocate(&self.file, guest.count)?;
                if let Err(error) = self.reach(&metadata) {
                    metadata.refcounts.release(&self.file, run)?;
                    return Err(error);
                }
                run
            };
            let guest = Run { first, count: host.count };
            metadata.busy.push(guest);
            return Ok(Target::Fresh(Fresh { guest, host, reserved: reserved.is_some() }));
        }
    }

    /// The clusters from `first` on that have to be mapped anew, and where they are
    /// reserved, if they are.
    fn unmapped(
        &self,
        metadata: &mut Metadata,
        first: u64,
        most: u64,
    ) -> Result<(Run, Option<Host>)> {
        let mut guest = Run { first, count: 0 };
        while guest.count < most {
            let left = most.saturating_sub(guest.count);
            let (mapping, count) = metadata.run(&self.file, guest.end(), left)?;
            match mapping {
                Mapping::Zero { reserved: Some(host) } if host.copied => {
                    if guest.count == 0 {
                        return Ok((Run { first, count }, Some(host)));
                    }
                    break;
                }
                Mapping::Data(host) if host.copied => break,
                _ => guest.count = guest.count.saturating_add(count),
            }
        }
        Ok((guest, None))
    }

    /// Makes the file long enough for every cluster that was given out.
    pub(crate) fn reach(&self, metadata: &Metadata) -> Result<()> {
        let end = self.geometry.offset(metadata.refcounts.end);
        if end <= self.file.size() {
            return Ok(());
        }
        let storage = self.writable(0)?;
        let generous = end.checked_next_multiple_of(STEP).unwrap_or(end);
        // A block device has the length that it has; exactly enough may still fit.
        storage.set_len(generous).or_else(|_| storage.set_len(end))
    }

    /// Fills fresh clusters with `buf` and, where it does not cover them, with what the
    /// guest clusters hold; then maps them.
    fn fill_and_map(&self, fresh: &Fresh, buf: &[u8], offset: u64) -> Result<()> {
        let result = self.fill(fresh, buf, offset);
        let mut metadata = self.lock();
        let result = result.and_then(|()| self.map(&mut metadata, fresh));
        if result.is_err() && !fresh.reserved {
            // Nothing refers to them: they are free at once. If even that fails, they leak.
            let _ = metadata.refcounts.release(&self.file, fresh.host);
        }
        metadata.busy.retain(|busy| *busy != fresh.guest);
        self.idle.notify_all();
        result
    }

    fn fill(&self, fresh: &Fresh, buf: &[u8], offset: u64) -> Result<()> {
        let geometry = self.geometry;
        let start = geometry.offset(fresh.guest.first);
        let end = offset.saturating_add(to_u64(buf.len()));
        let stop = geometry.offset(fresh.guest.end());
        let storage = self.writable(offset)?;
        let host = geometry.offset(fresh.host.first);
        if start == offset && stop == end {
            return storage.write_at(buf, host);
        }
        let head = self.old(Span::new(start, offset.saturating_sub(start)))?;
        let tail = self.old(Span::new(end, stop.saturating_sub(end)))?;
        let all = [IoSlice::new(&head), IoSlice::new(buf), IoSlice::new(&tail)];
        storage.write_vectored_at(&all, host)
    }

    /// What the guest has in `span`, with zeroes past the end of the disk.
    fn old(&self, span: Span) -> Result<Vec<u8>> {
        let mut bytes = vec![0; to_usize(span.len)?];
        let there = self.header.size.saturating_sub(span.start).min(span.len);
        let part = bytes.get_mut(..to_usize(there)?).unwrap_or_default();
        self.read_payload(part, span.start)?;
        Ok(bytes)
    }

    fn map(&self, metadata: &mut Metadata, fresh: &Fresh) -> Result<()> {
        let (l1_index, l2_index) = self.geometry.l1_l2(fresh.guest.first);
        let table = metadata.own_table(&self.file, l1_index)?;
        self.reach(metadata)?;
        for number in 0..fresh.guest.count {
            let host = self.geometry.offset(fresh.host.first.saturating_add(number));
            let index = l2_index.saturating_add(to_usize(number)?);
            self.replace(metadata, (table, index), host | COPIED, !fresh.reserved)?;
        }
        Ok(())
    }

    /// Changes entry `index` of the L2 table at `table`, and frees what it referred to.
    fn replace(
        &self,
        metadata: &mut Metadata,
        (table, index): (u64, usize),
        entry: u64,
        free: bool,
    ) -> Result<()> {
        let old = metadata
            .l2
            .modify(table, |entries| {
                entries.get_mut(index).map(|slot| std::mem::replace(slot, entry))
            })
            .flatten()
            .ok_or_else(|| Error::corrupt("L2 table has gone while it was changed").at(table))?;
        if free && let Some(hosts) = metadata.hosts(self.geometry.mapping(old, 0)?) {
            metadata.free(hosts);
        }
        Ok(())
    }

    /// Makes `span` zero: whole clusters in the tables, the rest by writing.
    pub(crate) fn zero(&self, span: Span, mode: Zeroing) -> Result<()> {
        let geometry = self.geometry;
        let whole = self.whole(span);
        if whole.count == 0 || !self.can_zero() {
            return self.zero_bytes(span);
        }
        let start = geometry.offset(whole.first);
        let end = geometry.offset(whole.end()).min(self.header.size);
        self.zero_bytes(Span::new(span.start, start.saturating_sub(span.start)))?;
        self.zero_clusters(whole, mode)?;
        self.zero_bytes(Span::new(end, span.end().saturating_sub(end)))
    }

    pub(crate) fn discard_clusters(&self, span: Span) -> Result<()> {
        // Without zero clusters the backing image would show through.
        if self.can_zero() {
            self.zero_clusters(self.whole(span), Zeroing::MayUnmap)
        } else {
            Ok(())
        }
    }

    /// Whether table entries can say that a cluster reads as zero.
    fn can_zero(&self) -> bool {
        self.header.version >= 3 || self.backing.is_none()
    }

    /// The clusters that lie in `span` as a whole; the disk's end completes the last one.
    fn whole(&self, span: Span) -> Run {
        let first = self.geometry.clusters_for(span.start);
        let end = if span.end() == self.header.size {
            self.geometry.clusters_for(span.end())
        } else {
            self.geometry.index(span.end())
        };
        Run { first, count: end.saturating_sub(first) }
    }

    /// Writes zeroes where the guest does not read zeroes anyway.
    fn zero_bytes(&self, span: Span) -> Result<()> {
        let geometry = self.geometry;
        let zeroes = vec![0; to_usize(span.len.min(geometry.cluster()))?];
        let mut offset = span.start;
        while offset < span.end() {
            let left = span.end().saturating_sub(offset);
            let len = left.min(geometry.cluster().saturating_sub(geometry.within(offset)));
            let extent = self.extent_at(offset)?;
            if !(extent.kind.reads_zero() && extent.len >= len) {
                self.write_payload(zeroes.get(..to_usize(len)?).unwrap_or_default(), offset)?;
            }
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    fn zero_clusters(&self, whole: Run, mode: Zeroing) -> Result<()> {
        let mut next = whole.first;
        while next < whole.end() {
            let (l1_index, l2_index) = self.geometry.l1_l2(next);
            let in_table = self.geometry.entries().saturating_sub(to_u64(l2_index));
            let count = whole.end().saturating_sub(next).min(in_table);
            let run = Run { first: next, count };
            let mut metadata = self.wait_for(run);
            let changes = self.changes(&mut metadata, run, mode)?;
            if !changes.is_empty() {
                let table = metadata.own_table(&self.file, l1_index)?;
                self.reach(&metadata)?;
                for (index, entry, free) in changes {
                    self.replace(&mut metadata, (table, index), entry, free)?;
                }
            }
            drop(metadata);
            next = run.end();
            self.make_room()?;
        }
        Ok(())
    }

    /// The lock, at a moment when nobody is about to map clusters of `run`.
    fn wait_for(&self, run: Run) -> MutexGuard<'_, Metadata> {
        let metadata = self.lock();
        self.idle
            .wait_while(metadata, |metadata| metadata.busy.iter().any(|busy| busy.overlaps(run)))
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// L2 index, new entry and whether the old clusters go, for every cluster of `run`
    /// that does not say already that it is zero.
    fn changes(
        &self,
        metadata: &mut Metadata,
        run: Run,
        mode: Zeroing,
    ) -> Result<Vec<(usize, u64, bool)>> {
        let mut changes = Vec::new();
        let mut next = run.first;
        while next < run.end() {
            let left = run.end().saturating_sub(next);
            let (mapping, count) = metadata.run(&self.file, next, left)?;
            // What lies under a cluster without its own data: zeroes, or a backing image.
            let covers = self.backing_from(self.geometry.offset(next)).is_some();
            let is_blank = match mapping {
                Mapping::Unallocated => !covers,
                Mapping::Zero { reserved } => reserved.is_none() || mode == Zeroing::KeepAllocated,
                Mapping::Data(_) | Mapping::Compressed { .. } => false,
            };
            if is_blank {
                next = next.saturating_add(count);
                continue;
            }
            let blank = if self.header.version >= 3 { ZERO } else { 0 };
            for number in 0..count {
                let (_, index) = self.geometry.l1_l2(next.saturating_add(number));
                let (entry, free) = match (mapping, mode) {
                    (Mapping::Data(host), Zeroing::KeepAllocated) if blank == ZERO => {
                        let offset = host.offset.saturating_add(self.geometry.offset(number));
                        let copied = if host.copied { COPIED } else { 0 };
                        (offset | copied | ZERO, false)
                    }
                    (Mapping::Unallocated, _) => (blank, false),
                    _ => (blank, true),
                };
                changes.push((index, entry, free));
            }
            next = next.saturating_add(count);
        }
        Ok(changes)
    }
}
