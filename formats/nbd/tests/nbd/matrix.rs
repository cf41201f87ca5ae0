// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every command with every flag, and at every odd place, in each way of talking: the
//! answers have the specified numbers, and the connection stays.

use crate::client::{Client, Place, Reply, export, extended, header, sample, serve};
use tranship_nbd::{Export, Limits};

const SIZE: u64 = 1 << 20;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZERO: u16 = 6;
const STATUS: u16 = 7;

const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Simple,
    Structured,
    Extended,
}

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// A client with a connection that was agreed upon in this way.
struct Talk {
    client: Client,
    mode: Mode,
}

impl Talk {
    fn new(place: &Place, mode: Mode) -> Self {
        let mut client = place.connect();
        match mode {
            Mode::Simple => client.go(false),
            Mode::Structured => client.go(true),
            Mode::Extended => client.go_extended(&["base:allocation"]),
        }
        Self { client, mode }
    }

    /// The number that a request is answered with; 0 after everything it is answered with.
    fn errno(&mut self, flags: u16, command: u16, offset: u64, len: u64, payload: &[u8]) -> u32 {
        let request = match self.mode {
            Mode::Extended => extended(flags, command, 7, offset, len),
            _ => header(flags, command, 7, offset, u32::try_from(len).unwrap()),
        };
        self.client.say(&[&request, payload].concat());
        let mut errno = 0;
        loop {
            match self.client.reply() {
                Reply::Simple { errno, cookie } => {
                    assert_eq!(cookie, 7);
                    assert!(self.mode != Mode::Extended, "a simple reply");
                    assert!(command != READ || self.mode == Mode::Simple, "a simple reply");
                    if errno == 0 && command == READ {
                        self.client.take(usize::try_from(len).unwrap());
                    }
                    return errno;
                }
                Reply::Chunk { done, kind, cookie, payload } => {
                    assert_eq!(cookie, 7);
                    assert!(self.mode != Mode::Simple, "a chunk");
                    if kind & 0x8000 != 0 {
                        errno = u32::from_be_bytes(*payload.first_chunk().unwrap());
                        assert_ne!(errno, 0);
                    }
                    if done {
                        return errno;
                    }
                }
            }
        }
    }

    fn is_alive(&mut self) {
        assert_eq!(self.errno(0, READ, 4096, 512, &[]), 0);
    }
}

fn places() -> [(Place, bool); 2] {
    [false, true].map(|read_only| {
        let exports = vec![Export { read_only, ..export("vda", sample()) }];
        (serve(exports, Limits::default()), read_only)
    })
}

/// What a request without flags may be answered with.
fn expected(command: u16, offset: u64, len: u64, read_only: bool) -> &'static [u32] {
    let is_inside = offset <= SIZE && len <= SIZE - offset;
    match command {
        // An answer that is too long and would not be there either.
        READ if len > 32 << 20 => &[EOVERFLOW, EINVAL],
        WRITE | TRIM | ZERO if read_only => &[EPERM],
        READ | CACHE | WRITE | TRIM | ZERO if is_inside => &[0],
        WRITE | ZERO => &[ENOSPC],
        FLUSH if offset == 0 && len == 0 => &[0],
        STATUS if is_inside && len > 0 => &[0],
        _ => &[EINVAL],
    }
}

#[test]
fn every_command_at_every_place_has_its_number() {
    for (place, read_only) in places() {
        for mode in MODES {
            let mut talk = Talk::new(&place, mode);
            let mut lens =
                vec![0, 1, 511, 512, SIZE, SIZE + 1, (32 << 20) + 1, u64::from(u32::MAX)];
            if mode == Mode::Extended {
                lens.extend([1 << 32, 1 << 63, u64::MAX]);
            }
            for command in [READ, WRITE, FLUSH, TRIM, CACHE, ZERO, STATUS, 8, 9, 255, u16::MAX] {
                for offset in [0, 1, 513, SIZE - 1, SIZE, SIZE + 1, 1 << 32, 1 << 63, u64::MAX] {
                    for &len in &lens {
                        let is_write = command == WRITE;
                        if is_write && len > SIZE + 1 {
                            // Payloads of this length have a test of their own.
                            continue;
                        }
                        let payload = vec![0; if is_write { len as usize } else { 0 }];
                        let flags = if is_write && mode == Mode::Extended { 32 } else { 0 };
                        let said = talk.errno(flags, command, offset, len, &payload);
                        let allowed: &[u32] = match (mode, command) {
                            // Without structured replies there is no context to ask for.
                            (Mode::Simple, STATUS) => &[EINVAL],
                            _ => expected(command, offset, len, read_only),
                        };
                        assert!(
                            allowed.contains(&said),
                            "{mode:?}, read-only {read_only}: command {command} at {offset} of \
                             {len} bytes: {said}, expected {allowed:?}"
                        );
                    }
                }
            }
            talk.is_alive();
        }
    }
}

/// Whether a command may have a flag.
fn is_known(mode: Mode, command: u16, flag: u16) -> bool {
    match flag {
        // Forced unit access was offered, and that is for all commands.
        1 => (READ..=STATUS).contains(&command),
        2 | 16 => command == ZERO,
        4 => command == READ && mode != Mode::Simple,
        8 => command == STATUS && mode != Mode::Simple,
        32 => command == WRITE && mode == Mode::Extended,
        _ => false,
    }
}

#[test]
fn flags_that_were_not_agreed_upon_are_invalid_and_not_the_end() {
    let [(place, _), _] = places();
    for mode in MODES {
        let mut talk = Talk::new(&place, mode);
        for command in [READ, WRITE, FLUSH, TRIM, CACHE, ZERO, STATUS, 8, 77] {
            for flag in (0..16).map(|bit| 1_u16 << bit) {
                let len = if command == FLUSH && flag != 32 { 0 } else { 512 };
                let needed = if command == WRITE && mode == Mode::Extended { 32 } else { 0 };
                let has_payload = command == WRITE || mode == Mode::Extended && flag == 32;
                let payload = vec![0; if has_payload { 512 } else { 0 }];
                let said = talk.errno(flag | needed, command, 0, len, &payload);
                let is_status = mode == Mode::Simple && command == STATUS;
                let is_known = is_known(mode, command, flag) && !is_status;
                let allowed: &[u32] = match (is_known, flag) {
                    (false, _) => &[EINVAL],
                    // A disk in memory is not faster in being zeroed than in being written.
                    (true, 16) => &[0, ENOTSUP],
                    (true, _) => &[0],
                };
                assert!(
                    allowed.contains(&said),
                    "{mode:?}: command {command} with flag {flag:#x}: {said}"
                );
                talk.is_alive();
            }
        }
        // Unlike others this ends it, whatever its flags are.
        talk.client.request(0, DISC, 0, 0);
        assert!(talk.client.is_closed());
    }
}
