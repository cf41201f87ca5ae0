// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cache of ldconfig, `/etc/ld.so.cache`, in the format of glibc 2.2 and later.
//!
//! After an optional older table comes the header: magic and version (20 bytes), `nlibs`,
//! `len_strings`, flags, extension offset and reserved words (48 bytes in all). Entries of 24
//! bytes follow: flags, offset of the name, offset of the path, OS version, hardware capabilities.

use std::collections::BTreeMap;
use std::path::PathBuf;

const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const HEADER: usize = 48;
const ENTRY: usize = 24;

/// Paths by library name, in the order of the cache. A cache that cannot be read is an empty one:
/// the default directories are searched all the same.
pub(crate) fn parse(data: &[u8]) -> BTreeMap<String, Vec<PathBuf>> {
    let mut libraries: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let Some(start) = data.windows(MAGIC.len()).position(|window| window == MAGIC) else {
        return libraries;
    };
    let table = data.get(start..).unwrap_or_default();
    let count = word(table, MAGIC.len()).unwrap_or(0);
    let entries = table.get(HEADER..).unwrap_or_default().chunks_exact(ENTRY).take(count);
    for entry in entries {
        // Entries with capabilities are builds for newer processors; the plain ones run everywhere.
        if entry.get(16..24) != Some(&[0; 8]) {
            continue;
        }
        let name = word(entry, 4).and_then(|at| text(table, at));
        let path = word(entry, 8).and_then(|at| text(table, at));
        if let (Some(name), Some(path)) = (name, path) {
            libraries.entry(name).or_default().push(PathBuf::from(path));
        }
    }
    libraries
}

fn word(data: &[u8], at: usize) -> Option<usize> {
    let raw = data.get(at..)?.first_chunk()?;
    usize::try_from(u32::from_le_bytes(*raw)).ok()
}

fn text(table: &[u8], at: usize) -> Option<String> {
    let name = table.get(at..)?.split(|&b| b == 0).next()?;
    String::from_utf8(name.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(entries: &[(&str, &str, u64)]) -> Vec<u8> {
        let mut table = MAGIC.to_vec();
        table.extend(u32::try_from(entries.len()).unwrap().to_le_bytes());
        table.resize(HEADER, 0);
        let mut strings = Vec::new();
        let base = HEADER + ENTRY * entries.len();
        for (name, path, capabilities) in entries {
            table.extend(0x303_u32.to_le_bytes());
            for string in [name, path] {
                table.extend(u32::try_from(base + strings.len()).unwrap().to_le_bytes());
                strings.extend(string.bytes().chain([0]));
            }
            table.extend(0_u32.to_le_bytes());
            table.extend(capabilities.to_le_bytes());
        }
        table.extend(strings);
        table
    }

    #[test]
    fn plain_entries_are_found_behind_an_old_table() {
        let mut data = b"ld.so-1.7.0 old table".to_vec();
        data.extend(cache(&[
            ("libz.so.1", "/opt/v3/libz.so.1", 1 << 62),
            ("libz.so.1", "/usr/lib/libz.so.1", 0),
        ]));
        assert_eq!(parse(&data)["libz.so.1"], [PathBuf::from("/usr/lib/libz.so.1")]);
    }

    #[test]
    fn broken_caches_give_what_is_whole() {
        let data = cache(&[("a", "/a", 0), ("b", "/b", 0)]);
        for cut in 0..data.len() {
            assert!(parse(&data[..cut]).len() <= 2);
        }
        assert!(parse(b"nothing").is_empty());
    }
}
