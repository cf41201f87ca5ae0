// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Metadata contexts: what block status can tell of an export.

use crate::export::Export;
use crate::wire::allocation;
use tranship_block::{Error, ExtentKind, Result};

const DEPTH: &str = "qemu:allocation-depth";
const BITMAP: &str = "qemu:dirty-bitmap:";

/// Longest name of a bitmap: its context has to fit into a string of the protocol.
pub(crate) const LONGEST_BITMAP: usize = crate::wire::MAX_STRING.saturating_sub(BITMAP.len());

/// As many contexts as one client can select; a set of them fits into a `u64`.
pub(crate) const MOST_CONTEXTS: usize = 64;

/// One thing that block status can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Context {
    /// Data, zeroes or nothing.
    Allocation,
    /// Which layer of a chain of images the bytes come from.
    Depth,
    /// Whether a bitmap of the export, by its place in the list, has the bytes as dirty.
    Bitmap(usize),
}

impl Context {
    /// Everything that block status can tell of `export`.
    pub(crate) fn all(export: &Export) -> impl Iterator<Item = Self> {
        let depth = export.depth.then_some(Self::Depth);
        let bitmaps = (0..export.bitmaps.len()).map(Self::Bitmap);
        [Self::Allocation].into_iter().chain(depth).chain(bitmaps)
    }

    /// The name that clients know it by.
    pub(crate) fn name(self, export: &Export) -> String {
        match self {
            Self::Allocation => allocation::NAME.to_owned(),
            Self::Depth => DEPTH.to_owned(),
            Self::Bitmap(place) => {
                let name = export.bitmaps.get(place).map_or("", |bitmap| &bitmap.name);
                format!("{BITMAP}{name}")
            }
        }
    }

    /// What the list of contexts has for `queries`: all without any, and whole families
    /// where a query ends in a colon.
    pub(crate) fn listed(export: &Export, queries: &[&str]) -> Vec<Self> {
        Self::all(export)
            .filter(|context| {
                let name = context.name(export);
                queries.is_empty()
                    || queries.iter().any(|query| {
                        name == *query || query.ends_with(':') && name.starts_with(query)
                    })
            })
            .collect()
    }

    /// What a selection by `queries` has: exact names, each once.
    pub(crate) fn selected(export: &Export, queries: &[&str]) -> Vec<Self> {
        Self::all(export)
            .filter(|context| queries.contains(&context.name(export).as_str()))
            .take(MOST_CONTEXTS)
            .collect()
    }

    /// The flags of the bytes from `offset` onward, and for how many bytes they hold.
    pub(crate) fn at(self, export: &Export, offset: u64) -> Result<(u64, u64)> {
        if let Self::Bitmap(place) = self {
            let bitmap = export.bitmaps.get(place).ok_or_else(|| Error::usage("no such bitmap"))?;
            let (dirty, len) = bitmap.bitmap.dirty_at(offset)?;
            return Ok((u64::from(dirty), len));
        }
        let extent = export.device.extent_at(offset)?;
        let flags = match (self, extent.kind) {
            (Self::Depth, ExtentKind::Hole) if !export.whole_layers.contains(&extent.depth) => 0,
            (Self::Depth, _) => u64::from(extent.depth).saturating_add(1),
            (_, ExtentKind::Data) => 0,
            // What an image marks as zero has no storage that could be counted on.
            (_, ExtentKind::Zero | ExtentKind::Hole) => {
                u64::from(allocation::HOLE | allocation::ZERO)
            }
        };
        Ok((flags, extent.len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::{DirtyBitmap, ExportedBitmap};
    use std::sync::Arc;
    use tranship_block::MemoryDevice;

    #[derive(Debug)]
    struct Odd;

    impl DirtyBitmap for Odd {
        fn dirty_at(&self, offset: u64) -> Result<(bool, u64)> {
            Ok((offset % 2 == 1, 1))
        }
    }

    fn export() -> Export {
        let bitmap = |name: &str| ExportedBitmap { name: name.to_owned(), bitmap: Arc::new(Odd) };
        Export {
            depth: true,
            bitmaps: vec![bitmap("a"), bitmap("b:")],
            ..Export::new("vda", Arc::new(MemoryDevice::new(vec![0; 4096])))
        }
    }

    #[test]
    fn a_query_names_one_context_and_in_a_list_also_a_family() {
        let export = export();
        let names = |contexts: Vec<Context>| {
            contexts.iter().map(|context| context.name(&export)).collect::<Vec<_>>()
        };
        let all =
            ["base:allocation", DEPTH, "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b:"].as_slice();
        let table: [(&[&str], &[&str], &[&str]); 8] = [
            (&[], all, &[]),
            (&["base:"], &all[..1], &[]),
            (&["qemu:"], &all[1..], &[]),
            (&["qemu:dirty-bitmap:"], &all[2..], &[]),
            (&["qemu:dirty-bitmap:b:"], &all[3..], &all[3..]),
            (&["base:allocation", "base:allocation"], &all[..1], &all[..1]),
            (&["qemu:dirty-bitmap:c", "base", "", ":", "qemu:dirty"], &[], &[]),
            (&[DEPTH, "base:allocation"], &all[..2], &all[..2]),
        ];
        for (queries, listed, selected) in table {
            assert_eq!(names(Context::listed(&export, queries)), listed, "{queries:?}");
            assert_eq!(names(Context::selected(&export, queries)), selected, "{queries:?}");
        }
    }

    #[test]
    fn a_bitmap_tells_of_itself_and_depth_of_layers() {
        let export = export();
        assert_eq!(Context::Bitmap(0).at(&export, 7).unwrap(), (1, 1));
        assert_eq!(Context::Bitmap(0).at(&export, 8).unwrap(), (0, 1));
        assert_eq!(Context::Depth.at(&export, 0).unwrap(), (0, 4096));
        let raw = Export { whole_layers: vec![0], ..export.clone() };
        assert_eq!(Context::Depth.at(&raw, 0).unwrap(), (1, 4096));
        assert_eq!(Context::Allocation.at(&export, 0).unwrap(), (3, 4096));
        assert!(Context::Bitmap(2).at(&export, 0).is_err());
    }
}
