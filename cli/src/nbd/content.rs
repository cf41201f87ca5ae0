// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What seems to be in an export, by its first bytes.

use std::path::Path;
use tranship_block::{BlockDevice, Result};
use tranship_formats::Format;

/// Bytes at the start in which all of them are known.
const HEAD: u64 = (64 << 10) + 512;

/// What is where. Partition tables come last: some filesystems end their boot sector alike.
const KNOWN: &[(usize, &[u8], &str)] = &[
    (0x438, b"\x53\xef", "ext2, ext3 or ext4 filesystem"),
    (0, b"XFSB", "XFS filesystem"),
    (0x1_0040, b"_BHRfS_M", "Btrfs filesystem"),
    (3, b"-FVE-FS-", "BitLocker volume"),
    (3, b"NTFS    ", "NTFS filesystem"),
    (3, b"EXFAT   ", "exFAT filesystem"),
    (82, b"FAT32   ", "FAT filesystem"),
    (54, b"FAT1", "FAT filesystem"),
    (512, b"LABELONE", "LVM2 physical volume"),
    (4096, b"\xfc\x4e\x2b\xa9", "member of a Linux RAID"),
    (4086, b"SWAPSPACE2", "Linux swap space"),
    (0x8001, b"CD001", "ISO 9660 filesystem"),
    (0, b"hsqs", "SquashFS filesystem"),
    (512, b"EFI PART", "GPT partition table"),
    (4096, b"EFI PART", "GPT partition table of 4096-byte sectors"),
    (510, b"\x55\xaa", "DOS/MBR boot sector"),
];

/// Says what `device` seems to hold.
pub(super) fn of(device: &dyn BlockDevice) -> Result<String> {
    let format = tranship_formats::probe(device, Path::new("export"))?;
    if format != Format::Raw {
        return Ok(format!("{} image", format.name()));
    }
    let mut head = vec![0; usize::try_from(device.size().min(HEAD)).unwrap_or(0)];
    device.read_at(&mut head, 0)?;
    Ok(of_head(&head).to_owned())
}

fn of_head(head: &[u8]) -> &'static str {
    let is_there = |at: usize, magic: &[u8]| {
        at.checked_add(magic.len()).and_then(|end| head.get(at..end)) == Some(magic)
    };
    let known = KNOWN.iter().find(|(at, magic, _)| is_there(*at, magic));
    match known {
        Some((_, _, text)) => text,
        None if head.is_empty() => "empty",
        None if tranship_block::is_zero(head) => "zeroes at the start",
        None => "data",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_special_signature_wins() {
        let mut head = vec![0; 70_000];
        let mut put = |at: usize, bytes: &[u8]| {
            head[at..at + bytes.len()].copy_from_slice(bytes);
            of_head(&head)
        };
        assert_eq!(put(0, b""), "zeroes at the start");
        assert_eq!(put(0, b"x"), "data");
        assert_eq!(put(510, b"\x55\xaa"), "DOS/MBR boot sector");
        assert_eq!(put(512, b"EFI PART"), "GPT partition table");
        assert_eq!(put(82, b"FAT32   "), "FAT filesystem");
        assert_eq!(of_head(b""), "empty");
        assert_eq!(of_head(b"XFS"), "data");
    }
}
