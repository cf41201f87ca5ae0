// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What zeroing and giving back do to the space of a disk.

use crate::bench::{Bench, Who};
use crate::client::Client;
use crate::support::{SHORT, host};
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::MetadataExt;

const ZERO: u16 = 6;
const NO_HOLE: u16 = 2;
const FAST: u16 = 16;
const ENOTSUP: u32 = 95;
const WHOLE: u32 = 4 << 20;

#[test]
fn zeroes_punch_holes_unless_told_not_to() {
    let Some(bench) = Bench::new() else { return };
    for (words, flags, is_full) in [
        ("--discard=unmap", 0, false),
        ("--discard=unmap", NO_HOLE, true),
        ("--discard=unmap", FAST, false),
        ("--discard=unmap", FAST | NO_HOLE, true),
        // Space is not given back unasked.
        ("", 0, true),
    ] {
        for is_empty in [false, true] {
            let bytes = vec![0x11; if is_empty { 0 } else { WHOLE as usize }];
            fs::write(bench.path("d.raw"), bytes).unwrap();
            host("truncate", &["-s", "4M", &bench.text("d.raw")]);
            let server = bench.start(Who::Serve, &format!("-t -x vda -f raw {words} @d.raw"));
            let mut client = Client::connect(&bench.path("s"));
            client.go(true);
            assert_eq!(client.errno(flags, ZERO, 0, WHOLE), 0, "{words} {flags}");
            assert_eq!(client.errno(0, 3, 0, 0), 0);
            drop(client);
            let disk = fs::metadata(bench.path("d.raw")).unwrap();
            let is_kept = disk.blocks() * 512 >= u64::from(WHOLE);
            assert_eq!(is_kept, is_full, "{words} flags {flags} empty {is_empty}: {disk:?}");
            assert!(fs::read(bench.path("d.raw")).unwrap().iter().all(|byte| *byte == 0));
            server.signal(Signal::TERM);
            server.wait(SHORT).ended_with(0);
        }
    }
}

#[test]
fn fast_zeroes_are_fast_or_refused_and_then_change_nothing() {
    let Some(bench) = Bench::new() else { return };
    for format in ["raw", "qcow2", "vhdx", "vmdk", "vpc"] {
        let disk = bench.disk(&format!("d.{format}"), format);
        let before = bench.raw(&disk, format);
        let server =
            bench.start(Who::Serve, &format!("-t -x vda --discard=unmap -f {format} @d.{format}"));
        let mut client = Client::connect(&bench.path("s"));
        client.go(true);
        let said = client.errno(FAST, ZERO, 1 << 20, 1 << 20);
        drop(client);
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
        match said {
            0 => {
                let words = ["-r", "-f", format, "-c", "read -P 0 1M 1M", disk.to_str().unwrap()];
                host("qemu-io", &words);
            }
            ENOTSUP => assert_eq!(bench.raw(&disk, format), before, "{format} was changed"),
            other => panic!("{format}: errno {other}"),
        }
        assert!(said == 0 || !["raw", "qcow2"].contains(&format), "{format} has fast zeroes");
    }
}
