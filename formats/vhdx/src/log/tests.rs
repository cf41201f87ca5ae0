// SPDX-License-Identifier: Apache-2.0 OR MIT
#![allow(clippy::as_conversions, clippy::cast_possible_truncation)]
#![allow(clippy::arithmetic_side_effects)]
use super::*;

const LEN: usize = 1 << 20;
const GUID: Guid = Guid::from_bytes([7; 16]);

fn sector(at: u64, fill: u8) -> Sector {
    Sector { at, bytes: Box::new([fill; SECTOR]) }
}

fn entry(sequence: u64, tail: u32, sectors: &[Sector]) -> Vec<u8> {
    let new = NewEntry { log_guid: GUID, sequence, tail, flushed: sequence << 20, last: 9 << 20 };
    new_entry(&new, sectors)
}

/// Puts `bytes` into the ring.
fn store(log: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, range) in pieces(at as u64, bytes.len(), LEN as u64) {
        put(log, to as usize, &bytes[range]);
    }
}

fn data(replay: &Replay) -> Vec<(u64, u8)> {
    let changes = replay.changes.iter().map(|change| match change {
        Change::Data(sector) => {
            assert!(sector.bytes.iter().all(|byte| *byte == sector.bytes[0]));
            (sector.at, sector.bytes[0])
        }
        Change::Zero(span) => (span.start, 0),
    });
    changes.collect()
}

#[test]
fn what_was_logged_is_replayed_in_order() {
    let mut log = vec![0; LEN];
    let one = entry(5, 0, &[sector(4096, 1), sector(8192, 2)]);
    assert_eq!(one.len(), 3 * SECTOR);
    store(&mut log, 0, &one);
    store(&mut log, one.len(), &entry(6, 0, &[sector(4096, 3)]));
    let replay = active(&log, GUID).unwrap();
    assert_eq!(data(&replay), [(4096, 1), (8192, 2), (4096, 3)]);
    assert_eq!((replay.flushed, replay.last), (6 << 20, 9 << 20));
    // The same, but the first entry is not needed any more.
    store(&mut log, one.len(), &entry(6, 3 * 4096, &[sector(4096, 3)]));
    assert_eq!(data(&active(&log, GUID).unwrap()), [(4096, 3)]);
    assert_eq!(active(&log, Guid::NIL), None);
}

#[test]
fn entries_go_round_the_end_of_the_ring() {
    let mut log = vec![0; LEN];
    let many: Vec<Sector> = (0..127).map(|n| sector(n << 12, n as u8 + 1)).collect();
    assert!(most_sectors(LEN as u64) < 127);
    let at = LEN - 5 * SECTOR;
    let bytes = entry(1, at as u32, &many);
    assert_eq!(bytes.len(), 129 * SECTOR, "127 descriptors need two sectors");
    store(&mut log, at, &bytes);
    assert_eq!(active(&log, GUID).unwrap().changes.len(), 127);
}

#[test]
fn an_entry_with_any_wrong_byte_is_none() {
    let mut log = vec![0; LEN];
    let old = entry(5, 0, &[sector(0, 1)]);
    store(&mut log, 0, &old);
    let new = entry(6, 2 * 4096, &[sector(0, 2)]);
    store(&mut log, old.len(), &new);
    for at in (0..new.len()).step_by(61) {
        let mut torn = log.clone();
        torn[old.len() + at] ^= 0x40;
        assert_eq!(data(&active(&torn, GUID).unwrap()), [(0, 1)], "byte {at}");
    }
}

#[test]
fn a_gap_ends_a_sequence_and_the_higher_number_wins() {
    let mut log = vec![0; LEN];
    store(&mut log, 0, &entry(7, 0, &[sector(0, 7)]));
    store(&mut log, 2 * SECTOR, &entry(9, 2 * 4096, &[sector(0, 9)]));
    assert_eq!(data(&active(&log, GUID).unwrap()), [(0, 9)]);
    // Its tail is lost: what came before is all there is.
    store(&mut log, 2 * SECTOR, &entry(9, 0, &[sector(0, 9)]));
    assert_eq!(data(&active(&log, GUID).unwrap()), [(0, 7)]);
}

#[test]
fn a_log_full_of_headers_costs_no_more_than_its_length() {
    // Every sector claims to be an entry as long as the log.
    let mut log = vec![0; 16 << 20];
    let mut header = entry(1, 0, &[]);
    put(&mut header, 8, &(16_u32 << 20).to_le_bytes());
    for at in (0..log.len()).step_by(SECTOR) {
        put(&mut log, at, &header);
    }
    assert_eq!(active(&log, GUID), None);
}
