// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Packed files for the tests.
#![allow(clippy::unwrap_used)]
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::io::{Read, Write};

/// One member with every field that a header can have.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let builder = flate2::GzBuilder::new().filename("disk.raw").comment("c").extra("extra");
    let mut encoder = builder.write(Vec::new(), flate2::Compression::new(2));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    liblzma::read::XzEncoder::new(bytes, 0).read_to_end(&mut packed).unwrap();
    packed
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.set_pledged_src_size(Some(bytes.len() as u64)).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd_without_size(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Frames of `frame` bytes and a table of them.
pub(crate) fn seekable(bytes: &[u8], frame: usize) -> Vec<u8> {
    let mut packed = Vec::new();
    let mut table = Vec::new();
    for part in bytes.chunks(frame) {
        let one = zstd_without_size(part);
        table.extend(u32::try_from(one.len()).unwrap().to_le_bytes());
        table.extend(u32::try_from(part.len()).unwrap().to_le_bytes());
        packed.extend(one);
    }
    let count = u32::try_from(table.len() / 8).unwrap();
    packed.extend(0x184d_2a5e_u32.to_le_bytes());
    packed.extend((count * 8 + 9).to_le_bytes());
    packed.extend(table);
    packed.extend(count.to_le_bytes());
    packed.push(0);
    packed.extend(0x8f92_eab1_u32.to_le_bytes());
    packed
}

pub(crate) fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
