// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Second-level tables: read in pieces, kept in a cache of bounded size. A table may have
//! a gigabyte, whatever the file has.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{BlockDevice, Result};

/// Entries of a piece: 64 KiB of a table.
pub(crate) const PIECE: u64 = 8192;
/// Pieces in each of the cache's two generations: 4 MiB.
const GENERATION: usize = 64;

/// A part of a table.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) entries: Vec<u64>,
}

/// New pieces go into `young`; when that is full it becomes `old`, and what was in `old`
/// and not asked for is dropped.
#[derive(Debug, Default)]
struct Generations {
    young: HashMap<u64, Arc<Piece>>,
    old: HashMap<u64, Arc<Piece>>,
}

/// The pieces that were read last, by their place in the file.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<Generations>);

impl Cache {
    /// The `entries` entries at byte `at` of `file`.
    pub(crate) fn get(&self, file: &dyn BlockDevice, at: u64, entries: u64) -> Result<Arc<Piece>> {
        if let Some(piece) = self.find(at) {
            return Ok(piece);
        }
        let piece = Arc::new(Piece { entries: read(file, at, entries)? });
        self.insert(at, Arc::clone(&piece));
        Ok(piece)
    }

    fn find(&self, at: u64) -> Option<Arc<Piece>> {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(piece) = cache.young.get(&at) {
            return Some(Arc::clone(piece));
        }
        let piece = cache.old.remove(&at)?;
        cache.insert(at, Arc::clone(&piece));
        Some(piece)
    }

    fn insert(&self, at: u64, piece: Arc<Piece>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(at, piece);
    }
}

impl Generations {
    fn insert(&mut self, at: u64, piece: Arc<Piece>) {
        if self.young.len() >= GENERATION {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(at, piece);
    }
}

/// Reads `entries` entries at byte `at` of `file`; the caller has bounded their number.
pub(crate) fn read(file: &dyn BlockDevice, at: u64, entries: u64) -> Result<Vec<u64>> {
    let len = entries.saturating_mul(8);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_at(&mut bytes, at)?;
    Ok(bytes.as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry)).collect())
}
