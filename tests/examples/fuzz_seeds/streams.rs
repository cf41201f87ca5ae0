// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is only read, or no file at all: compressed disks, what is said over NBD, and what a
//! guest does with its devices.

use crate::{Seeds, dmg};
use std::io::{Read, Write};
use tranship_format_testing::pattern;

pub(crate) fn make(seeds: &Seeds) {
    dmg(seeds);
    cloop(seeds);
    bundle(seeds);
    packed(seeds);
    tar(seeds);
    nbd_server(seeds);
    nbd_client(seeds);
    for (target, input) in tranship_vmm::fuzzing::seeds() {
        seeds.put(target, &input);
    }
}

fn dmg(seeds: &Seeds) {
    use dmg::{ADC, BZIP2, COMMENT, IGNORED, LZFSE, LZMA, RAW, ZERO, ZLIB};
    let runs: Vec<_> = [ZLIB, ZERO, RAW, IGNORED, COMMENT, ADC, BZIP2, LZFSE, LZMA]
        .into_iter()
        .zip(0_u64..)
        .map(|(kind, number)| {
            let mut bytes = vec![0; 4 * 512];
            bytes[..600].copy_from_slice(&pattern(600, number));
            let sectors = if kind == COMMENT { 0 } else { 4 };
            (kind, number * 4, sectors, dmg::pack(kind, &bytes))
        })
        .collect();
    seeds.add("dmg", &[&dmg::image(36, &runs, 0)]);
    seeds.add("dmg", &[&dmg::image(36, &runs, 4)]);
    for (kind, _, _, stored) in runs {
        seeds.add("dmg", &[&dmg::image(4, &[(kind, 0, 4, stored)], 0)]);
    }
}

fn tar(seeds: &Seeds) {
    let long = format!("{}/disk.img", "folder".repeat(30));
    let mut archives: Vec<Vec<u8>> = Vec::new();
    for header in [tar::Header::new_gnu(), tar::Header::new_ustar(), tar::Header::new_old()] {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, len) in [("guest.ovf", 700), ("./a/disk-1.vmdk", 1024), ("empty", 0)] {
            let mut header = header.clone();
            header.set_size(len);
            let bytes = pattern(len as usize, len);
            archive.append_data(&mut header, name, bytes.as_slice()).unwrap();
        }
        // Only GNU's has a way to say a name that is as long as this.
        let mut header = header.clone();
        header.set_size(3);
        let _ = archive.append_data(&mut header, &long, &b"abc"[..]);
        archives.push(archive.into_inner().unwrap());
    }
    let mut archive = tar::Builder::new(Vec::new());
    let records = [("path", long.as_bytes()), ("size", b"3"), ("mtime", b"1.5")];
    archive.append_pax_extensions(records).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(3);
    archive.append_data(&mut header, "short", &b"abc"[..]).unwrap();
    archives.push(archive.into_inner().unwrap());
    for archive in archives {
        for kind in [0, 1] {
            seeds.put("tar", &[&[kind], archive.as_slice()].concat());
        }
    }
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    let level = flate2::Compression::default();
    flate2::read::ZlibEncoder::new(bytes, level).read_to_end(&mut packed).unwrap();
    packed
}

fn cloop(seeds: &Seeds) {
    const BLOCK: usize = 2048;
    let mut disk = vec![0; 10 * BLOCK];
    disk[3000..3500].copy_from_slice(&pattern(500, 1));
    let mut file = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop\n".to_vec();
    file.resize(128, 0);
    file.extend(u32::try_from(BLOCK).unwrap().to_be_bytes());
    file.extend(10_u32.to_be_bytes());
    let blocks: Vec<_> = disk.chunks(BLOCK).map(zlib).collect();
    let mut offset = 136 + 11 * 8;
    for block in &blocks {
        file.extend((offset as u64).to_be_bytes());
        offset += block.len();
    }
    file.extend((offset as u64).to_be_bytes());
    file.extend(blocks.concat());
    seeds.add("cloop", &[&file]);
}

/// The descriptor of a disk of Parallels with one plain file.
fn bundle(seeds: &Seeds) {
    let guid = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
    for kind in ["Plain", "Compressed"] {
        let text = format!(
            "<?xml version='1.0' encoding='UTF-8'?>\n<Parallels_disk_image Version=\"1.0\">\n\
             <Disk_Parameters><Disk_size>8</Disk_size><Cylinders>1</Cylinders><Heads>1</Heads>\
             <Sectors>8</Sectors><Padding>0</Padding></Disk_Parameters>\n<StorageData><Storage>\
             <Start>0</Start><End>8</End><Blocksize>8</Blocksize><Image><GUID>{guid}</GUID>\
             <Type>{kind}</Type><File>disk.hds</File></Image></Storage></StorageData>\n\
             <Snapshots><Shot><GUID>{guid}</GUID><ParentGUID>\
             {{00000000-0000-0000-0000-000000000000}}</ParentGUID></Shot></Snapshots>\n\
             </Parallels_disk_image>\n"
        );
        seeds.add("parallels", &[text.as_bytes(), &pattern(4096, 1)]);
    }
}

