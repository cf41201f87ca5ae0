// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Options, byte by byte.

use crate::client::{ACK, Client, INVALID, TOO_BIG, UNKNOWN, UNSUP};
use crate::client::{export, info, meta, sample, serve, serve_one};
use std::io::Write;
use std::time::{Duration, Instant};
use tranship_nbd::Limits;

fn negotiating(client: &mut Client) -> &mut Client {
    client.say(&3u32.to_be_bytes());
    client
}

#[test]
fn export_name_is_answered_with_and_without_padding() {
    let place = serve_one(sample());
    for (flags, padding) in [(1u32, 124), (3, 0)] {
        let mut client = place.connect();
        client.say(&flags.to_be_bytes());
        client.send_option(1, b"vda");
        assert_eq!(client.u64(), 1 << 20);
        assert_eq!(client.u16(), 0xd6d);
        assert!(client.take(padding).iter().all(|byte| *byte == 0));
        assert_eq!(client.errno(0, 0, 5, 5), 0);
    }
    let mut client = place.connect();
    negotiating(&mut client).send_option(1, b"nope");
    assert!(client.is_closed());
}

#[test]
fn an_unknown_option_is_drained_and_refused() {
    let place = serve_one(sample());
    let mut client = place.connect();
    negotiating(&mut client);
    assert_eq!(client.option(4242, &vec![b'x'; 60 << 10]).0, UNSUP);
    assert_eq!(client.option(4, b"").0, UNSUP);
    assert_eq!(client.option(5, b"").0, UNSUP);
    assert_eq!(client.option(3, b""), (ACK, vec![b"\0\0\0\x03vdaa test".to_vec()]));
}

#[test]
fn bad_data_of_known_options_is_invalid_and_not_the_end() {
    let place = serve_one(sample());
    let mut client = place.connect();
    negotiating(&mut client);
    let trailing = [info("vda", &[]), vec![0]].concat();
    let lying = [&[0xff; 4][..], b"vda"].concat();
    let table: [(u32, Vec<u8>, u32); 12] = [
        (3, b"data".to_vec(), INVALID),
        (8, b"data".to_vec(), INVALID),
        (6, trailing.clone(), INVALID),
        (7, trailing, INVALID),
        (7, lying, INVALID),
        (7, info(&"n".repeat(4097), &[]), INVALID),
        (7, info(&"n".repeat(4096), &[]), UNKNOWN),
        (7, info("a\0b", &[]), INVALID),
        (7, vec![], INVALID),
        (10, meta("vda", &["base:allocation"]), INVALID),
        (9, meta("nope", &[]), UNKNOWN),
        (9, meta("vda", &["base:"; 65]), TOO_BIG),
    ];
    for (number, data, expected) in table {
        assert_eq!(client.option(number, &data), (expected, vec![]), "option {number}");
    }
    assert_eq!(client.option(6, &info("vda", &[])).0, ACK);
}

#[test]
fn info_and_go_give_what_was_asked_for() {
    let place = serve_one(sample());
    let mut client = place.connect();
    negotiating(&mut client);
    let size = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0x0d, 0x6d]].concat();
    let blocks =
        [&[0, 3, 0, 0, 0, 1][..], &4096u32.to_be_bytes(), &(32u32 << 20).to_be_bytes()].concat();
    assert_eq!(client.option(6, &info("vda", &[])), (ACK, vec![size.clone(), blocks.clone()]));
    let texts = [b"\0\x01vda".to_vec(), b"\0\x02a test".to_vec()];
    let expected = vec![size, blocks, texts[0].clone(), texts[1].clone()];
    // The empty name means the only export; kinds that nobody knows are ignored.
    assert_eq!(client.option(7, &info("", &[2, 77, 1, 1])), (ACK, expected));
    assert_eq!(client.errno(0, 0, 0, 1), 0);
}

#[test]
fn contexts_are_listed_and_selected_by_query() {
    let place = serve_one(sample());
    let mut client = place.connect();
    negotiating(&mut client);
    let entry = |id: u32| vec![[&id.to_be_bytes()[..], b"base:allocation"].concat()];
    assert_eq!(client.option(9, &meta("vda", &[])), (ACK, entry(0)));
    assert_eq!(client.option(8, b"").0, ACK);
    assert_eq!(client.option(9, &meta("vda", &["base:"])), (ACK, entry(0)));
    for nothing in [&["base:"][..], &["qemu:dirty-bitmap:x"], &["base:other", ""], &[]] {
        assert_eq!(client.option(10, &meta("vda", nothing)), (ACK, vec![]));
    }
    let twice = ["base:allocation", "base:allocation"];
    assert_eq!(client.option(10, &meta("vda", &twice)), (ACK, entry(1)));
}

