// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests by the hundred to a file: rings that are gone round again and again.

use super::{BUFFERS, Driver, F_EVENT_IDX, SIZE};
use crate::virtio::blk::{Blk, Presentation};
use std::io::Write;
use tranship_formats::OpenOptions;

/// Bytes of a request.
const PAGE: u32 = 4096;
const PAGES: u64 = 256;

/// `tests/bench/appliance/run.sh` has more of them made, and counts what one costs.
fn count() -> u64 {
    let set = std::env::var("TRANSHIP_BENCH_REQUESTS").ok();
    set.map_or(u64::from(SIZE) * 5, |count| count.parse().unwrap())
}

#[test]
fn the_rings_are_gone_round_many_times() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for page in 0..PAGES {
        file.write_all(&[u8::try_from(page).unwrap(); PAGE as usize]).unwrap();
    }
    let options = OpenOptions {
        read_only: true,
        format: Some(tranship_formats::Format::Raw),
        ..OpenOptions::default()
    };
    let opened = tranship_formats::open(file.path(), &options).unwrap();
    let how = Presentation {
        serial: "tranship-0".into(),
        read_only: true,
        durable: true,
        sector_size: 512,
        queues: 1,
    };
    let mut driver = Driver::new(Box::new(Blk::new(opened.device, how)));
    driver.start(!F_EVENT_IDX);
    for number in 0..count() {
        let page = number * 7 % PAGES;
        let sector = page * u64::from(PAGE / 512);
        assert_eq!(driver.request(0, sector, PAGE, true), 0, "request {number}");
        let read = driver.take(BUFFERS + 0x1000, PAGE as usize);
        assert_eq!(read, [u8::try_from(page).unwrap(); PAGE as usize], "request {number}");
    }
}
