// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making an image one of version 2, which has no clusters that only say that they are zero.

use crate::editor::Editor;
use crate::first_cluster::field;
use crate::geometry::{COMPRESSED, COPIED, OFFSET, ZERO, to_usize};
use crate::header::{CORRUPT, DIRTY};
use crate::metadata::Run;
use crate::refcounts::to_bytes;
use crate::shape::read_sparse;
use crate::snapshots::{self, l1_entries};
use std::collections::BTreeMap;
use tranship_block::{Error, Result, Storage};

pub(super) fn downgrade(storage: &dyn Storage) -> Result<()> {
    let mut editor = Editor::open(storage)?;
    let features = editor.header.incompatible_features & !(DIRTY | CORRUPT);
    if features != 0 || editor.header.crypt_method == 2 {
        return Err(Error::unsupported(format!(
            "version 2 for an image with incompatible features {features:#x} and encryption \
             method {}",
            editor.header.crypt_method
        )));
    }
    if !crate::bitmaps::bitmaps(storage)?.is_empty() {
        return Err(Error::unsupported("version 2 for an image with bitmaps, which would be lost"));
    }
    let freed = expand(&mut editor)?;
    // Version 2 ignores nothing that these fields said.
    for at in [field::INCOMPATIBLE, field::COMPATIBLE, field::AUTOCLEAR] {
        editor.first.set_u64(at, 0);
    }
    editor.first.set_version(2, 4);
    editor.commit()?;
    editor.release_all(freed)?;
    crate::repair::mend_flags(storage, &editor.header)
}

/// Replaces zero clusters in all tables by absent ones, or by zeroes where a backing image
/// would show through. Both read the same in either version. Returns what is free then.
fn expand(editor: &mut Editor<'_>) -> Result<Vec<Run>> {
    let storage = editor.storage;
    let geometry = editor.geometry();
    let mut l1 = vec![editor.l1()?];
    for place in snapshots::read(storage, &editor.header)?.places {
        l1.push(l1_entries(storage, place)?);
    }
    // A table may belong to several trees: its clusters have as many references.
    let mut tables = BTreeMap::new();
    for entry in l1.iter().flatten() {
        if let Some(host) = geometry.l2_offset(*entry, 0)? {
            let times = tables.entry(host.offset).or_insert(0_u64);
            *times = times.saturating_add(1);
        }
    }
    let has_backing = editor.header.backing.is_some();
    let zeroes = vec![0; geometry.cluster_len()];
    let mut freed = Vec::new();
    for (offset, times) in tables {
        let mut words = read_sparse(storage, offset, geometry.cluster() / 8)?;
        let mut old = Vec::new();
        let is_zero = |word: u64| word & COMPRESSED == 0 && word & ZERO != 0;
        if !words.iter().any(|word| is_zero(*word)) {
            continue;
        }
        for word in &mut words {
            if !is_zero(*word) {
                continue;
            }
            let reserved = *word & OFFSET;
            if reserved != 0 {
                old.push(reserved);
            }
            *word = 0;
            if has_backing {
                let cluster = editor.store(&zeroes)?;
                editor.set_count(geometry.index(cluster), times)?;
                *word = cluster | if times == 1 { COPIED } else { 0 };
            }
        }
        // New clusters are counted and written before the table refers to them.
        editor.settle()?;
        storage.write_at(&to_bytes(&words), offset)?;
        for reserved in old {
            for _ in 0..to_usize(times)? {
                freed.push(Run { first: geometry.index(reserved), count: 1 });
            }
        }
    }
    storage.flush()?;
    Ok(freed)
}
