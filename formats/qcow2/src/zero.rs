// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making ranges zero: whole clusters and subclusters in the tables, the rest by writing.

use crate::geometry::{COPIED, Mapping, ZERO, to_u64, to_usize};
use crate::image::Qcow2;
use crate::metadata::{Metadata, Run};
use crate::write::{ALL_ALLOCATED, Change};
use tranship_block::{BlockDevice, Result, Span, Zeroing};

impl Qcow2 {
    /// Makes `span` zero.
    pub(crate) fn zero(&self, span: Span, mode: Zeroing) -> Result<()> {
        let whole = self.whole(span);
        if whole.is_empty() || !self.can_zero() {
            return self.zero_bytes(span);
        }
        let before = whole.start.saturating_sub(span.start);
        self.zero_bytes(Span::new(span.start, before))?;
        self.zero_units(whole, mode)?;
        self.zero_bytes(Span::new(whole.end(), span.end().saturating_sub(whole.end())))
    }

    /// Whole clusters and subclusters of `span` become zero, the rest stays.
    pub(crate) fn discard_units(&self, span: Span) -> Result<()> {
        // Without zero clusters the backing image would show through.
        let whole = self.whole(span);
        if self.can_zero() && !whole.is_empty() {
            self.zero_units(whole, Zeroing::MayUnmap)
        } else {
            Ok(())
        }
    }

    /// Whether the most of `span` can become zero by table entries alone.
    pub(crate) fn is_mostly_whole(&self, span: Span) -> bool {
        self.can_zero() && self.whole(span).len >= span.len.div_ceil(2)
    }

    /// Whether table entries can say that a cluster reads as zero.
    fn can_zero(&self) -> bool {
        self.header.version >= 3 || self.backing.is_none()
    }

    /// The part of `span` that covers what is mapped on its own; the disk's end completes
    /// the last piece.
    fn whole(&self, span: Span) -> Span {
        let rest = self.geometry.unit().wrapping_sub(1);
        let start = span.start.saturating_add(rest) & !rest;
        let end = if span.end() == self.header.size { span.end() } else { span.end() & !rest };
        Span::new(start, end.saturating_sub(start))
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

    /// Makes whole clusters and subclusters zero.
    fn zero_units(&self, span: Span, mode: Zeroing) -> Result<()> {
        let geometry = self.geometry;
        if let Some(data) = &self.data {
            // Freed or not, bytes of the data file have this one place: they go at once.
            // A raw data file has to be zero; any other is spared the space.
            if self.header.is_data_file_raw() {
                data.write_zeroes(span, mode)?;
            } else if mode == Zeroing::MayUnmap {
                data.discard(span)?;
            }
        }
        let mut next = geometry.index(span.start);
        let last = geometry.clusters_for(span.end());
        while next < last {
            let (_, l2_index) = geometry.l1_l2(next);
            let in_table = geometry.entries().saturating_sub(to_u64(l2_index));
            let count = last.saturating_sub(next).min(in_table);
            let run = Run { first: next, count };
            let mut metadata = self.wait_for(run);
            let (changes, compressed) = self.changes(&mut metadata, run, span, mode)?;
            if !changes.is_empty() {
                self.own_tables(&mut metadata, run)?;
                for change in changes {
                    self.replace(&mut metadata, change)?;
                }
            }
            drop(metadata);
            for part in compressed {
                self.zero_bytes(part)?;
            }
            next = run.end();
            self.make_room()?;
        }
        Ok(())
    }

    /// New entries for the clusters of `run` that do not say already that they are zero in
    /// `span`; and the parts of compressed clusters, which cannot say so.
    fn changes(
        &self,
        metadata: &mut Metadata,
        run: Run,
        span: Span,
        mode: Zeroing,
    ) -> Result<(Vec<Change>, Vec<Span>)> {
        let geometry = self.geometry;
        let mut changes = Vec::new();
        let mut compressed = Vec::new();
        let mut next = run.first;
        while next < run.end() {
            if geometry.extended {
                let cluster = Span::new(geometry.offset(next), geometry.cluster());
                let start = span.start.max(cluster.start);
                let end = span.end().min(cluster.end());
                let part = Span::new(start, end.saturating_sub(start));
                match self.change_units(metadata, next, part, mode)? {
                    Ok(change) => changes.extend(change),
                    Err(part) => compressed.push(part),
                }
                next = next.saturating_add(1);
                continue;
            }
            let left = run.end().saturating_sub(next);
            let (mapping, count) = metadata.lookup(&self.file, next, left)?;
            // What lies under a cluster without its own data: zeroes, or a backing image.
            let covers = self.backing_from(geometry.offset(next)).is_some();
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
                let cluster = next.saturating_add(number);
                let (entry, free) = match (mapping, mode) {
                    (Mapping::Data(host), Zeroing::KeepAllocated) if blank == ZERO => {
                        let offset = host.offset.saturating_add(geometry.offset(number));
                        let copied = if host.copied { COPIED } else { 0 };
                        (offset | copied | ZERO, false)
                    }
                    (Mapping::Unallocated, _) => (blank, false),
                    _ => (blank, true),
                };
                changes.push(Change { cluster, entry, bitmap: 0, free });
            }
            next = next.saturating_add(count);
        }
        Ok((changes, compressed))
    }

    /// The new entry for `part` of a cluster with subclusters, if it changes; the part
    /// itself if it has to be written.
    fn change_units(
        &self,
        metadata: &mut Metadata,
        cluster: u64,
        part: Span,
        mode: Zeroing,
    ) -> Result<std::result::Result<Option<Change>, Span>> {
        let geometry = self.geometry;
        let guest = geometry.offset(cluster);
        let (entry, bitmap) = metadata.entry_of(&self.file, cluster)?;
        let mapping = geometry.mapping(entry, guest)?;
        let mut units = self.units_in(part, cluster);
        if part.end() == self.header.size {
            // Nobody sees what lies behind the disk's end.
            units |= self.units_in(Span::new(part.end(), u64::MAX), cluster);
        }
        let is_compressed = matches!(mapping, Mapping::Compressed { .. });
        if is_compressed && units != ALL_ALLOCATED {
            return Ok(Err(part));
        }
        if matches!(mapping, Mapping::Unallocated)
            && bitmap == 0
            && self.backing_from(guest).is_none()
        {
            return Ok(Ok(None));
        }
        let zero = (bitmap & !units) | units.wrapping_shl(32);
        let is_kept = mode == Zeroing::KeepAllocated && !is_compressed;
        let change = if zero & ALL_ALLOCATED == 0 && !is_kept {
            Change { cluster, entry: 0, bitmap: zero, free: entry != 0 }
        } else {
            Change { cluster, entry, bitmap: zero, free: false }
        };
        let is_same = change.entry == entry && change.bitmap == bitmap;
        Ok(Ok((!is_same).then_some(change)))
    }
}
