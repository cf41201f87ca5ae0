// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is on the disk when a server was killed, and what a flush is.
//!
//! The page cache survives the death of a process: these tests show that nothing flushed is
//! in the server's memory alone, not that it would survive a power cut. For that, `power`
//! looks at what reaches the file, and the system calls are looked at here.

use crate::bench::{Bench, Who};
use crate::client::{Client, Reply, header};
use crate::support::{SHORT, host, installed, listens};
use rustix::process::Signal;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZERO: u16 = 6;
const FUA: u16 = 1;

/// Bytes of a write.
const BLOCK: u64 = 48 << 10;
/// Blocks of a disk.
const BLOCKS: u64 = 600;

fn connect(bench: &Bench) -> Client {
    let mut client = Client::connect(&bench.path("s"));
    client.go(false);
    client
}

fn write(client: &mut Client, flags: u16, offset: u64, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).unwrap();
    client.say(&[header(flags, WRITE, 7, offset, len), bytes.to_vec()].concat());
    assert_eq!(client.reply(), Reply::Simple { errno: 0, cookie: 7 });
}

#[test]
fn a_flush_on_one_connection_covers_the_writes_of_all() {
    let Some(bench) = Bench::new() else { return };
    for format in ["raw", "qcow2", "vhdx", "vmdk", "vpc"] {
        let disk = bench.text("disk");
        host("qemu-img", &["create", "-q", "-f", format, &disk, "64M"]);
        let words = format!("-t -x vda -e 0 -f {format} @disk");
        let server = bench.start(Who::Serve, &words);
        let mut clients: Vec<Client> = (0..4).map(|_| connect(&bench)).collect();
        for (client, number) in clients.iter_mut().zip(0_u8..) {
            write(client, 0, u64::from(number) * (4 << 20), &vec![number + 1; 1 << 20]);
        }
        // What was written on one is read on another before it.
        let mut reading = connect(&bench);
        for number in 0..4 {
            reading.request(0, 0, u64::from(number) * (4 << 20), 4096);
            assert_eq!(reading.reply(), Reply::Simple { errno: 0, cookie: 7 });
            assert!(reading.take(4096) == vec![number + 1; 4096], "{format}");
        }
        assert_eq!(reading.errno(0, FLUSH, 0, 0), 0);
        server.signal(Signal::KILL);
        assert_eq!(server.wait(SHORT).signal, Some(9));
        let server = bench.start(Who::Serve, &words);
        let mut client = connect(&bench);
        for number in 0..4 {
            client.request(0, 0, u64::from(number) * (4 << 20), 1 << 20);
            assert_eq!(client.reply(), Reply::Simple { errno: 0, cookie: 7 });
            assert!(client.take(1 << 20) == vec![number + 1; 1 << 20], "{format} {number}");
        }
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
        fs::remove_file(disk).unwrap();
    }
}

/// What a block has that was written.
fn content(block: u64) -> Vec<u8> {
    let mark = (block + 1).to_le_bytes();
    mark.iter().copied().cycle().take(usize::try_from(BLOCK).unwrap()).collect()
}

/// Writes every `of`th block once, and flushes now and then, until the server is gone.
/// Returns the blocks whose flush, or whose write with FUA, was acknowledged.
fn write_until_killed(bench: &Bench, first: u64, of: u64, acknowledged: &AtomicUsize) -> Vec<u64> {
    let mut client = connect(bench);
    let mut durable = Vec::new();
    let mut pending = Vec::new();
    let ask = |client: &mut Client, bytes: &[u8]| -> std::io::Result<()> {
        client.0.write_all(bytes)?;
        let mut reply = [0; 16];
        client.0.read_exact(&mut reply)?;
        assert_eq!(reply[4..8], [0; 4], "a request failed");
        acknowledged.fetch_add(1, Ordering::SeqCst);
        Ok(())
    };
    let mine = (0..BLOCKS / of).map(|number| number * of + first);
    // Not in order: 7 and the number of blocks have no common divisor.
    let count = BLOCKS / of;
    let mine: Vec<u64> = mine.collect();
    for number in 0..count {
        let block = mine[usize::try_from(number * 7 % count).unwrap()];
        let flags = if number % 5 == 4 { FUA } else { 0 };
        let len = u32::try_from(BLOCK).unwrap();
        let bytes = [header(flags, WRITE, 7, block * BLOCK, len), content(block)].concat();
        if ask(&mut client, &bytes).is_err() {
            break;
        }
        if flags == FUA {
            durable.push(block);
        } else {
            pending.push(block);
        }
        if number % 11 == 10 {
            if ask(&mut client, &header(0, FLUSH, 7, 0, 0)).is_err() {
                break;
            }
            durable.append(&mut pending);
        }
    }
    durable
}

