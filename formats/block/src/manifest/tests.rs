// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Manifests: made while copying, written, read, broken, verified.

use super::*;
use crate::{BlockDevice, CopyObserver, CopyOptions, ErrorKind, MemoryDevice, copy};
use std::sync::Mutex;

#[derive(Default)]
struct Notes {
    chunks: Mutex<Vec<HashedChunk>>,
    differ: Mutex<Vec<Span>>,
}

impl CopyObserver for Notes {
    fn hashed(&self, chunk: HashedChunk) {
        self.chunks.lock().unwrap().push(chunk);
    }
    fn mismatch(&self, span: Span) {
        self.differ.lock().unwrap().push(span);
    }
}

const CHUNK: u64 = 8192;

/// Chunks: data, zero, half data, zero, zero, short data.
fn disk() -> Vec<u8> {
    let mut bytes = vec![0; 5 * 8192 + 100];
    bytes[..8192].fill(1);
    bytes[2 * 8192 + 5000..3 * 8192].fill(2);
    bytes[5 * 8192 + 99] = 3;
    bytes
}

fn hashes(bytes: &[u8], start: u64) -> Vec<HashedChunk> {
    let source = MemoryDevice::read_only(bytes.to_vec());
    let target = MemoryDevice::new(vec![0; bytes.len()]);
    let notes = Notes::default();
    let options = CopyOptions {
        start,
        hash: Some(CHUNK),
        chunk: 10_000,
        threads: 3,
        ..CopyOptions::default()
    };
    copy(&source, &target, &options, &notes).unwrap();
    notes.chunks.into_inner().unwrap()
}

fn manifest(bytes: &[u8]) -> Vec<u8> {
    let mut writer =
        ManifestWriter::new(Vec::new(), CHUNK, u64::try_from(bytes.len()).unwrap()).unwrap();
    for row in hashes(bytes, 0) {
        writer.push(&row).unwrap();
    }
    writer.finish().unwrap().0
}

fn verify_with(bytes: &[u8], text: &[u8], first_only: bool) -> (Result<Verified>, Vec<Span>) {
    let notes = Notes::default();
    let device = MemoryDevice::read_only(bytes.to_vec());
    let options = VerifyOptions { threads: 2, first_only };
    let result =
        ManifestReader::new(text).and_then(|reader| verify(&device, reader, &options, &notes));
    let mut differ = notes.differ.into_inner().unwrap();
    differ.sort_by_key(|span| span.start);
    (result, differ)
}

#[test]
fn the_hashes_are_those_of_the_bytes() {
    let bytes = disk();
    let expected: Vec<HashedChunk> = bytes
        .chunks(8192)
        .zip(0..)
        .filter(|(chunk, _)| !crate::is_zero(chunk))
        .map(|(chunk, index)| HashedChunk { index, digest: Digest(Sha256::digest(chunk).into()) })
        .collect();
    assert_eq!(expected.iter().map(|row| row.index).collect::<Vec<_>>(), [0, 2, 5]);
    assert_eq!(hashes(&bytes, 0), expected);
    assert_eq!(hashes(&bytes, 2 * CHUNK), expected[1..]);
}

