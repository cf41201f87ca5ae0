// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Headers with wrong numbers: errors are fine, panics, floods and hangs are not.
#![allow(missing_docs, clippy::unwrap_used)]

use proptest::prelude::*;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use tranship_block::{MemoryDevice, Span};
use tranship_format_testing::{damaged, exercise};
use tranship_luks::{Header, Limits, Luks};

const SMALL: Limits = Limits {
    key_bytes: 64,
    stripes: 4000,
    pbkdf2_iterations: 20_000,
    argon2_memory: 1 << 20,
    argon2_work: 4 << 20,
};

fn luks1() -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    bytes[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
    bytes[8..11].copy_from_slice(b"aes");
    bytes[40..51].copy_from_slice(b"xts-plain64");
    bytes[72..78].copy_from_slice(b"sha256");
    bytes[104..108].copy_from_slice(&1024_u32.to_be_bytes());
    bytes[108..112].copy_from_slice(&64_u32.to_be_bytes());
    bytes[164..168].copy_from_slice(&2_u32.to_be_bytes());
    for slot in 0..8_usize {
        let at = 208 + slot * 48;
        let state: u32 = if slot < 2 { 0x00ac_71f3 } else { 0xdead };
        bytes[at..at + 4].copy_from_slice(&state.to_be_bytes());
        bytes[at + 4..at + 8].copy_from_slice(&2_u32.to_be_bytes());
        bytes[at + 40..at + 44].copy_from_slice(&8_u32.to_be_bytes());
        bytes[at + 44..at + 48].copy_from_slice(&10_u32.to_be_bytes());
    }
    bytes
}

/// Both headers with this JSON and right checksums.
fn luks2(json: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    for (at, magic) in [(0_usize, b"LUKS\xba\xbe"), (0x4000, b"SKUL\xba\xbe")] {
        let header = &mut bytes[at..at + 0x4000];
        header[..6].copy_from_slice(magic);
        header[7] = 2;
        header[8..16].copy_from_slice(&0x4000_u64.to_be_bytes());
        header[72..78].copy_from_slice(b"sha256");
        header[256..264].copy_from_slice(&(at as u64).to_be_bytes());
        let len = json.len().min(0x3000);
        header[4096..4096 + len].copy_from_slice(&json[..len]);
        let digest = Sha256::digest(&*header);
        header[448..480].copy_from_slice(&digest);
    }
    bytes
}

const JSON: &str = r#"{"keyslots":{"0":{"type":"luks2","key_size":32,
"af":{"type":"luks1","stripes":4,"hash":"sha256"},
"area":{"type":"raw","offset":"65536","size":"4096","encryption":"aes-xts-plain64","key_size":32},
"kdf":{"type":"argon2id","time":1,"memory":64,"cpus":1,"salt":"AAAAAAAAAAAAAAAAAAAAAA=="}}},
"tokens":{},"segments":{"0":{"type":"crypt","offset":"131072","size":"dynamic","iv_tweak":"0",
"encryption":"aes-xts-plain64","sector_size":512}},
"digests":{"0":{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256",
"iterations":10,"salt":"AAAA","digest":"AAAA"}},"config":{"json_size":"12288"}}"#;

fn unlock(bytes: Vec<u8>) -> String {
    match Luks::unlock(Arc::new(MemoryDevice::read_only(bytes)), b"x", &SMALL) {
        Ok(luks) => {
            exercise(&luks);
            String::new()
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", cause.unwrap_or_default())
        }
    }
}

#[test]
fn whole_headers_are_tried() {
    assert!(unlock(luks1()).starts_with("passphrase opens none of the 2 key slots"));
    assert!(unlock(luks2(JSON.as_bytes())).starts_with("passphrase opens none of the 1 key slots"));
}

#[test]
fn greedy_headers_are_refused_by_what_they_ask_for() {
    let cases = [
        ("\"memory\":64", "\"memory\":4294967295", "argon2 asks for 4398046510080 bytes of memory"),
        ("\"time\":1", "\"time\":4294967295", "argon2 asks for 4294967295 passes"),
        ("\"time\":1", "\"time\":0", "parameters of argon2id are impossible"),
        ("\"cpus\":1", "\"cpus\":4294967295", "parameters of argon2id are impossible"),
        ("\"stripes\":4", "\"stripes\":4001", "key is split into 4001 stripes, expected 1 to 4000"),
        ("\"stripes\":4", "\"stripes\":0", "key is split into 0 stripes"),
        ("\"key_size\":32", "\"key_size\":4000000000", "key has 4000000000 bytes"),
        ("\"65536\"", "\"18446744073709551000\"", "key material of 512 bytes ends past"),
        ("\"131072\"", "\"9999999999\"", "payload starts behind the file's end"),
        ("\"dynamic\"", "\"100\"", "payload has 100 bytes, expected whole sectors"),
        ("\"sector_size\":512", "\"sector_size\":0", "passphrase opens none"),
        ("\"iterations\":10", "\"iterations\":4000000000", "pbkdf2 asks for 4000000000 iterations"),
    ];
    for (from, to, expected) in cases {
        let json = JSON.replacen(from, to, 1);
        assert_ne!(json, JSON, "{from}");
        let error = unlock(luks2(json.as_bytes()));
        assert!(error.contains(expected), "{to}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_luks1_does_no_harm(bytes in damaged(luks1(), vec![Span::new(0, 592)])) {
        unlock(bytes);
    }

    #[test]
    fn damaged_luks2_does_no_harm(bytes in damaged(luks2(JSON.as_bytes()), vec![Span::new(0, 512), Span::new(0x4000, 512)])) {
        unlock(bytes);
    }

    #[test]
    fn damaged_json_does_no_harm(json in damaged(JSON.as_bytes().to_vec(), Vec::new())) {
        let bytes = luks2(&json);
        let _ = Header::read(&MemoryDevice::read_only(bytes.clone()));
        unlock(bytes);
    }
}