#[test]
fn a_kill_among_writes_takes_nothing_that_was_flushed() {
    let Some(bench) = Bench::new() else { return };
    let size = (BLOCKS * BLOCK).to_string();
    for (format, moments) in [
        ("raw", &[150][..]),
        ("qcow2", &[60, 170, 330]),
        ("vhdx", &[60, 250]),
        ("vmdk", &[200]),
        ("vpc", &[170]),
    ] {
        for &moment in moments {
            let disk = bench.text("disk");
            let options: &[&str] = match format {
                "vpc" => &["-o", "force_size"],
                _ => &[],
            };
            let words = [&["create", "-q", "-f", format][..], options, &[&disk, &size]].concat();
            host("qemu-img", &words);
            let words = format!("-t -x vda -e 0 -f {format} @disk");
            let server = bench.start(Who::Serve, &words);
            let acknowledged = AtomicUsize::new(0);
            let durable = std::thread::scope(|scope| {
                let writers = [0, 1, 2].map(|first| {
                    let (bench, acknowledged) = (&bench, &acknowledged);
                    scope.spawn(move || write_until_killed(bench, first, 3, acknowledged))
                });
                while acknowledged.load(Ordering::SeqCst) < moment {
                    std::thread::yield_now();
                }
                server.signal(Signal::KILL);
                writers.map(|writer| writer.join().unwrap()).concat()
            });
            assert_eq!(server.wait(SHORT).signal, Some(9));
            assert!(durable.len() > 10, "{format} after {moment}: {}", durable.len());
            examine(format, Path::new(&disk));
            let plain = bench.path("plain");
            let to = plain.to_str().unwrap();
            host("qemu-img", &["convert", "-f", format, "-O", "raw", &disk, to]);
            has_blocks(&fs::read(&plain).unwrap(), &durable, &format!("{format} by QEMU"));
            // We find the same, and go on.
            let server = bench.start(Who::Serve, &words);
            host("nbdcopy", &[&bench.uri("vda"), to]);
            has_blocks(&fs::read(&plain).unwrap(), &durable, &format!("{format} by us"));
            write(&mut connect(&bench), FUA, 0, &content(0));
            server.signal(Signal::TERM);
            server.wait(SHORT).ended_with(0);
            examine(format, Path::new(&disk));
            fs::remove_file(disk).unwrap();
        }
    }
}

/// Fails if the image has worse faults than space that nothing leads to.
fn examine(format: &str, disk: &Path) {
    if ["raw", "vpc"].contains(&format) {
        return;
    }
    let mut words = vec!["check", "-f", format];
    // What is in its log belongs to the disk, and only writing makes QEMU read it.
    if format == "vhdx" {
        words.extend(["-r", "all"]);
    }
    let checked = Command::new("qemu-img").args(words).arg(disk).output().unwrap();
    let said = String::from_utf8_lossy(&[checked.stdout, checked.stderr].concat()).into_owned();
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{format}: {said}");
    assert!(!said.contains("ERROR"), "{format}: {said}");
}

fn has_blocks(bytes: &[u8], blocks: &[u64], what: &str) {
    for block in blocks {
        let at = usize::try_from(block * BLOCK).unwrap();
        let found = &bytes[at..at + usize::try_from(BLOCK).unwrap()];
        assert!(found == content(*block), "{what}: block {block} is lost");
    }
}

/// How many times the trace has that data were put on the disk, up to now.
fn syncs(trace: &Path) -> usize {
    let text = fs::read_to_string(trace).unwrap();
    text.lines()
        .filter(|line| {
            let syncs = line.contains("fdatasync") || line.contains("fsync");
            let ended = line.trim_end().ends_with("= 0");
            syncs && ended || line.contains("RWF_DSYNC") && !line.contains(" = -1")
        })
        .count()
}

#[test]
fn the_disk_is_asked_before_the_client_hears_that_data_are_safe() {
    let Some(bench) = Bench::new() else { return };
    if !installed("strace") {
        return;
    }
    let trace = bench.path("trace");
    for format in ["raw", "qcow2"] {
        bench.disk("disk", format);
        let plain = bench.server(Who::Serve, &format!("-k @s -x vda -f {format} @disk"));
        let strace = "exec strace -f -e trace=fsync,fdatasync,pwritev2 -o trace";
        let traced = bench.behind(strace, &plain);
        let mut server = bench.place.start(traced);
        let socket = bench.path("s");
        server.until("a socket", SHORT, || listens(&socket));
        let mut client = Client::connect(&socket);
        client.go(false);
        write(&mut client, 0, 0, &[1; 4096]);
        // A write alone is not waited for.
        let before = syncs(&trace);
        write(&mut client, 0, 8192, &[1; 4096]);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(syncs(&trace), before, "{format}");
        let mut last = before;
        for (command, flags, len) in
            [(WRITE, FUA, 4096), (ZERO, FUA, 65_536), (TRIM, FUA, 65_536), (FLUSH, 0, 0)]
        {
            if command == WRITE {
                write(&mut client, flags, 0, &[2; 4096]);
            } else {
                assert_eq!(client.errno(flags, command, 0, len), 0);
            }
            let now = syncs(&trace);
            assert!(now > last, "{format}: command {command} was answered first");
            last = now;
            // The flag is for its own command.
            write(&mut client, 0, 8192, &[3; 4096]);
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(syncs(&trace), last, "{format}: after command {command}");
        }
        drop(client);
        server.wait(SHORT).ended_with(0);
        fs::remove_file(&trace).unwrap();
    }
}