#[test]
fn a_selection_holds_for_its_own_export_and_until_the_next() {
    let place = serve(vec![export("vda", sample()), export("vdb", sample())], Limits::default());
    let cases: [(&[(&str, &str)], u32); 4] = [
        (&[("vda", "base:allocation")], 0),
        (&[("vdb", "base:allocation")], 22),
        (&[("vda", "base:allocation"), ("nope", "base:allocation")], 22),
        (&[("vda", "base:allocation"), ("vda", "base:")], 22),
    ];
    for (selections, expected) in cases {
        let mut client = place.connect();
        negotiating(&mut client).option(8, b"");
        for (name, query) in selections {
            client.option(10, &meta(name, &[query]));
        }
        assert_eq!(client.option(7, &info("vda", &[])).0, ACK);
        assert_eq!(client.errno(0, 7, 0, 4096), expected, "{selections:?}");
    }
}

#[test]
fn violations_close_the_connection() {
    let place = serve(vec![export("vda", sample())], Limits { options: 3, ..Limits::default() });
    let option = |magic: &[u8; 8], number: u32, len: u32| {
        [&magic[..], &number.to_be_bytes(), &len.to_be_bytes()].concat()
    };
    let table: [(u32, Vec<u8>); 5] = [
        (0x80, vec![]),
        (0, option(b"IHAVEOPT", 3, 0)),
        (3, option(b"IHAVENOT", 3, 0)),
        (3, option(b"IHAVEOPT", 4242, u32::MAX)),
        (3, option(b"IHAVEOPT", 10, (256 << 10) + 1)),
    ];
    for (flags, bytes) in table {
        let mut client = place.connect();
        let _ = client.0.write_all(&[&flags.to_be_bytes()[..], &bytes].concat());
        assert!(client.is_closed(), "{flags:#x} {bytes:?}");
    }
    let mut client = place.connect();
    negotiating(&mut client);
    for _ in 0..3 {
        assert_eq!(client.option(3, b"").0, ACK);
    }
    assert!(client.is_closed());
}

#[test]
fn abort_is_acknowledged_whatever_it_carries() {
    let place = serve_one(sample());
    let mut client = place.connect();
    assert_eq!(negotiating(&mut client).option(2, &[0; 5000]).0, ACK);
    assert!(client.is_closed());
}

#[test]
fn a_client_may_leave_after_any_byte() {
    let place = serve_one(sample());
    let mut whole = 3u32.to_be_bytes().to_vec();
    for (number, data) in
        [(8u32, vec![]), (10, meta("vda", &["base:allocation"])), (7, info("vda", &[3]))]
    {
        whole.extend(b"IHAVEOPT");
        whole.extend(number.to_be_bytes());
        whole.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        whole.extend(data);
    }
    whole.extend(crate::client::header(0, 1, 1, 0, 100));
    for len in 0..whole.len() {
        place.connect().say(&whole[..len]);
    }
    let mut client = place.connect();
    client.go(true);
    assert_eq!(client.errno(0, 0, 0, 4096), 0);
    let started = Instant::now();
    while place.running.connections() > 1 {
        assert!(started.elapsed() < Duration::from_secs(10), "connections stay");
        std::thread::yield_now();
    }
}

#[test]
fn a_slow_handshake_ends_and_does_not_keep_others_out() {
    let limits = Limits { handshake: Duration::from_secs(2), handshakes: 2, ..Limits::default() };
    let place = serve(vec![export("vda", sample())], limits);
    let mut idle: Vec<_> = (0..2).map(|_| place.connect()).collect();
    // The third client is greeted once the others have been sent away.
    let mut client = place.connect();
    client.go(false);
    assert_eq!(client.errno(0, 0, 0, 1), 0);
    assert!(idle.iter_mut().all(Client::is_closed));
    // In transmission there is no such limit.
    std::thread::sleep(Duration::from_millis(2100));
    assert_eq!(client.errno(0, 0, 0, 1), 0);
}
