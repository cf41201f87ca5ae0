// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The uncompressed ELF kernel inside an x86 bzImage.
//!
//! Entering the ELF kernel directly saves the in-guest decompressor, which costs seconds under
//! emulation. Offsets are those of the Linux/x86 boot protocol (Documentation/arch/x86/boot.rst),
//! version 2.08 or later, where `payload_offset` and `payload_length` exist.

use crate::decompress::{Compression, unpack};
use crate::error::{Error, Result};

/// Largest kernel that is accepted, in bytes. Distribution kernels unpack to 50 to 80 MB.
const KERNEL_LIMIT: usize = 512 << 20;
const SETUP_SECTS: usize = 0x1f1;
const HDRS: usize = 0x202;
const PROTOCOL: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// Setup sectors of a header that says 0.
const DEFAULT_SETUP_SECTS: usize = 4;
const SECTOR: usize = 512;
/// Longest version string that is looked at, in bytes.
const VERSION_LIMIT: usize = 256;

/// A kernel ready for direct entry.
#[derive(Debug)]
pub struct Vmlinux {
    /// The ELF file; bytes behind its last section (relocations) may follow.
    pub elf: Vec<u8>,
    /// What `uname -r` prints in it, if the image says so.
    pub release: Option<String>,
}

/// Takes the ELF kernel out of a bzImage, or `image` itself if it is one already.
///
/// # Errors
///
/// [`crate::ErrorKind::Unsupported`] for anything else than an x86 bzImage or ELF file,
/// [`crate::ErrorKind::Corrupt`] if its header or payload is broken.
pub fn extract(image: &[u8]) -> Result<Vmlinux> {
    if image.starts_with(b"\x7fELF") {
        return Ok(Vmlinux { elf: image.to_vec(), release: release_from_banner(image) });
    }
    if image.get(HDRS..HDRS + 4) != Some(b"HdrS") {
        return Err(Error::unsupported("neither an ELF kernel nor an x86 bzImage"));
    }
    let protocol = u16_at(image, "version", PROTOCOL)?;
    if protocol < 0x208 {
        return Err(Error::unsupported(format!(
            "boot protocol {}.{:02}, expected 2.08 or later",
            protocol >> 8,
            protocol & 0xff
        )));
    }
    let sectors = match image.get(SETUP_SECTS) {
        Some(0) | None => DEFAULT_SETUP_SECTS,
        Some(&n) => usize::from(n),
    };
    let offset = u32_at(image, "payload_offset", PAYLOAD_OFFSET)?;
    let length = u32_at(image, "payload_length", PAYLOAD_LENGTH)?;
    let payload = sectors
        .checked_add(1)
        .and_then(|n| n.checked_mul(SECTOR))
        .and_then(|start| start.checked_add(offset))
        .and_then(|start| image.get(start..start.checked_add(length)?))
        .ok_or_else(|| {
            Error::corrupt(format!(
                "payload at {offset:#x} with {length} bytes lies outside the image of {} bytes",
                image.len()
            ))
        })?;
    let release = release_from_header(image);
    if payload.starts_with(b"\x7fELF") {
        return Ok(Vmlinux { elf: payload.to_vec(), release });
    }
    let kind = Compression::detect(payload).ok_or_else(|| {
        Error::unsupported(format!(
            "kernel payload starts with {:02x?}, which is no known compression",
            payload.get(..6).unwrap_or(payload)
        ))
    })?;
    let elf = unpack(kind, payload, KERNEL_LIMIT)?;
    // The build appends the unpacked size (for gzip it is part of the format): a cheap check
    // that nothing was lost.
    if let Some(size) = payload.last_chunk::<4>().map(|raw| u32::from_le_bytes(*raw))
        && u32::try_from(elf.len()).ok() != Some(size)
    {
        return Err(Error::corrupt(format!(
            "kernel payload unpacks to {} bytes, its trailer says {size}",
            elf.len()
        )));
    }
    if !elf.starts_with(b"\x7fELF") {
        return Err(Error::corrupt("kernel payload is not an ELF file"));
    }
    Ok(Vmlinux { elf, release })
}

/// `kernel_version` points to a string like `6.1.0-56-amd64 (builder) #1 SMP ...`, 0x200 too low.
fn release_from_header(image: &[u8]) -> Option<String> {
    let at = usize::from(u16_at(image, "kernel_version", KERNEL_VERSION).ok()?);
    if at == 0 {
        return None;
    }
    first_word(image.get(at.checked_add(0x200)?..)?)
}

