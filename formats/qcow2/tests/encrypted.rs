// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Payload goes through the cipher, with the sector numbers that the method asks for.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use proptest::prelude::*;
use std::sync::Arc;
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Result, SectorCipher, Storage};
use tranship_format_testing::{Op, apply, operations, verify};
use tranship_qcow2::{CreateOptions, Encryption, Header, OpenOptions, Qcow2, create};

const SIZE: u64 = 700_416;

/// Not secret, but no byte stays what it is, and each sector has its own key.
#[derive(Debug)]
struct Mask;

impl Mask {
    fn apply(sector: u64, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(512));
        for (number, bytes) in (sector..).zip(data.chunks_mut(512)) {
            let key = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
            for (at, byte) in bytes.iter_mut().enumerate() {
                *byte ^= key[at % 8] | 1;
            }
        }
    }
}

impl SectorCipher for Mask {
    fn sector_size(&self) -> u32 {
        512
    }
    fn decrypt(&self, sector: u64, data: &mut [u8]) -> Result<()> {
        Self::apply(sector, data);
        Ok(())
    }
    fn encrypt(&self, sector: u64, data: &mut [u8]) -> Result<()> {
        Self::apply(sector, data);
        Ok(())
    }
}

/// An empty image that says that it is encrypted.
fn image(method: u32, extended_l2: bool) -> Arc<MemoryDevice> {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let options = CreateOptions { extended_l2, cluster_bits: 14, ..CreateOptions::new(SIZE) };
    create(&*storage, &options).unwrap();
    storage.write_at(&method.to_be_bytes(), 32).unwrap();
    if method == 2 {
        // Behind everything else, and counted.
        let end = storage.size();
        storage.set_len(end + (1 << 14)).unwrap();
        let mut block = [0; 8];
        storage.read_at(&mut block, 1 << 14).unwrap();
        let block = u64::from_be_bytes(block);
        storage.write_at(&1_u16.to_be_bytes(), block + 2 * (end >> 14)).unwrap();
        let mut extension = 0x0537_be77_u32.to_be_bytes().to_vec();
        extension.extend(16_u32.to_be_bytes());
        extension.extend(end.to_be_bytes());
        extension.extend(100_u64.to_be_bytes());
        extension.extend([0; 8]);
        storage.write_at(&extension, 112).unwrap();
    }
    storage
}

fn open(storage: &Arc<MemoryDevice>) -> Qcow2 {
    let options = OpenOptions { cipher: Some(Arc::new(Mask)), ..OpenOptions::default() };
    Qcow2::open(storage.clone() as Arc<dyn Storage>, options).unwrap()
}

#[test]
fn a_luks_header_is_never_written_as_payload() {
    let storage = image(2, false);
    storage.write_at(&(1_u64 << 14).to_be_bytes(), 120).unwrap();
    let error = open(&storage).write_at(&[1], 0).unwrap_err();
    assert!(error.message().contains("shares cluster 1"), "{error}");
}

#[test]
fn without_a_key_it_is_refused_and_says_how_it_is_encrypted() {
    for method in [1, 2] {
        let storage = image(method, false);
        let luks = Encryption::Luks { offset: storage.size() - (1 << 14), len: 100 };
        let expected = if method == 1 { Encryption::Aes } else { luks };
        assert_eq!(Header::read(&*storage).unwrap().encryption(), Some(expected));
        let error = Qcow2::open(storage, OpenOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    let lost = image(1, false);
    lost.write_at(&2_u32.to_be_bytes(), 32).unwrap();
    let options = OpenOptions { cipher: Some(Arc::new(Mask)), ..OpenOptions::default() };
    let error = Qcow2::open(lost, options).unwrap_err();
    assert!(error.message().contains("no LUKS header"), "{error}");
}

#[test]
fn sectors_are_counted_from_the_start_of_the_file_or_of_the_guest() {
    for method in [1, 2] {
        let storage = image(method, false);
        let disk = open(&storage);
        disk.write_at(&[7; 1024], 100_000).unwrap();
        disk.flush().unwrap();
        let plain = storage.snapshot();
        // The extent has no offset, since the bytes there are not the guest's.
        assert_eq!(disk.extent_at(100_000).unwrap().offset, None);
        let mut sector = [7; 512];
        let at = |sector: &[u8]| plain.windows(512).position(|window| window == sector);
        if method == 1 {
            Mask::apply(100_352 / 512, &mut sector);
            assert!(at(&sector).is_some());
        } else {
            let found = (0..plain.len() / 512).any(|number| {
                let mut sector = [7; 512];
                Mask::apply(number as u64, &mut sector);
                plain[number * 512..(number + 1) * 512] == sector
            });
            assert!(found);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn same_bytes_as_memory(
        method in 1_u32..3,
        extended in any::<bool>(),
        ops in operations(SIZE, 512, 30),
    ) {
        let storage = image(method, extended);
        let mut disk = open(&storage);
        let mut model = vec![0; SIZE as usize];
        for op in &ops {
            if matches!(op, Op::Reopen) {
                drop(disk);
                disk = open(&storage);
            }
            apply(&disk, &mut model, op);
        }
        verify(&disk, &model);
    }
}
