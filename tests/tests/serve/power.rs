// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a power cut leaves of what clients were told is safe: everything.

use crate::client::{Client, Reply, export, header, serve};
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice, Storage};
use tranship_format_testing::{PowerCut, contents};
use tranship_nbd::Limits;
use tranship_qcow2::{CreateOptions, OpenOptions, Qcow2, check_read_only};

const SIZE: u64 = 64 << 10;
/// Bytes from one write to the next.
const STRIDE: usize = 5000;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const ZERO: u16 = 6;
const FUA: u16 = 1;

fn write(client: &mut Client, flags: u16, offset: u64, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).unwrap();
    client.say(&[header(flags, WRITE, 7, offset, len), bytes.to_vec()].concat());
    assert_eq!(client.reply(), Reply::Simple { errno: 0, cookie: 7 });
}

/// Serves `device`, which stores everything in `cut`, to two clients that write in turn.
fn work(device: Arc<dyn BlockDevice>, cut: &PowerCut) {
    let place = serve(vec![export("vda", device)], Limits::default());
    let mut clients = [place.connect(), place.connect()];
    for client in &mut clients {
        client.go(false);
    }
    let [one, other] = &mut clients;
    let mut written = vec![0; usize::try_from(SIZE).unwrap()];
    let mut safe = written.clone();
    for step in 0_u8..12 {
        let len = 1500 + 100 * usize::from(step);
        let at = usize::from(step) * STRIDE;
        let bytes = vec![step + 1; len];
        let is_forced = step % 4 == 1;
        write(one, if is_forced { FUA } else { 0 }, at as u64, &bytes);
        written[at..at + len].copy_from_slice(&bytes);
        if is_forced {
            safe[at..at + len].copy_from_slice(&bytes);
            cut.promise(&safe);
        }
        if step % 5 == 3 {
            // A part of what is there, on the other connection.
            assert_eq!(other.errno(FUA, ZERO, at as u64, 1000), 0);
            written[at..at + 1000].fill(0);
        }
        if step % 3 == 2 {
            assert_eq!(other.errno(0, FLUSH, 0, 0), 0);
            safe.clone_from(&written);
            cut.promise(&safe);
        }
    }
    place.running.stop().unwrap();
    cut.promise(&written);
}

/// No byte is written twice with data: what is found is promised, or was not promised yet.
fn compare(found: &[u8], promised: &[u8]) {
    for (at, (found, promised)) in found.iter().zip(promised).enumerate() {
        let step = u8::try_from(at / STRIDE).unwrap() + 1;
        let is_zeroed = at % STRIDE < 1000 && (step - 1) % 5 == 3;
        let is_newer = *promised == 0 && *found == step || is_zeroed && *found == 0;
        assert!(found == promised || is_newer, "byte {at} is {found}, promised {promised}");
    }
}

#[test]
fn forced_and_flushed_writes_survive_a_power_cut_in_a_raw_disk() {
    // A raw disk in a file is its file: nothing is between the two.
    let cut = Arc::new(PowerCut::new(vec![0; usize::try_from(SIZE).unwrap()]));
    work(cut.clone(), &cut);
    cut.replay(&vec![0; usize::try_from(SIZE).unwrap()], 1, |disk, promised| {
        compare(&disk, promised);
    });
}

#[test]
fn forced_and_flushed_writes_survive_a_power_cut_in_an_image() {
    let empty = Arc::new(MemoryDevice::new(Vec::new()));
    tranship_qcow2::create(
        &*empty,
        &CreateOptions { cluster_bits: 12, ..CreateOptions::new(SIZE) },
    )
    .unwrap();
    let cut = Arc::new(PowerCut::new(empty.snapshot()));
    let storage: Arc<dyn Storage> = cut.clone();
    work(Arc::new(Qcow2::open(storage, OpenOptions::default()).unwrap()), &cut);
    cut.replay(&vec![0; usize::try_from(SIZE).unwrap()], 2, |disk, promised| {
        let device = Arc::new(MemoryDevice::read_only(disk));
        let report = check_read_only(&device).unwrap();
        assert_eq!(report.corruptions, 0, "{:?}", report.details);
        compare(&contents(&Qcow2::open_read_only(device, None).unwrap()), promised);
    });
}
