// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guessing a format from a file's first and last bytes.

use crate::Format;
use std::path::Path;
use tranship_block::{BigEndian, BlockDevice, LittleEndian, Result};

/// Bytes at the start that decide: a hand-made descriptor may begin with comments.
const HEAD: u64 = 4096;

/// In the shell script that cloop images begin with.
const CLOOP: &[u8] = b"#V2.0 Format";

/// What `device` seems to hold; [`Format::Raw`] if nothing else fits.
///
/// A guest that can write to a raw disk can make it look like any format. The answer is
/// good for a file that its user names, never for deciding what an image's backing file
/// is. `name` decides nothing, since names lie more often than magic numbers; it is what
/// errors call the file.
///
/// # Errors
///
/// I/O errors.
pub fn probe(device: &dyn BlockDevice, name: &Path) -> Result<Format> {
    probe_bytes(device).map_err(|error| error.in_file(name))
}

fn probe_bytes(device: &dyn BlockDevice) -> Result<Format> {
    let size = device.size();
    let len = usize::try_from(size.min(HEAD)).unwrap_or(0);
    let mut head = vec![0; len];
    device.read_at(&mut head, 0)?;
    if let Some(format) = by_head(&head) {
        return Ok(format);
    }
    // A fixed VHD has a footer only. Old writers made it one byte shorter.
    for footer in [512, 511] {
        let Some(at) = size.checked_sub(footer) else { continue };
        let mut tail = [0; 8];
        device.read_at(&mut tail, at)?;
        match &tail {
            b"conectix" => return Ok(Format::Vpc),
            [b'k', b'o', b'l', b'y', ..] if footer == 512 => return Ok(Format::Dmg),
            _ => {}
        }
    }
    Ok(Format::Raw)
}

fn by_head(head: &[u8]) -> Option<Format> {
    let starts: [(&[u8], Format); 11] = [
        (b"conectix", Format::Vpc),
        (b"vhdxfile", Format::Vhdx),
        (b"QED\0", Format::Qed),
        (b"WithoutFreeSpace", Format::Parallels),
        (b"WithouFreSpacExt", Format::Parallels),
        (b"LUKS\xba\xbe", Format::Luks),
        (b"SKUL\xba\xbe", Format::Luks),
        (b"\x1f\x8b\x08", Format::Gzip),
        (b"\xfd7zXZ\0", Format::Xz),
        (b"\x28\xb5\x2f\xfd", Format::Zstd),
        (b"BZh", Format::Bzip2),
    ];
    if head.starts_with(&tranship_qcow2::MAGIC) {
        let version = BigEndian(head, "qcow header").u32("version", 4).unwrap_or(2);
        return Some(if version == 1 { Format::Qcow } else { Format::Qcow2 });
    }
    if let Some((_, format)) = starts.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some(*format);
    }
    if LittleEndian(head, "VDI header").u32("signature", 0x40).is_ok_and(|raw| raw == 0xbeda_107f) {
        return Some(Format::Vdi);
    }
    // A shell script comes first; what it mounts is told at byte 0 for all known versions.
    if head.windows(CLOOP.len()).take(128).any(|window| window == CLOOP) {
        return Some(Format::Cloop);
    }
    if has_parallels_element(head) {
        return Some(Format::Parallels);
    }
    tranship_vmdk::probe(head).then_some(Format::Vmdk)
}

/// Whether the file is the `DiskDescriptor.xml` of a disk of Parallels.
pub(crate) fn is_parallels_descriptor(device: &dyn BlockDevice) -> Result<bool> {
    let len = usize::try_from(device.size().min(HEAD)).unwrap_or(0);
    let mut head = vec![0; len];
    device.read_at(&mut head, 0)?;
    Ok(has_parallels_element(&head))
}

fn has_parallels_element(head: &[u8]) -> bool {
    const ELEMENT: &[u8] = b"<Parallels_disk_image";
    head.trim_ascii_start().starts_with(b"<")
        && head.windows(ELEMENT.len()).any(|window| window == ELEMENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    #[test]
    fn magic_numbers_decide() {
        let mut vdi = vec![0; 1024];
        vdi[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
        let mut fixed_vhd = vec![0; 1536];
        fixed_vhd[1024..1032].copy_from_slice(b"conectix");
        let mut short_vhd = vec![0; 1535];
        short_vhd[1024..1032].copy_from_slice(b"conectix");
        let mut dmg = vec![0; 1024];
        dmg[512..516].copy_from_slice(b"koly");
        let cases: [(&[u8], Format); 13] = [
            (b"", Format::Raw),
            (b"Q", Format::Raw),
            (&[0; 4096], Format::Raw),
            (b"QFI\xfb", Format::Qcow2),
            (b"QFI\xfb\0\0\0\x03", Format::Qcow2),
            (b"QFI\xfb\0\0\0\x01", Format::Qcow),
            (b"KDMV\x01\0\0\0", Format::Vmdk),
            (b"# Disk DescriptorFile\nversion=1\n", Format::Vmdk),
            (b"vhdxfile", Format::Vhdx),
            (&vdi, Format::Vdi),
            (&fixed_vhd, Format::Vpc),
            (&short_vhd, Format::Vpc),
            (&dmg, Format::Dmg),
        ];
        for (bytes, expected) in cases {
            let device = MemoryDevice::read_only(bytes.to_vec());
            let found = probe(&device, Path::new("disk")).unwrap();
            assert_eq!(found, expected, "{:?}", bytes.get(..8));
        }
    }
}
