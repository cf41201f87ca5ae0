// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How often each cluster of the file is referenced, in bounded memory.

use std::collections::HashMap;
use tranship_block::{Error, Result};

/// Clusters that are counted in one piece of memory.
pub(crate) const PAGE: u64 = 4096;
/// Pages of 4 KiB that may exist: enough for 16 TiB of clusters of 64 KiB.
const MOST_PAGES: usize = 1 << 16;
/// Clusters with very many references that may exist.
const MOST_FREQUENT: usize = 1 << 22;

/// Counts of references by cluster. The file may be huge and hollow, so only pages with
/// references exist; counts from 255 on are kept apart.
#[derive(Debug, Default)]
pub(crate) struct References {
    pages: HashMap<u64, Vec<u8>>,
    frequent: HashMap<u64, u64>,
}

impl References {
    /// Counts `times` references to `cluster`; returns how many there are now.
    pub(crate) fn add(&mut self, cluster: u64, times: u64) -> Result<u64> {
        let number = cluster / PAGE;
        if self.pages.len() >= MOST_PAGES && !self.pages.contains_key(&number) {
            return Err(too_large("more clusters"));
        }
        let empty = || vec![0; usize::try_from(PAGE).unwrap_or(0)];
        let page = self.pages.entry(number).or_insert_with(empty);
        let index = usize::try_from(cluster % PAGE).unwrap_or(0);
        let Some(count) = page.get_mut(index) else { return Ok(0) };
        let before = match *count {
            u8::MAX => self.frequent.get(&cluster).copied().unwrap_or(0),
            few => u64::from(few),
        };
        let now = before.saturating_add(times);
        *count = u8::try_from(now).unwrap_or(u8::MAX);
        if *count == u8::MAX {
            if self.frequent.len() >= MOST_FREQUENT {
                return Err(too_large("more clusters with hundreds of references"));
            }
            self.frequent.insert(cluster, now);
        }
        Ok(now)
    }

    pub(crate) fn get(&self, cluster: u64) -> u64 {
        let index = usize::try_from(cluster % PAGE).unwrap_or(0);
        match self.pages.get(&(cluster / PAGE)).and_then(|page| page.get(index)) {
            None => 0,
            Some(&u8::MAX) => self.frequent.get(&cluster).copied().unwrap_or(0),
            Some(few) => u64::from(*few),
        }
    }

    /// Whether a cluster from `first` on up to the end of its page is referenced.
    pub(crate) fn has_page(&self, first: u64) -> bool {
        self.pages.contains_key(&(first / PAGE))
    }

    /// First clusters of all pages with references, in order.
    pub(crate) fn pages(&self) -> Vec<u64> {
        let mut pages: Vec<u64> =
            self.pages.keys().map(|number| number.saturating_mul(PAGE)).collect();
        pages.sort_unstable();
        pages
    }

    /// The highest number of references that a cluster has.
    pub(crate) fn most(&self) -> u64 {
        let few = self.pages.values().flatten().copied().max().unwrap_or(0);
        self.frequent.values().copied().max().unwrap_or(0).max(u64::from(few))
    }

    /// The last cluster that is referenced.
    pub(crate) fn last(&self) -> u64 {
        let Some(first) = self.pages().last().copied() else { return 0 };
        (first..first.saturating_add(PAGE))
            .rev()
            .find(|cluster| self.get(*cluster) > 0)
            .unwrap_or(0)
    }
}

fn too_large(what: &str) -> Error {
    Error::unsupported(format!("image refers to {what} than a check can keep in memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_references_are_counted() {
        let mut references = References::default();
        assert_eq!(references.get(7), 0);
        for number in 1..600 {
            assert_eq!(references.add(7, 1).unwrap(), number);
            assert_eq!(references.get(7), number);
        }
        references.add(1 << 40, 254).unwrap();
        assert_eq!(references.get(1 << 40), 254);
        assert_eq!(references.add(1 << 40, u64::MAX).unwrap(), u64::MAX);
        assert_eq!((references.get(6), references.get(1 << 40)), (0, u64::MAX));
        assert_eq!((references.last(), references.pages()), (1 << 40, vec![0, 1 << 40]));
    }

    #[test]
    fn a_scattered_image_is_refused_before_memory_is_short() {
        let mut references = References::default();
        let error = (0..1 << 20).find_map(|page| references.add(page * PAGE, 1).err()).unwrap();
        assert_eq!(error.kind(), tranship_block::ErrorKind::Unsupported);
    }
}
