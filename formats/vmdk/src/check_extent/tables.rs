// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both copies of directory and tables: each is looked at, and mended from the other one.

use super::Checker;
use crate::SECTOR;
use crate::directory::{self, is_usable};
use crate::layout::Layout;
use crate::table::{Table, read_table};
use crate::writer::header_len;
use tranship_block::{Error, Repair, Result, Span};

impl Checker<'_> {
    pub(super) fn read_directories(&mut self) -> bool {
        let read = |at: Option<u64>, name: &str| {
            let at = at
                .filter(|at| *at != 0)
                .ok_or_else(|| Error::corrupt(format!("the header names no {name}")))?;
            directory::read_at(&self.storage, &self.layout, at, name, false)
        };
        let primary = read(self.layout.directory, "grain directory");
        let redundant = self.layout.redundant.map(|at| read(Some(at), "redundant grain directory"));
        match redundant {
            Some(Ok(redundant)) => self.redundant = redundant,
            Some(Err(error)) => self.corruption(|| error.to_string()),
            None => {}
        }
        match primary {
            Ok(primary) => {
                self.primary = primary;
                true
            }
            Err(error) => {
                self.corruption(|| error.to_string());
                false
            }
        }
    }

    /// Finds directory entries that lead nowhere while their other copy does not.
    pub(super) fn mend_directories(&mut self) -> Result<()> {
        let size = self.storage.size();
        for index in 0..self.primary.len() {
            let own = self.primary.get(index).copied().unwrap_or(0);
            let copy = self.redundant.get(index).copied().unwrap_or(0);
            let usable = |entry| is_usable(&self.layout, entry, size);
            match (usable(own), usable(copy)) {
                (true, true) => {}
                (false, true) => {
                    self.mended(|| {
                        format!("grain directory entry {index} is {own:#x}: its copy is used")
                    });
                    self.copy_table(index, copy, false)?;
                }
                (true, false) if self.redundant.is_empty() => {}
                (true, false) => {
                    self.mended(|| format!("redundant grain directory entry {index} is {copy:#x}"));
                    self.copy_table(index, own, true)?;
                }
                (false, false) if own == 0 && copy == 0 => {}
                (false, false) => self.corruption(|| {
                    format!("grain directory entry {index} is {own:#x}, which is no table")
                }),
            }
        }
        Ok(())
    }

    /// Gives directory entry `index` a table of its own, the same as the one at `entry`.
    fn copy_table(&mut self, index: usize, entry: u32, redundant: bool) -> Result<()> {
        let (list, directory) = if redundant {
            (&mut self.redundant, self.layout.redundant)
        } else {
            (&mut self.primary, self.layout.directory)
        };
        let (Some(slot), Some(directory)) = (list.get_mut(index), directory) else {
            return Ok(());
        };
        if self.repair != Repair::All {
            *slot = entry;
            return Ok(());
        }
        let mut bytes = vec![0; usize::try_from(self.layout.table_stride()).unwrap_or(0)];
        let from = self.layout.table_at(entry);
        let len = usize::try_from(self.layout.table_len()).unwrap_or(0);
        self.storage.read_at(bytes.get_mut(..len).unwrap_or_default(), from)?;
        let at = self.storage.size().div_ceil(SECTOR).saturating_mul(SECTOR);
        let sector = u32::try_from(at / SECTOR).map_err(|_| {
            Error::unsupported("the file has 2 TiB: there is no room for another grain table")
        })?;
        self.storage.set_len(at.saturating_add(self.layout.table_stride()))?;
        self.storage.write_at(&bytes, at)?;
        self.storage.flush()?;
        *slot = sector;
        let offset = u64::try_from(index).unwrap_or(u64::MAX).saturating_mul(4);
        self.storage.write_at(&sector.to_le_bytes(), directory.saturating_add(offset))?;
        self.storage.flush()
    }

    /// Finds tables and directories that lie on each other. Nothing is mended then: what is
    /// written to one would damage the other.
    pub(super) fn check_entangled(&mut self) {
        let (layout, size) = (&self.layout, self.storage.size());
        let copies = self.redundant.iter().copied().chain(std::iter::repeat(0));
        let mut areas: Vec<Span> = self
            .primary
            .iter()
            .copied()
            .zip(copies)
            // Both entries of one number may name the same table, but no others.
            .flat_map(|(own, copy)| [own, if copy == own { 0 } else { copy }])
            .filter(|entry| is_usable(layout, *entry, size))
            .map(|entry| Span::new(layout.table_at(entry), layout.table_len()))
            .collect();
        areas.extend(metadata_in_front(layout));
        areas.sort_unstable_by_key(|area| area.start);
        let overlaps =
            areas.windows(2).filter(|pair| matches!(pair, [a, b] if a.end() > b.start)).count();
        if overlaps > 0 {
            self.corruption(|| format!("{overlaps} tables and directories lie on others"));
            self.repair = Repair::Nothing;
        }
    }

    /// Looks at both copies of table `index`.
    pub(super) fn check_table(&mut self, index: usize) -> Result<()> {
        let own_entry = self.primary.get(index).copied().unwrap_or(0);
        let copy_entry = self.redundant.get(index).copied().unwrap_or(0);
        if own_entry == 0 || !is_usable(&self.layout, own_entry, self.storage.size()) {
            return Ok(());
        }
        let own = read_table(&self.storage, &self.layout, index, own_entry)?;
        let copy = if copy_entry == 0 || copy_entry == own_entry {
            None
        } else {
            Some(read_table(&self.storage, &self.layout, index, copy_entry)?)
        };
        let same = copy.as_ref().is_none_or(|copy| *copy == own);
        if same && own.uniform() == Some(0) {
            return Ok(());
        }
        let count = self.layout.table_entries.get();
        let first = u64::try_from(index).unwrap_or(u64::MAX).saturating_mul(count);
        let mut merged = own.clone();
        for number in 0..count {
            let grain = first.saturating_add(number);
            if grain >= self.layout.grains() {
                break;
            }
            let entry = self.better(&own, copy.as_ref(), grain, number);
            if entry != own.entry(number)
                && let Some(entries) = merged.narrow(count)
                && let Some(slot) = entries.get_mut(usize::try_from(number).unwrap_or(usize::MAX))
            {
                *slot = u32::try_from(entry).unwrap_or(0);
            }
            self.check_grain(grain, entry);
        }
        if !same || merged != own {
            let differs = !same;
            self.mended(|| {
                format!(
                    "grain table {index} {}",
                    if differs { "differs from its copy" } else { "is damaged" }
                )
            });
            if self.repair == Repair::All {
                self.store(&merged, copy_entry)?;
                self.store(&merged, own_entry)?;
            }
        }
        Ok(())
    }

    fn store(&self, table: &Table, entry: u32) -> Result<()> {
        if entry == 0 {
            return Ok(());
        }
        let mut bytes = Vec::new();
        for number in 0..self.layout.table_entries.get() {
            bytes.extend(u32::try_from(table.entry(number)).unwrap_or(0).to_le_bytes());
        }
        self.storage.write_at(&bytes, self.layout.table_at(entry))?;
        self.storage.flush()
    }

    /// The entry of a grain that can be trusted most: of a table that was lost its copy
    /// knows more, and otherwise the primary table is right.
    fn better(&self, own: &Table, copy: Option<&Table>, grain: u64, number: u64) -> u64 {
        let entry = own.entry(number);
        let Some(copy) = copy else { return entry };
        let other = copy.entry(number);
        let good = |entry| self.fault(grain, entry).is_none();
        if entry != other && other != 0 && good(other) && (entry == 0 || !good(entry)) {
            return other;
        }
        entry
    }
}

/// Header, descriptor and directories.
fn metadata_in_front(layout: &Layout) -> Vec<Span> {
    let len = layout.directory_entries.saturating_mul(layout.entry_len());
    let redundant = layout.redundant.filter(|at| Some(*at) != layout.directory);
    let directories = layout.directory.into_iter().chain(redundant);
    let header = [Span::new(0, header_len(layout))];
    header
        .into_iter()
        .chain(layout.descriptor)
        .chain(directories.map(|at| Span::new(at, len)))
        .collect()
}
