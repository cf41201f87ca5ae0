// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Damaged and malicious disks, made by hand: errors that say what and where, never
//! panics, floods or zeroes that nobody wrote.
#![allow(clippy::unwrap_used, reason = "handmade disks are known")]
#![allow(clippy::cast_possible_truncation, reason = "numbers of handmade disks are small")]

mod folder;

use libdeflater::{CompressionLvl, Compressor};
use std::sync::Arc;
use tranship_block::{
    BlockDevice, DenyAll, Error, ErrorKind, MemoryDevice, Repair, Result, Span, Zeroing,
};
use tranship_vmdk::{NoFiles, OpenOptions, ResizeOptions, Vmdk, check, resize};

const GRAIN: usize = 4096;
const DIRECTORY: usize = 21;
const TABLE: usize = 22;
const GRAINS: usize = 32;

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A disk of 2 MiB with 4 KiB grains: header, empty descriptor, directory at sector 21,
/// table at 22, grains from sector 32. Grain 0 is stored, 1 is declared zero, 2 is absent,
/// 3 and 4 are stored.
fn sparse() -> Vec<u8> {
    let mut image = vec![0; GRAINS * 512 + 3 * GRAIN];
    put(&mut image, 0, b"KDMV");
    put(&mut image, 4, &2_u32.to_le_bytes());
    put(&mut image, 8, &5_u32.to_le_bytes());
    put(&mut image, 12, &4096_u64.to_le_bytes());
    put(&mut image, 20, &8_u64.to_le_bytes());
    put(&mut image, 44, &512_u32.to_le_bytes());
    put(&mut image, 56, &(DIRECTORY as u64).to_le_bytes());
    put(&mut image, 73, b"\n \r\n");
    put(&mut image, DIRECTORY * 512, &(TABLE as u32).to_le_bytes());
    for (index, sector) in [32_u32, 1, 0, 40, 48].into_iter().enumerate() {
        put(&mut image, TABLE * 512 + index * 4, &sector.to_le_bytes());
    }
    image[GRAINS * 512..].fill(0xa5);
    image
}

/// The same disk as a stream: grains 0, 3 and 4 are compressed, one behind the other.
fn stream() -> Vec<u8> {
    let mut image = sparse();
    image.truncate(GRAINS * 512);
    put(&mut image, 4, &3_u32.to_le_bytes());
    put(&mut image, 8, &0x3_0005_u32.to_le_bytes());
    put(&mut image, 77, &[1]);
    for grain in [0_u64, 3, 4] {
        let sector = (image.len() / 512) as u32;
        put(&mut image, TABLE * 512 + 4 * grain as usize, &sector.to_le_bytes());
        append_grain(&mut image, grain * 8, &[0xa5; GRAIN]);
    }
    image
}

fn append_grain(image: &mut Vec<u8>, lba: u64, data: &[u8]) {
    let mut compressor = Compressor::new(CompressionLvl::default());
    let mut stored = vec![0; compressor.zlib_compress_bound(data.len())];
    let len = compressor.zlib_compress(data, &mut stored).unwrap();
    image.extend(lba.to_le_bytes());
    image.extend((len as u32).to_le_bytes());
    image.extend(&stored[..len]);
    image.resize(image.len().next_multiple_of(512), 0);
}

fn open(image: Vec<u8>) -> Result<Vmdk> {
    Vmdk::open(Arc::new(MemoryDevice::read_only(image)), &DenyAll, OpenOptions::default())
}

fn read(image: Vec<u8>) -> Result<Vec<u8>> {
    folder::contents(&open(image)?)
}

fn refused(image: Vec<u8>, text: &str) -> Error {
    let error = read(image).unwrap_err();
    assert!(error.to_string().contains(text), "expected {text:?} in {error}");
    error
}