#[test]
fn a_copy_with_hashes_starts_at_a_chunk() {
    let device = MemoryDevice::new(disk());
    for (start, hash) in [(100, CHUNK), (0, 5000), (0, 1 << 30)] {
        let options = CopyOptions { start, hash: Some(hash), ..CopyOptions::default() };
        let error = copy(&device, &device, &options, &()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
}

#[test]
fn a_disk_equals_its_manifest_and_a_changed_byte_is_found() {
    let bytes = disk();
    let text = manifest(&bytes);
    let (verified, differ) = verify_with(&bytes, &text, false);
    let verified = verified.unwrap();
    assert_eq!((verified.chunks, verified.mismatches, verified.first), (6, 0, None));
    assert_eq!(verified.summary.unwrap().chunks, 3);
    assert!(differ.is_empty());

    // In a chunk with data, in one without, in the short one.
    let mut wrong = bytes.clone();
    for at in [8191, 8192, 4 * 8192 - 1, 5 * 8192] {
        wrong[at] = 9;
    }
    let expected = [(0, 8192), (8192, 8192), (3 * 8192, 8192), (5 * 8192, 100)];
    let expected = expected.map(|(start, len)| Span::new(start, len));
    let (verified, differ) = verify_with(&wrong, &text, false);
    let verified = verified.unwrap();
    assert_eq!((verified.mismatches, verified.first), (4, Some(expected[0])));
    assert_eq!(differ, expected);
    let (verified, differ) = verify_with(&wrong, &text, true);
    assert_eq!(verified.unwrap().first, Some(expected[0]));
    assert!(differ.len() < 4);
}

#[test]
fn a_manifest_that_is_damaged_or_incomplete_is_refused() {
    let bytes = disk();
    let text = String::from_utf8(manifest(&bytes)).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let cut = |keep: usize| lines[..keep].join("\n") + "\n";
    let cases = [
        (String::new(), "is not a manifest"),
        (
            text.replace("sha256\",", "md5\","),
            "manifest has hashes of algorithm \"md5\", expected \"sha256\"",
        ),
        (text.replace("manifest\":1", "manifest\":2"), "manifest has version 2, expected 1"),
        (
            text.replace("8192", "8191"),
            "manifest has chunks of 8191 bytes, expected a power of two from 4096 to 16777216",
        ),
        (text.replace("size\":41060", "size\":41061"), "disk has 41060 bytes, its manifest 41061"),
        (cut(4), "manifest has no last line: it is of an unfinished copy"),
        (cut(3) + lines[4], "manifest's rows do not have the digest of its last line"),
        (
            text.replace("index\":5", "index\":6"),
            "manifest lists chunk 6, expected one from 3 to below 6",
        ),
        (
            text.replace("index\":2", "index\":0"),
            "manifest lists chunk 0, expected one from 1 to below 6",
        ),
        (text.replace("index\":2", "number\":2"), "line 3 of the manifest is not a chunk"),
        (cut(2) + &"x".repeat(100_000), "line 3 of the manifest is not a chunk"),
    ];
    for (text, expected) in cases {
        let error = verify_with(&bytes, text.as_bytes(), false).0.unwrap_err();
        if expected.starts_with("line 3") && text.ends_with('x') {
            assert_eq!(error.message(), "manifest has no last line: it is of an unfinished copy");
        } else {
            assert_eq!(error.message(), expected);
        }
    }
}

#[test]
fn an_interrupted_manifest_goes_on() {
    let bytes = disk();
    let text = manifest(&bytes);
    let size = u64::try_from(bytes.len()).unwrap();
    for cut in [100, 170, 250, 300, text.len()] {
        for start in [0, CHUNK, 2 * CHUNK] {
            let enough = cut >= 170 || start == 0;
            let earlier = ManifestReader::new(&text[..cut]).unwrap();
            let mut writer =
                ManifestWriter::resume(Vec::new(), earlier, CHUNK, size, start).unwrap();
            for row in hashes(&bytes, start) {
                writer.push(&row).unwrap();
            }
            let (again, _) = writer.finish().unwrap();
            assert_eq!(again == text, enough, "{cut} {start}");
        }
    }
    let earlier = ManifestReader::new(&text[..]).unwrap();
    let error = ManifestWriter::resume(Vec::new(), earlier, CHUNK, 1, 0).unwrap_err();
    assert_eq!(
        error.message(),
        "manifest is of 41060 bytes in chunks of 8192, expected 1 in chunks of 8192"
    );
}

#[test]
fn verifying_reports_what_cannot_be_read() {
    let bytes = disk();
    let text = manifest(&bytes);
    let device = crate::testing::Faulty::new(MemoryDevice::read_only(bytes)).bad(20_000..20_001);
    assert_eq!(device.size(), 41_060);
    let reader = ManifestReader::new(&text[..]).unwrap();
    let error = verify(&device, reader, &VerifyOptions::default(), &()).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Io, Some(2 * CHUNK)));
}
