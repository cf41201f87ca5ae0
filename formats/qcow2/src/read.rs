// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Moving payload out of the image.

use crate::compressed::{self, Place};
use crate::geometry::{Mapping, to_u64, to_usize};
use crate::image::Qcow2;
use std::sync::{Arc, PoisonError};
use tranship_block::{BlockDevice, Error, Result};

impl Qcow2 {
    /// Fills `buf`, whose range was checked and which the caller protects by `in_use`.
    pub(crate) fn read_payload(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let geometry = self.geometry;
        while !buf.is_empty() {
            let within = geometry.within(offset);
            let wanted = to_u64(buf.len());
            let most = geometry.clusters_for(wanted.saturating_add(within));
            let first = geometry.index(offset);
            let (mapping, count) = self.lock().run(&self.file, first, most)?;
            let count = if matches!(mapping, Mapping::Compressed { .. }) { 1 } else { count };
            let len = geometry.offset(count).saturating_sub(within).min(wanted);
            let (now, rest) = buf
                .split_at_mut_checked(to_usize(len)?)
                .ok_or_else(|| Error::usage("read is longer than its buffer").at(offset))?;
            match mapping {
                Mapping::Unallocated => self.read_backing(now, offset)?,
                Mapping::Zero { .. } => now.fill(0),
                Mapping::Data(host) => self.read_data(now, host.offset.saturating_add(within))?,
                Mapping::Compressed { start, len } => {
                    self.read_compressed(now, (start, len), to_usize(within)?)?;
                }
            }
            buf = rest;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    /// Bytes past the file's end were never written or were lost: not zeroes.
    fn read_data(&self, buf: &mut [u8], host: u64) -> Result<()> {
        if host.saturating_add(to_u64(buf.len())) > self.file.size() {
            let cluster = self.geometry.offset(self.geometry.index(host));
            return Err(Error::corrupt(format!(
                "data in the cluster at {cluster:#x} or after it lies past the file's {} bytes: \
                 the image is incomplete",
                self.file.size()
            ))
            .at(host));
        }
        self.file.read_at(buf, host)
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

    fn read_compressed(&self, buf: &mut [u8], place: Place, within: usize) -> Result<()> {
        let cluster_len = self.geometry.cluster_len();
        let kept = self.inflated.lock().unwrap_or_else(PoisonError::into_inner).get(place);
        let cluster = if let Some(kept) = kept {
            kept
        } else {
            let read = compressed::read(&self.file, self.compression(), place, cluster_len)?;
            let read = Arc::new(read);
            // Whoever reads whole clusters does not come back for the rest of this one.
            if buf.len() < cluster_len {
                self.inflated
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .put(place, Arc::clone(&read));
            }
            read
        };
        let bytes = cluster
            .get(within..)
            .and_then(|tail| tail.get(..buf.len()))
            .ok_or_else(|| Error::corrupt("compressed cluster is too short").at(place.0))?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}