#[test]
fn stored_zero_and_absent_grains() {
    for image in [sparse(), stream()] {
        let disk = open(image).unwrap();
        let bytes = folder::contents(&disk).unwrap();
        for (grain, value) in [(0, 0xa5), (1, 0), (2, 0), (3, 0xa5), (4, 0xa5), (5, 0), (511, 0)] {
            let part = &bytes[grain * GRAIN..(grain + 1) * GRAIN];
            assert!(part.iter().all(|byte| *byte == value), "grain {grain}");
        }
        let compressed = disk.extents()[0].compressed;
        let kinds: Vec<_> = [0, 1, 2, 3, 5]
            .map(|grain| disk.extent_at(grain * GRAIN as u64).unwrap())
            .map(|extent| (format!("{:?}", extent.kind), extent.len / GRAIN as u64))
            .into_iter()
            .collect();
        let expected = [("Data", 1), ("Zero", 1), ("Hole", 1), ("Data", 2), ("Hole", 507)];
        assert_eq!(kinds, expected.map(|(kind, len)| (kind.to_owned(), len)));
        let data = disk.extent_at(100).unwrap();
        assert_eq!(data.compressed, compressed);
        assert_eq!(data.offset, (!compressed).then_some(32 * 512 + 100));
        assert_eq!(disk.write_at(&[1], 0).unwrap_err().kind(), ErrorKind::Usage);
        let end = disk.size();
        assert_eq!(disk.read_at(&mut [0; 2], end - 1).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(disk.extent_at(end).unwrap_err().kind(), ErrorKind::Usage);
    }
}

#[test]
fn what_is_cut_off_is_an_error() {
    let whole = sparse();
    for (len, text) in [
        (whole.len() - 1, "grain 4 ends past the file's size"),
        (33 * 512, "grain 0 ends past the file's size"),
        (TABLE * 512 + 5, "grain table 0 ends past the file's size"),
        (DIRECTORY * 512 + 3, "grain directory of 1 entries ends past the file's size"),
        (511, "ends inside the VMDK sparse header"),
    ] {
        let error = refused(whole[..len].to_vec(), text);
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(error.offset().is_some(), len != 511, "{error}");
    }
    let whole = stream();
    refused(whole[..whole.len() - 512].to_vec(), "grain 4 ends past the file's size");
    let mut image = whole;
    let last = image.len() - 512;
    image.truncate(last + 20);
    refused(image, "compressed grain 4 of");
}

#[test]
fn compressed_grains_are_checked() {
    let first = GRAINS * 512;
    let mut image = stream();
    put(&mut image, first, &8_u64.to_le_bytes());
    refused(image, "marker of grain 0 is for guest sector 8, expected 0");
    for size in [0, 2 * GRAIN as u32 + 13, u32::MAX] {
        let mut image = stream();
        put(&mut image, first + 8, &size.to_le_bytes());
        refused(image, "compressed size of grain 0 is");
    }
    let mut image = stream();
    image[first + 16] ^= 0xff;
    refused(image, "compressed data of grain 0 is damaged");
    for (len, text) in [(GRAIN + 1, "inflates to more than 4096"), (GRAIN - 1, "inflates to 4095")]
    {
        let mut image = stream();
        let sector = (image.len() / 512) as u32;
        put(&mut image, TABLE * 512, &sector.to_le_bytes());
        append_grain(&mut image, 0, &vec![1; len]);
        refused(image, text);
    }
    let mut bomb = stream();
    let sector = (bomb.len() / 512) as u32;
    put(&mut bomb, TABLE * 512, &sector.to_le_bytes());
    append_grain(&mut bomb, 0, &vec![0; 4 << 20]);
    refused(bomb, "inflates to more than 4096");
}

#[test]
fn a_last_grain_may_be_cut_to_the_capacity() {
    for len in [512, GRAIN] {
        let mut image = stream();
        put(&mut image, 12, &(5 * 8 + 1_u64).to_le_bytes());
        let sector = (image.len() / 512) as u32;
        put(&mut image, TABLE * 512 + 5 * 4, &sector.to_le_bytes());
        append_grain(&mut image, 40, &vec![0x77; len]);
        let bytes = read(image).unwrap();
        assert_eq!(bytes.len(), 5 * GRAIN + 512);
        assert!(bytes[5 * GRAIN..].iter().all(|byte| *byte == 0x77));
    }
}

#[test]
fn incompressible_grains_may_be_larger_than_a_grain() {
    let mut state = 1_u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(GRAIN)
    .collect();
    let mut image = stream();
    let sector = (image.len() / 512) as u32;
    put(&mut image, TABLE * 512, &sector.to_le_bytes());
    append_grain(&mut image, 0, &noise);
    assert!(image.len() - sector as usize * 512 > GRAIN);
    assert_eq!(read(image).unwrap()[..GRAIN], noise);
}

#[test]
fn the_redundant_directory_helps_and_is_reported() {
    let mut image = sparse();
    put(&mut image, 8, &7_u32.to_le_bytes());
    put(&mut image, 48, &20_u64.to_le_bytes());
    put(&mut image, 20 * 512, &(TABLE as u32).to_le_bytes());
    let whole = read(image.clone()).unwrap();
    put(&mut image, DIRECTORY * 512, &[0; 4]);
    let disk = open(image).unwrap();
    assert!(disk.warnings().iter().any(|text| text.contains("redundant copy is used")));
    assert!(folder::contents(&disk).unwrap() == whole);
}

#[test]
fn descriptors_cannot_reach_out() {
    let text = |line: &str| format!("# Disk DescriptorFile\nversion=1\n{line}\n").into_bytes();
    let kind = |line: &str| open(text(line)).unwrap_err().kind();
    assert_eq!(kind("RW 8 FLAT \"/etc/passwd\" 0"), ErrorKind::Denied);
    assert_eq!(kind("RW -1 FLAT \"x\""), ErrorKind::Corrupt);
    assert_eq!(kind("NOACCESS 8 FLAT \"x\" 0"), ErrorKind::Unsupported);
    assert_eq!(kind("RW 8 SESPARSE \"x\""), ErrorKind::Denied);
    assert_eq!(kind("RW 8 FLAT \"/dev/sda\" 0"), ErrorKind::Unsupported);
    assert_eq!(kind("RW 8 VMFSRDM \"x\""), ErrorKind::Unsupported);
    assert_eq!(kind(&"RW 1 FLAT \"x\" 0\n".repeat(30_000)), ErrorKind::Corrupt);
    let huge = "RW 9007199254740991 ZERO\n".repeat(4000);
    assert_eq!(kind(&huge), ErrorKind::Corrupt);
    assert_eq!(kind("parentCID=00000001\nRW 8 ZERO"), ErrorKind::Unsupported);
    let disk = open(text("RW 16 ZERO\nRDONLY 8 ZERO")).unwrap();
    assert_eq!((disk.size(), disk.extents().len()), (24 * 512, 2));
}

#[test]
fn flat_extents_have_to_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    let open = |line: &str| {
        write("d.vmdk", format!("# Disk DescriptorFile\n{line}\n").as_bytes());
        folder::open(&folder.path().join("d.vmdk"))
    };
    write("flat", &[7; 1024]);
    let bytes = folder::contents(&open("RW 1 FLAT \"flat\" 1\nRW 2 ZERO").unwrap()).unwrap();
    assert_eq!(bytes, [&[7; 512][..], &[0; 1024]].concat());
    let error = open("RW 2 FLAT \"flat\" 1").unwrap_err();
    assert!(error.to_string().starts_with("flat: flat extent of 1024 bytes ends past"), "{error}");
    assert_eq!(open("RW 2 FLAT \"gone\" 0").unwrap_err().kind(), ErrorKind::NotFound);
    write("sparse", &sparse());
    assert!(open("RW 4096 SPARSE \"sparse\"").is_ok());
    assert_eq!(open("RW 8192 SPARSE \"sparse\"").unwrap_err().kind(), ErrorKind::Corrupt);
    let twice = open("RW 4096 SPARSE \"sparse\"\nRW 4096 SPARSE \"sparse\"").unwrap_err();
    assert!(twice.to_string().contains("listed twice"), "{twice}");
}