fn packed(seeds: &Seeds) {
    let mut disk = vec![0; 20_000];
    disk[700..1200].copy_from_slice(&pattern(500, 1));
    let gzip = |bytes: &[u8]| {
        let mut packed = Vec::new();
        let level = flate2::Compression::default();
        flate2::read::GzEncoder::new(bytes, level).read_to_end(&mut packed).unwrap();
        packed
    };
    let xz = |bytes: &[u8]| {
        let mut packed = Vec::new();
        liblzma::read::XzEncoder::new(bytes, 1).read_to_end(&mut packed).unwrap();
        packed
    };
    let bzip2 = |bytes: &[u8]| {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| {
        let mut packed = Vec::with_capacity(bytes.len() + 1000);
        zstd::zstd_safe::compress(&mut packed, bytes, 3).unwrap();
        packed
    };
    for pack in [&gzip as &dyn Fn(&[u8]) -> Vec<u8>, &xz, &bzip2, &zstd] {
        let (one, two) = (pack(&disk), pack(&disk[500..3000]));
        seeds.put("packed", &one);
        seeds.put("packed", &[one.clone(), two].concat());
        seeds.put("packed", &one[..one.len() - 9]);
    }
    // A skippable frame, as parallel compressors write them, and a seek table.
    let skip = [&0x184d_2a50_u32.to_le_bytes()[..], &4_u32.to_le_bytes(), b"abcd"].concat();
    seeds.put("packed", &[skip, zstd(&disk)].concat());
    let frame = zstd(&disk);
    let mut table = Vec::new();
    table.extend((frame.len() as u32).to_le_bytes());
    table.extend((disk.len() as u32).to_le_bytes());
    table.extend(1_u32.to_le_bytes());
    table.push(0);
    table.extend(0x8f92_eab1_u32.to_le_bytes());
    let mut seekable = frame;
    seekable.extend(0x184d_2a5e_u32.to_le_bytes());
    seekable.extend((table.len() as u32).to_le_bytes());
    seekable.extend(table);
    seeds.put("packed", &seekable);
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let head = [number.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
    [b"IHAVEOPT", head.as_slice(), data].concat()
}

fn request(flags: u16, command: u16, offset: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(offset.wrapping_add(77).to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn nbd_server(seeds: &Seeds) {
    let meta = b"\0\0\0\x03vda\0\0\0\x01\0\0\0\x0fbase:allocation";
    let greeting = [vec![0, 0, 0, 3], option(3, b"")].concat();
    let structured = [
        vec![0, 0, 0, 3],
        option(8, b""),
        option(3, b""),
        option(99, b"whatever"),
        option(9, b"\0\0\0\x03vda\0\0\0\0"),
        option(10, meta),
        option(6, b"\0\0\0\x03vda\0\x02\0\x01\0\x02"),
    ]
    .concat();
    let requests = [
        request(0, 0, 0, 70_000, b""),
        request(4, 0, 299_999, 5, b""),
        request(1, 1, 10, 4, b"data"),
        request(0, 7, 0, 1 << 20, b""),
        request(8, 7, 5, 1 << 19, b""),
        request(3, 6, 4096, 4096, b""),
        request(0, 4, 8192, 4096, b""),
        request(0, 5, 0, 4096, b""),
        request(0, 3, 0, 0, b""),
        request(0, 2, 0, 0, b""),
    ]
    .concat();
    let go = option(7, b"\0\0\0\x03vda\0\x01\0\x03");
    for kind in 0..4 {
        for hello in [&greeting, &structured] {
            seeds.put("nbd_server", &[&[kind], hello.as_slice(), &go, &requests].concat());
        }
        let old = [&[kind], greeting.as_slice(), &option(1, b"vda"), &requests].concat();
        seeds.put("nbd_server", &old);
    }
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x3_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for number in [option, kind, data.len() as u32] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}

fn chunk(flags: u16, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// What our client hears, in the order in which the target asks.
fn nbd_client(seeds: &Seeds) {
    let hello = b"NBDMAGICIHAVEOPT\0\x03";
    let size = 4096_u64;
    let export = |flags: u16| [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    let block_size = [&[0, 3][..], &[0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]].concat();
    let context = [&[0, 0, 0, 5][..], b"base:allocation"].concat();
    let start = [
        reply(8, 1, b""),
        reply(10, 4, &context),
        reply(10, 1, b""),
        reply(7, 3, &export(0x0165)),
        reply(7, 3, &block_size),
        reply(7, 3, b"\0\x02text"),
        reply(7, 1, b""),
    ]
    .concat();
    let data = [&0_u64.to_be_bytes()[..], &[7; 4096]].concat();
    let hole = [&0_u64.to_be_bytes()[..], &4096_u32.to_be_bytes()].concat();
    let status = [&[0, 0, 0, 5][..], &4096_u32.to_be_bytes(), &3_u32.to_be_bytes()].concat();
    let mut replies = Vec::new();
    for (cookie, kind, bytes) in [(1, 1, &data), (2, 5, &status), (3, 2, &hole)] {
        replies.extend(chunk(1, kind, cookie, bytes));
    }
    for cookie in 4..12 {
        replies.extend(chunk(1, 0, cookie, b""));
    }
    seeds.put("nbd_client", &[&[0], &hello[..], &start, &replies].concat());
    // An old server: no structured replies, no GO.
    let refusals = [reply(8, 0x8000_0001, b""), reply(7, 0x8000_0001, b"")].concat();
    let by_name = [&size.to_be_bytes()[..], &0x0065_u16.to_be_bytes()].concat();
    let mut simple = Vec::new();
    for cookie in 1..12_u64 {
        simple.extend(0x6744_6698_u32.to_be_bytes());
        simple.extend(0_u32.to_be_bytes());
        simple.extend(cookie.to_be_bytes());
        if cookie == 1 {
            simple.extend([9; 4096]);
        }
    }
    seeds.put("nbd_client", &[&[1], &hello[..], &refusals, &by_name, &simple].concat());
    seeds
        .put("nbd_client", &[&[0], b"NBDMAGICIHAVEOPT\0\0".as_slice(), &by_name, &simple].concat());
}
