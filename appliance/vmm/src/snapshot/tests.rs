// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Snapshots as bytes: whole ones come back, all others are refused.

use super::*;
use crate::virtio::blk::{Blk, Presentation};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use proptest::prelude::*;
use std::sync::{Arc, LazyLock};

fn identifications(count: u32) -> Vec<CpuId> {
    let leaf = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
    (0..count).map(|number| CpuId::from_entries(&[leaf(0, 7), leaf(1, number)]).unwrap()).collect()
}

fn snapshot() -> Snapshot {
    let how = Presentation {
        serial: "tools".into(),
        read_only: true,
        durable: true,
        sector_size: 512,
        queues: 1,
    };
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let disk = tranship_raw::RawFile::from_file(file, "tools", tranship_raw::Access::ReadOnly);
    let blk = Blk::new(Arc::new(disk.unwrap()), how);
    let address = Address::of(0).unwrap();
    let function = crate::virtio::tests::idle(Box::new(blk)).save().unwrap();
    Snapshot(State {
        memory_mib: 256,
        processors: identifications(2).iter().map(processor::tests::state).collect(),
        platform: platform::tests::state(),
        uart: UartState::default(),
        address_port: 0x8000_0800,
        functions: vec![(address, function)],
    })
}

/// The same bytes with a checksum that is right.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = crc32fast::hash(&bytes[HEADER..]);
    bytes[16..HEADER].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn refused(bytes: &[u8]) -> String {
    match Snapshot::from_bytes(bytes) {
        Err(Error::Snapshot(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_snapshot_comes_back_as_it_was() {
    let bytes = snapshot().to_bytes().unwrap();
    let read = Snapshot::from_bytes(&bytes).unwrap();
    assert_eq!(read.to_bytes().unwrap(), bytes);
    assert_eq!((read.memory_mib(), read.processors()), (256, 2));
    assert!(bytes.len() < 16 << 10, "{}", bytes.len());
}

#[test]
fn a_snapshot_that_ends_early_or_late_is_refused() {
    let mut bytes = snapshot().to_bytes().unwrap();
    for len in 0..bytes.len() {
        refused(&bytes[..len]);
    }
    let len = bytes.len() - HEADER;
    bytes.push(0);
    assert_eq!(refused(&bytes), format!("{} bytes of state, expected {len}", len + 1));
    bytes[12..16].copy_from_slice(&u32::try_from(len + 1).unwrap().to_le_bytes());
    assert_eq!(refused(&sealed(bytes)), "1 bytes behind the state");
    assert!(refused(&vec![0; MOST + 1]).contains("at most"));
}

#[test]
fn the_header_says_what_it_is() {
    let bytes = snapshot().to_bytes().unwrap();
    for (at, expected) in [
        (0, "it does not begin as one"),
        (8, "version 2, expected 3"),
        (12, "bytes of state, expected"),
        (16, "the checksum of the state is wrong"),
        (HEADER, "the checksum of the state is wrong"),
        (bytes.len() - 1, "the checksum of the state is wrong"),
    ] {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        let why = refused(&bytes);
        assert!(why.contains(expected), "{at}: {why}");
    }
}

#[test]
fn other_processors_are_refused() {
    let saved = snapshot().0.processors;
    assert!(processor::check(&saved, &identifications(2)).is_ok());
    for (own, expected) in [
        (identifications(1), "2 processors, expected 1"),
        (identifications(3), "2 processors, expected 3"),
        (identifications(3).split_off(1), "processor 0 is another one: leaf 0x1 "),
    ] {
        let error = processor::check(&saved, &own).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    /// Damage that the checksum does not tell is refused or read as some other state.
    #[test]
    fn rubbish_under_a_right_checksum_does_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
    ) {
        static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| snapshot().to_bytes().unwrap());
        let mut bytes = WHOLE.clone();
        let mut state = bytes.split_off(HEADER);
        for (index, value) in changes {
            *index.get_mut(&mut state) = value;
        }
        if let Some(cut) = cut {
            state.truncate(cut.index(state.len()));
        }
        bytes[12..16].copy_from_slice(&u32::try_from(state.len()).unwrap().to_le_bytes());
        bytes.extend(state);
        match Snapshot::from_bytes(&sealed(bytes)) {
            Ok(read) => {
                let again = read.to_bytes().unwrap();
                prop_assert_eq!(Snapshot::from_bytes(&again).unwrap().to_bytes().unwrap(), again);
            }
            Err(Error::Snapshot(_)) => {}
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
