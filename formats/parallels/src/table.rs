// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The block allocation table, read in pages as it is needed.

use crate::header::{HEADER_LEN, Header};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{BlockDevice, Error, Result};

/// Entries of a page.
const PAGE: u64 = 16_384;
/// Pages that are kept: 4 MiB.
const KEPT: usize = 64;
/// Entries that one question looks at.
const MAX_RUN: u64 = 4 << 20;

/// Where neighbouring clusters lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not in this file.
    Absent,
    /// One after the other from this byte of the file onward.
    Stored(u64),
}

type Page = Arc<Vec<u32>>;

#[derive(Debug)]
pub(crate) struct Table {
    file: Arc<dyn BlockDevice>,
    header: Header,
    pages: Mutex<VecDeque<(u64, Page)>>,
}

impl Table {
    pub(crate) fn new(file: Arc<dyn BlockDevice>, header: Header) -> Self {
        Self { file, header, pages: Mutex::default() }
    }

    /// Where clusters `first` to `end` lie, as far as they lie in one place; and how many
    /// of them do.
    pub(crate) fn run(&self, first: u64, end: u64) -> Result<(Place, u64)> {
        let place = self.place(first)?;
        let end = end.min(first.saturating_add(MAX_RUN));
        let mut next = first.saturating_add(1);
        while next < end {
            let (page, within) = self.page_of(next)?;
            for entry in page.iter().skip(within) {
                let follows = match place {
                    Place::Absent => *entry == 0,
                    Place::Stored(start) => {
                        let ahead = next.saturating_sub(first);
                        let here = ahead.saturating_mul(self.header.cluster.get());
                        *entry != 0 && self.header.offset(*entry) == start.saturating_add(here)
                    }
                };
                if !follows || next >= end {
                    return Ok((place, next.saturating_sub(first)));
                }
                next = next.saturating_add(1);
            }
        }
        Ok((place, next.saturating_sub(first)))
    }

    fn place(&self, index: u64) -> Result<Place> {
        let (page, within) = self.page_of(index)?;
        match page.get(within) {
            None => Err(Error::usage(format!("cluster {index} is past the end of the BAT"))),
            Some(0) => Ok(Place::Absent),
            Some(entry) => {
                let offset = self.header.offset(*entry);
                let entries = u64::from(self.header.entries);
                let table_end = HEADER_LEN.saturating_add(entries.saturating_mul(4));
                if offset < table_end {
                    return Err(Error::corrupt(format!(
                        "cluster {index} lies at byte {offset}, inside the header or the BAT"
                    ))
                    .at(HEADER_LEN.saturating_add(index.saturating_mul(4))));
                }
                Ok(Place::Stored(offset))
            }
        }
    }

    /// The page that has entry `index`, and where in it.
    fn page_of(&self, index: u64) -> Result<(Page, usize)> {
        let number = index / PAGE;
        let within = usize::try_from(index % PAGE).unwrap_or(usize::MAX);
        let found = self.pages().iter().find(|(at, _)| *at == number).map(|(_, page)| page.clone());
        if let Some(page) = found {
            return Ok((page, within));
        }
        let first = number.saturating_mul(PAGE);
        let count = u64::from(self.header.entries).saturating_sub(first).min(PAGE);
        let len = usize::try_from(count.saturating_mul(4)).unwrap_or(0);
        let mut bytes = vec![0; len];
        self.file.read_at(&mut bytes, HEADER_LEN.saturating_add(first.saturating_mul(4)))?;
        let entries = bytes.as_chunks().0.iter().map(|entry| u32::from_le_bytes(*entry));
        let page = Arc::new(entries.collect::<Vec<_>>());
        let mut pages = self.pages();
        pages.push_front((number, Arc::clone(&page)));
        pages.truncate(KEPT);
        Ok((page, within))
    }

    fn pages(&self) -> std::sync::MutexGuard<'_, VecDeque<(u64, Page)>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
