// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images for the tests: any chunks, with a property list and a trailer.
#![allow(clippy::unwrap_used, dead_code, reason = "every test file uses a part of it")]

use base64::Engine;
use std::io::{Read, Write};

pub(crate) const ZERO: u32 = 0;
pub(crate) const RAW: u32 = 1;
pub(crate) const IGNORED: u32 = 2;
pub(crate) const ADC: u32 = 0x8000_0004;
pub(crate) const ZLIB: u32 = 0x8000_0005;
pub(crate) const BZIP2: u32 = 0x8000_0006;
pub(crate) const LZFSE: u32 = 0x8000_0007;
pub(crate) const LZMA: u32 = 0x8000_0008;
pub(crate) const COMMENT: u32 = 0x7fff_fffe;
const END: u32 = 0xffff_ffff;

pub(crate) fn pack(kind: u32, bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    match kind {
        ZERO | IGNORED | COMMENT => {}
        RAW => packed.extend(bytes),
        ADC => {
            for part in bytes.chunks(128) {
                packed.push(0x80 | u8::try_from(part.len() - 1).unwrap());
                packed.extend(part);
            }
        }
        ZLIB => {
            let level = libdeflater::CompressionLvl::default();
            let mut compressor = libdeflater::Compressor::new(level);
            packed.resize(compressor.zlib_compress_bound(bytes.len()), 0);
            let len = compressor.zlib_compress(bytes, &mut packed).unwrap();
            packed.truncate(len);
        }
        BZIP2 => {
            let mut encoder = bzip2::write::BzEncoder::new(&mut packed, bzip2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap();
        }
        LZFSE => {
            lzfse_rust::encode_bytes(bytes, &mut packed).unwrap();
        }
        LZMA => {
            liblzma::read::XzEncoder::new(bytes, 1).read_to_end(&mut packed).unwrap();
        }
        _ => panic!("no such kind"),
    }
    packed
}

/// A chunk: its kind, first sector, sectors, and what is stored for it.
pub(crate) type Run = (u32, u64, u64, Vec<u8>);

/// An image of `sectors` with two tables, for the runs below and from `split` on.
pub(crate) fn image(sectors: u64, runs: &[Run], split: usize) -> Vec<u8> {
    let mut file = Vec::new();
    let mut tables = Vec::new();
    let (low, high) = runs.split_at(split);
    for part in [low, high].into_iter().filter(|part| !part.is_empty()) {
        let first = part[0].1;
        let mut table = vec![0; 204];
        table[..4].copy_from_slice(b"mish");
        table[7] = 1;
        table[8..16].copy_from_slice(&first.to_be_bytes());
        let count = u32::try_from(part.len() + 1).unwrap();
        table[200..204].copy_from_slice(&count.to_be_bytes());
        for (kind, sector, count, stored) in part {
            table.extend(kind.to_be_bytes());
            table.extend([0; 4]);
            for number in [sector - first, *count, file.len() as u64, stored.len() as u64] {
                table.extend(number.to_be_bytes());
            }
            file.extend(stored);
        }
        table.extend(END.to_be_bytes());
        table.extend([0; 36]);
        tables.push(table);
    }
    wrap(file, &tables, sectors)
}

/// Adds the property list and the trailer.
pub(crate) fn wrap(mut file: Vec<u8>, tables: &[Vec<u8>], sectors: u64) -> Vec<u8> {
    let mut list =
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE plist PUBLIC \"-//Apple//DTD \
                    PLIST 1.0//EN\" \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">\n<plist \
                    version=\"1.0\"><dict><key>resource-fork</key><dict><key>blkx</key><array>"
            .to_owned();
    for table in tables {
        let text = base64::engine::general_purpose::STANDARD.encode(table);
        list.push_str(
            "<dict><key>Attributes</key><string>0x0050</string><key>Data</key>\n<data>\n",
        );
        for line in text.as_bytes().chunks(52) {
            list.push_str("\t\t\t");
            list.push_str(std::str::from_utf8(line).unwrap());
            list.push('\n');
        }
        list.push_str("</data><key>ID</key><string>0</string></dict>");
    }
    list.push_str("</array></dict></dict></plist>\n");
    let data = file.len() as u64;
    file.extend(list.as_bytes());
    let mut trailer = vec![0; 512];
    trailer[..4].copy_from_slice(b"koly");
    trailer[7] = 4;
    trailer[10..12].copy_from_slice(&512_u16.to_be_bytes());
    trailer[32..40].copy_from_slice(&data.to_be_bytes());
    trailer[63] = 1;
    trailer[216..224].copy_from_slice(&data.to_be_bytes());
    trailer[224..232].copy_from_slice(&(list.len() as u64).to_be_bytes());
    trailer[492..500].copy_from_slice(&sectors.to_be_bytes());
    file.extend(trailer);
    file
}