#[test]
fn damage_anywhere_is_survived() {
    for whole in [sparse(), stream()] {
        let metadata = (0..96).chain(DIRECTORY * 512..DIRECTORY * 512 + 8);
        let tables = TABLE * 512..TABLE * 512 + 24;
        let grains = GRAINS * 512..GRAINS * 512 + 40;
        for at in metadata.chain(tables).chain(grains) {
            for value in [0, 1, 0x7f, 0xff, whole[at] ^ 0x10] {
                let mut image = whole.clone();
                image[at] = value;
                if let Ok(disk) = open(image) {
                    probe_disk(&disk);
                }
            }
        }
        for len in (0..whole.len()).step_by(97) {
            if let Ok(disk) = open(whole[..len].to_vec()) {
                probe_disk(&disk);
            }
        }
    }
}

/// Reads at both ends and walks some extents; the virtual size may be anything.
fn probe_disk(disk: &Vmdk) {
    let mut buf = vec![0; 6 * GRAIN];
    let _ = disk.read_at(&mut buf, 0);
    let tail = disk.size().saturating_sub(buf.len() as u64);
    let _ = disk.read_at(&mut buf, tail);
    let mut at = 0;
    for _ in 0..16 {
        match disk.extent_at(at) {
            Ok(extent) => {
                assert!(extent.len > 0);
                at += extent.len;
            }
            Err(_) => break,
        }
    }
}