/// The kernel's banner is `Linux version 6.1.0-56-amd64 (builder) ...`.
fn release_from_banner(elf: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    elf.windows(BANNER.len())
        .enumerate()
        .filter(|(_, window)| *window == BANNER)
        .filter_map(|(at, _)| first_word(elf.get(at + BANNER.len()..)?))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
}

/// A word that can be a kernel release and a directory name.
fn first_word(text: &[u8]) -> Option<String> {
    let text = text.get(..VERSION_LIMIT).unwrap_or(text);
    let end = text.iter().position(|&b| b == b' ' || b == 0)?;
    let word = std::str::from_utf8(text.get(..end)?).ok()?;
    is_release(word).then(|| word.to_owned())
}

/// Whether `word` is a plausible kernel release: safe as a file name.
pub(crate) fn is_release(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_digit())
        && word.len() <= 128
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "._+~-".contains(c))
}

fn u16_at(image: &[u8], name: &str, at: usize) -> Result<u16> {
    image
        .get(at..)
        .and_then(|tail| tail.first_chunk())
        .map(|raw| u16::from_le_bytes(*raw))
        .ok_or_else(|| Error::corrupt(format!("setup header ends before {name}")))
}

fn u32_at(image: &[u8], name: &str, at: usize) -> Result<usize> {
    image
        .get(at..)
        .and_then(|tail| tail.first_chunk())
        .map(|raw| u32::from_le_bytes(*raw))
        .and_then(|value| usize::try_from(value).ok())
        .ok_or_else(|| Error::corrupt(format!("setup header ends before {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::decompress::tests::{ALL, pack};

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR];
        image[SETUP_SECTS] = 1;
        image[HDRS..HDRS + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL..PROTOCOL + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&0x100_u16.to_le_bytes());
        let version = b"6.1.0-56-amd64 (somebody) #1\0";
        image[0x300..0x300 + version.len()].copy_from_slice(version);
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16_u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend([0xcc; 16]);
        image.extend(payload);
        image.extend([0xcc; 100]);
        image
    }

    fn kernel() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        elf.extend((0..50_000_u32).flat_map(|n| (n % 999).to_le_bytes()));
        elf.extend(b"Linux version %s\0Linux version 5.14.0-1.el9 (x) #1");
        elf
    }

    #[test]
    fn every_compression_of_the_kernel_is_undone() {
        let kernel = kernel();
        for kind in ALL {
            let mut payload = pack(kind, &kernel);
            if kind != Compression::Gzip {
                payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
            }
            let found = extract(&bzimage(&payload)).unwrap_or_else(|e| panic!("{kind:?}: {e}"));
            assert!(found.elf == kernel, "{kind:?}");
            assert_eq!(found.release.as_deref(), Some("6.1.0-56-amd64"));
        }
    }

    #[test]
    fn an_elf_kernel_is_used_as_it_is() {
        let found = extract(&kernel()).unwrap();
        assert_eq!(found.elf, kernel());
        assert_eq!(found.release.as_deref(), Some("5.14.0-1.el9"));
    }

    #[test]
    fn broken_images_are_named() {
        let good = pack(Compression::Zstd, &kernel());
        let mut wrong_size = good.clone();
        wrong_size.extend([1, 0, 0, 0]);
        let mut outside = bzimage(&good);
        outside[PAYLOAD_LENGTH + 3] = 0x7f;
        let mut old = bzimage(&good);
        old[PROTOCOL] = 7;
        let cases: [(&[u8], ErrorKind, &str); 5] = [
            (b"MZ", ErrorKind::Unsupported, "neither an ELF kernel"),
            (&bzimage(b"garbage"), ErrorKind::Unsupported, "no known compression"),
            (&bzimage(&wrong_size), ErrorKind::Corrupt, "its trailer says 1"),
            (&outside, ErrorKind::Corrupt, "lies outside the image"),
            (&old, ErrorKind::Unsupported, "boot protocol 2.07"),
        ];
        for (image, kind, text) in cases {
            let error = extract(image).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.message().contains(text), "{error}");
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn hostile_headers_never_panic(at in 0x1f0_usize..0x250, value: u8, cut in 0_usize..1200) {
            let mut image = bzimage(b"\x02\x21\x4c\x18\xff\xff\xff\xff1234");
            image[at] = value;
            image.truncate(cut);
            let _ = extract(&image);
        }
    }
}
