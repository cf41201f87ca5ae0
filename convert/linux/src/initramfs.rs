// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is inside an initramfs, and what is missing to start from a virtio disk.
//!
//! The kernel unpacks a sequence of archives, each compressed or not, with zero bytes
//! between them; later files replace earlier ones. A conversion therefore only appends.

use crate::compression::Compression;
use crate::cpio::{DIRECTORY, KIND, LINK, Reader};
use std::collections::{BTreeMap, BTreeSet};
use tranship_inspect::{Error, ErrorKind, Result, module_name};

/// Most bytes that the archives may unpack to together.
const MAX_UNPACKED: u64 = 4 << 30;
/// Most entries, and most bytes of names: a generic image has 5,000 entries.
const MAX_ENTRIES: usize = 500_000;
const MAX_NAMES: usize = 64 << 20;
/// Largest file whose contents are kept.
const MAX_KEPT: u64 = 64 << 10;

/// What is inside an initramfs.
#[derive(Debug, Default)]
pub(crate) struct Initramfs {
    /// Each name, without a leading slash, and its mode.
    entries: BTreeMap<Vec<u8>, u32>,
    /// Targets of symbolic links.
    links: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Contents of the few files that are looked into.
    contents: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Compression of the part with the most entries, which is the real one.
    pub(crate) main: Option<Compression>,
}

/// Paths whose contents are kept.
fn is_kept(name: &[u8]) -> bool {
    name == b"conf/conf.d/resume"
        || name == b"cryptroot/crypttab"
        || (name.starts_with(b"etc/systemd/network/") && name.ends_with(b".link"))
}