#[test]
fn zeroes_have_to_be_declared() {
    let mut image = sparse();
    put(&mut image, 8, &1_u32.to_le_bytes());
    refused(image.clone(), "grain table entry is 1");
    let file = Arc::new(MemoryDevice::read_only(image));
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    let disk = Vmdk::open(file, &DenyAll, salvage).unwrap();
    assert!(folder::contents(&disk).unwrap() == read(sparse()).unwrap());
    assert!(disk.warnings()[1].contains("1 grains"), "{:?}", disk.warnings());
}

#[test]
fn a_grain_of_a_gibibyte_takes_what_is_written() {
    let mut image = sparse();
    put(&mut image, 12, &(2_u64 << 21).to_le_bytes());
    put(&mut image, 20, &(1_u64 << 21).to_le_bytes());
    put(&mut image, TABLE * 512, &[0; 20]);
    image.truncate(GRAINS * 512);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.vmdk");
    std::fs::write(&path, image).unwrap();
    let disk = folder::open_writable(&path).unwrap();
    let at = (1 << 30) + 12_345;
    disk.write_at(&[7; 1000], at).unwrap();
    disk.write_zeroes(Span::new(0, 5000), Zeroing::MayUnmap).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let disk = folder::open(&path).unwrap();
    let mut found = vec![0xee; 3000];
    disk.read_at(&mut found, at - 1000).unwrap();
    assert!(found == [[0; 1000], [7; 1000], [0; 1000]].concat());
    let stored = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
    assert!(stored < 1 << 20, "{stored} bytes are stored");
}

#[test]
fn a_last_grain_that_the_file_cuts_off_takes_nothing_from_its_neighbours() {
    // One sector of grain 4 belongs to the disk, and the file ends behind it; the grain is
    // not where a writer would put one.
    let mut image = sparse();
    put(&mut image, 12, &(4 * 8 + 1_u64).to_le_bytes());
    put(&mut image, TABLE * 512, &[0; 20]);
    put(&mut image, TABLE * 512 + 16, &41_u32.to_le_bytes());
    image.truncate(42 * 512);
    let storage = Arc::new(MemoryDevice::new(image));
    let disk = Vmdk::open_writable(storage.clone(), &NoFiles, OpenOptions::default()).unwrap();
    let last = 4 * GRAIN as u64;
    disk.write_zeroes(Span::new(last, 512), Zeroing::MayUnmap).unwrap();
    disk.write_at(&[0x77; GRAIN], 0).unwrap();
    disk.write_at(&[0x66; 512], last).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let report = check(&*storage, &NoFiles, Repair::Nothing).unwrap();
    assert_eq!(report.corruptions, 0, "{report:?}");
    let bytes = read(storage.snapshot()).unwrap();
    let expected = [&[0x77; GRAIN][..], &[0; 3 * GRAIN], &[0x66; 512]].concat();
    assert!(bytes == expected);
}

#[test]
fn what_has_a_footer_is_not_written() {
    // The sparse disk, but the directory is named by a footer.
    let mut image = sparse();
    let footer = image[..512].to_vec();
    put(&mut image, 56, &u64::MAX.to_le_bytes());
    let mut marker = vec![0; 512];
    put(&mut marker, 12, &3_u32.to_le_bytes());
    for sector in [marker, footer, vec![0; 512]] {
        image.extend(sector);
    }
    // What would be a leak elsewhere.
    put(&mut image, TABLE * 512 + 16, &0_u32.to_le_bytes());
    assert!(read(image.clone()).is_ok());
    let storage = Arc::new(MemoryDevice::new(image.clone()));
    let report = check(&*storage, &NoFiles, Repair::All).unwrap();
    assert!(report.is_clean(), "{report:?}");
    let opened = Vmdk::open_writable(storage.clone(), &NoFiles, OpenOptions::default());
    assert_eq!(opened.unwrap_err().kind(), ErrorKind::Unsupported);
    let resized = resize(&*storage, &NoFiles, 64 << 20, ResizeOptions::default());
    assert_eq!(resized.unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(storage.snapshot() == image);
}
