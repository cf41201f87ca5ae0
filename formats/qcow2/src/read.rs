// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Moving payload out of the image.
//!
//! The lock is held for looking clusters up, never while payload is read or inflated.

use crate::compressed::{self, Place};
use crate::geometry::{Mapping, to_u64, to_usize};
use crate::image::Qcow2;
use std::sync::{Arc, PoisonError};
use tranship_block::{BlockDevice, Error, Result};

/// Most compressed clusters that are looked up at once.
const MOST_PLACES: usize = 1024;

impl Qcow2 {
    /// Fills `buf`, whose range was checked and which the caller protects by `in_use`.
    pub(crate) fn read_payload(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let geometry = self.geometry;
        while !buf.is_empty() {
            let unit = geometry.unit();
            let within = offset & unit.wrapping_sub(1);
            let wanted = to_u64(buf.len());
            let most = wanted.saturating_add(within).div_ceil(unit);
            let mut metadata = self.lock();
            let (mapping, count) =
                metadata.lookup(&self.file, offset.wrapping_shr(geometry.unit_bits()), most)?;
            let mut len = count.saturating_mul(unit).saturating_sub(within).min(wanted);
            let mut places = Vec::new();
            if let Mapping::Compressed { .. } = mapping {
                let clusters = geometry.clusters_for(geometry.within(offset).saturating_add(len));
                let most = to_usize(clusters)?.min(MOST_PLACES);
                places = metadata.compressed(&self.file, geometry.index(offset), most)?;
                let there = geometry.offset(to_u64(places.len()));
                len = len.min(there.saturating_sub(geometry.within(offset)));
            }
            drop(metadata);
            let (now, rest) = buf
                .split_at_mut_checked(to_usize(len)?)
                .ok_or_else(|| Error::usage("read is longer than its buffer").at(offset))?;
            match mapping {
                Mapping::Unallocated => self.read_backing(now, offset)?,
                Mapping::Zero { .. } => now.fill(0),
                Mapping::Data(host) => {
                    self.load(now, host.offset.saturating_add(within), offset)?;
                }
                Mapping::Compressed { .. } => self.read_compressed(now, &places, offset)?,
            }
            buf = rest;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    /// What the backing image has; zeroes where it is shorter than this one.
    fn read_backing(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some((backing, left)) = self.backing_from(offset) else {
            buf.fill(0);
            return Ok(());
        };
        let there = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let (now, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        backing.read_at(now, offset)
    }

    /// Whole clusters are inflated into `buf`, others through the ones that are kept.
    fn read_compressed(
        &self,
        mut buf: &mut [u8],
        mut places: &[Place],
        mut offset: u64,
    ) -> Result<()> {
        let cluster_len = self.geometry.cluster_len();
        while let Some((first, others)) = places.split_first() {
            let within = to_usize(self.geometry.within(offset))?;
            let whole = buf.len().checked_div(cluster_len).unwrap_or(0).min(places.len());
            let taken = if within == 0 && whole > 0 {
                let len = whole.saturating_mul(cluster_len);
                let now = buf.get_mut(..len).unwrap_or_default();
                let (now_places, rest) = places.split_at_checked(whole).unwrap_or((places, &[]));
                compressed::read(&self.file, self.compression(), now_places, now, cluster_len)?;
                places = rest;
                len
            } else {
                let len = cluster_len.saturating_sub(within).min(buf.len());
                self.read_part(buf.get_mut(..len).unwrap_or_default(), *first, within)?;
                places = others;
                len
            };
            buf = buf.get_mut(taken..).unwrap_or_default();
            offset = offset.saturating_add(to_u64(taken));
            if buf.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// A part of a cluster; who reads parts comes back for the rest.
    fn read_part(&self, buf: &mut [u8], place: Place, within: usize) -> Result<()> {
        let cluster_len = self.geometry.cluster_len();
        let kept = self.inflated.lock().unwrap_or_else(PoisonError::into_inner).get(place);
        let cluster = if let Some(kept) = kept {
            kept
        } else {
            let mut cluster = vec![0; cluster_len];
            compressed::read(&self.file, self.compression(), &[place], &mut cluster, cluster_len)?;
            let cluster = Arc::new(cluster);
            self.inflated
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .put(place, Arc::clone(&cluster));
            cluster
        };
        let bytes = cluster
            .get(within..)
            .and_then(|tail| tail.get(..buf.len()))
            .ok_or_else(|| Error::corrupt("compressed cluster is too short").at(place.0))?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}