impl Initramfs {
    /// Lists what all the parts of an initramfs hold.
    ///
    /// # Errors
    ///
    /// A part is damaged, of an unknown kind, or larger than any real one.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self> {
        let mut found = Self::default();
        let mut rest = bytes;
        let mut names = 0;
        let mut unpacked = 0;
        let mut largest = 0;
        let mut seen = 0_usize;
        loop {
            let padding = rest.iter().take_while(|byte| **byte == 0).count();
            rest = rest.get(padding..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
            let offset = bytes.len().saturating_sub(rest.len());
            let kind = Compression::of(rest).ok_or_else(|| {
                let head: Vec<String> = rest.iter().take(4).map(|b| format!("{b:02x}")).collect();
                let message = format!(
                    "part at byte {offset} begins with {}, which is no known format",
                    head.join(" ")
                );
                Error::new(ErrorKind::Unsupported, message)
            })?;
            let before = rest.len();
            let seen_before = seen;
            let size = kind
                .unpack(&mut rest, &mut |stream| {
                    let mut reader = Reader::new(stream, MAX_UNPACKED.saturating_sub(unpacked));
                    let keep = |name: &[u8], mode: u32| {
                        if mode & KIND == LINK || is_kept(name) { MAX_KEPT } else { 0 }
                    };
                    // Several archives may lie in one compressed stream.
                    loop {
                        let start = reader.position();
                        while let Some(entry) = reader.next(&keep)? {
                            names = entry.name.len().saturating_add(names);
                            seen = seen.saturating_add(1);
                            found.add(entry.name, entry.mode, entry.content);
                            if found.entries.len() > MAX_ENTRIES || names > MAX_NAMES {
                                let message = "holds more names than any real one";
                                return Err(Error::new(ErrorKind::Unsupported, message));
                            }
                        }
                        if kind == Compression::None || reader.position() == start {
                            return Ok(reader.position());
                        }
                    }
                })
                .map_err(|error| {
                    let message = format!("{kind} part at byte {offset} cannot be read");
                    Error::new(error.kind(), message).because(error)
                })?;
            unpacked = unpacked.saturating_add(size);
            let packed = before.saturating_sub(rest.len());
            if packed == 0 {
                let message = format!("part at byte {offset} is empty");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            let entries = seen.saturating_sub(seen_before);
            if entries > largest {
                largest = entries;
                found.main = Some(kind);
            }
        }
        if found.entries.is_empty() {
            return Err(Error::new(ErrorKind::Corrupt, "holds no files"));
        }
        Ok(found)
    }

    fn add(&mut self, name: Vec<u8>, mode: u32, content: Option<Vec<u8>>) {
        match content {
            Some(target) if mode & KIND == LINK => {
                self.links.insert(name.clone(), target);
            }
            content => {
                self.links.remove(&name);
                if let Some(content) = content.filter(|_| is_kept(&name)) {
                    self.contents.insert(name.clone(), content);
                }
            }
        }
        self.entries.insert(name, mode);
    }

    /// Names of the modules inside that belong to this kernel.
    pub(crate) fn modules(&self, version: &str) -> BTreeSet<String> {
        let below = format!("lib/modules/{version}/");
        self.entries
            .keys()
            .filter_map(|name| std::str::from_utf8(name).ok())
            .filter_map(|name| name.strip_prefix("usr/").unwrap_or(name).strip_prefix(&below))
            .filter(|name| name.contains(".ko"))
            .map(module_name)
            .collect()
    }

    /// Contents of one of the files that are looked into.
    pub(crate) fn content(&self, name: &str) -> Option<&[u8]> {
        self.contents.get(name.as_bytes()).map(Vec::as_slice)
    }

    /// Whether there is a directory of this name.
    pub(crate) fn has_directory(&self, name: &[u8]) -> bool {
        self.entries.get(name).is_some_and(|mode| mode & KIND == DIRECTORY)
    }

    /// Where a path lies once the links inside on its way are followed.
    ///
    /// A directory written over a link such as `lib -> usr/lib` would delete the link, and
    /// with it everything that is found through it.
    pub(crate) fn resolve(&self, path: &str) -> Result<Vec<u8>> {
        let mut pending: Vec<Vec<u8>> = parts(path.as_bytes());
        pending.reverse();
        let mut resolved: Vec<Vec<u8>> = Vec::new();
        let mut followed = 0_u32;
        while let Some(part) = pending.pop() {
            if part == b".." {
                resolved.pop();
                continue;
            }
            resolved.push(part);
            // The file itself replaces a link of its name.
            if pending.is_empty() {
                break;
            }
            let Some(target) = self.links.get(&resolved.join(&b'/')) else { continue };
            followed = followed.saturating_add(1);
            if followed > 16 {
                let message = format!("links on the way to {path} lead in a circle");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            resolved.pop();
            if target.first() == Some(&b'/') {
                resolved.clear();
            }
            pending.extend(parts(target).into_iter().rev());
        }
        Ok(resolved.join(&b'/'))
    }
}

fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::tests::pack_any;
    use crate::cpio::Writer;

    fn archive(link: bool) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.directory(b"conf").unwrap();
        if link {
            writer.link(b"lib", b"usr/lib").unwrap();
        } else {
            writer.directory(b"lib").unwrap();
        }
        writer.file(b"usr/lib/modules/6.1/kernel/virtio-blk.ko.xz", 0, b"x").unwrap();
        writer.file(b"conf/conf.d/resume", 0, b"RESUME=auto").unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn all_parts_are_walked_whatever_their_compression() {
        for kind in [
            Compression::None,
            Compression::Gzip,
            Compression::Xz,
            Compression::Zstd,
            Compression::Lz4,
            Compression::Bzip2,
            Compression::Lzma,
        ] {
            let mut early = Writer::default();
            early.file(b"kernel/x86/microcode/GenuineIntel.bin", 0, b"m").unwrap();
            let mut bytes = early.finish().unwrap();
            bytes.resize(1024, 0);
            bytes.extend(pack_any(kind, &archive(true)));
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            let mut added = Writer::default();
            added.file(b"usr/lib/modules/6.1/kernel/virtio.ko", 0, b"x").unwrap();
            bytes.extend(pack_any(kind, &added.finish().unwrap()));
            let found = Initramfs::read(&bytes).unwrap();
            let modules: Vec<_> = found.modules("6.1").into_iter().collect();
            assert_eq!(modules, ["virtio", "virtio_blk"], "{kind}");
            assert_eq!(found.main, Some(kind));
            assert_eq!(found.content("conf/conf.d/resume"), Some(&b"RESUME=auto"[..]));
        }
    }

    #[test]
    fn a_linked_lib_is_never_written_over() {
        for (link, want) in [(true, "usr/lib/modules/6.1/x"), (false, "lib/modules/6.1/x")] {
            let found = Initramfs::read(&archive(link)).unwrap();
            assert_eq!(found.resolve("lib/modules/6.1/x").unwrap(), want.as_bytes());
        }
        let mut found = Initramfs::default();
        found.links.insert(b"lib".to_vec(), b"/lib/../lib".to_vec());
        assert_eq!(found.resolve("lib/x").unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn damaged_images_are_refused_and_never_panic() {
        assert!(Initramfs::read(b"").is_err());
        assert!(Initramfs::read(&[0; 512]).is_err());
        let text = Initramfs::read(b"\0\0MZ\x90\0 unified").unwrap_err().to_string();
        assert_eq!(text, "part at byte 2 begins with 4d 5a 90 00, which is no known format");
        assert_eq!(Initramfs::read(b"\x89LZO123").unwrap_err().kind(), ErrorKind::Unsupported);
        for kind in [Compression::Gzip, Compression::Xz, Compression::Zstd, Compression::Lz4] {
            let bytes = pack_any(kind, &archive(true));
            for len in (1..bytes.len()).step_by(7) {
                let cut = Initramfs::read(&bytes[..len]);
                assert!(cut.is_err(), "{kind} cut at {len}");
            }
        }
    }
}
