// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QCOW2, beside the crate `imago`.

use crate::{Folder, Maker, SIZE, cases, makers};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use proptest::prelude::*;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use tranship_format_testing::operations;
use tranship_formats::Format;

// It knows neither subclusters nor zstd.
const OPTIONS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=64k",
    "cluster_size=2M,refcount_bits=64",
    "compat=0.10,cluster_size=16k",
    "cluster_size=8k,lazy_refcounts=on",
];

/// Its disk with a position.
struct Reader {
    disk: FormatAccess<File>,
    at: u64,
}

fn read(path: &Path) -> Reader {
    let gate = PermissiveImplicitOpenGate::default();
    let image = Qcow2::<File>::builder_path(path).open(gate).unwrap();
    Reader { disk: FormatAccess::new(image), at: 0 }
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.disk.size().saturating_sub(self.at);
        let len = buf.len().min(left as usize);
        self.disk.read(&mut buf[..len], self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let SeekFrom::Start(at) = to else { panic!("the tests seek from the start only") };
        self.at = at;
        Ok(at)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn what_is_written_here_reads_the_same(
        (maker, options, ops) in cases(OPTIONS, 16 << 10),
    ) {
        let Some(folder) = Folder::new() else { return Ok(()) };
        folder.create(maker, "qcow2", options, "disk.q");
        let mut model = vec![0; SIZE as usize];
        folder.work(Format::Qcow2, "disk.q", &mut model, &ops);
        folder.assert_same(Format::Qcow2, "disk.q", &model, read);
    }

    #[test]
    fn chains_read_the_same(
        (maker, options, below) in cases(OPTIONS, 16 << 10),
        above in operations(SIZE, 16 << 10, 12),
    ) {
        let Some(folder) = Folder::new() else { return Ok(()) };
        folder.create(maker, "qcow2", options, "disk.q");
        let mut model = vec![0; SIZE as usize];
        folder.work(Format::Qcow2, "disk.q", &mut model, &below);
        let words = ["create", "-q", "-f", "qcow2", "-b", "disk.q", "-F", "qcow2", "child.q"];
        folder.run(maker, &words);
        folder.work(Format::Qcow2, "child.q", &mut model, &above);
        folder.assert_same(Format::Qcow2, "child.q", &model, read);
    }
}

#[test]
fn conversions_read_the_same() {
    let Some(folder) = Folder::new() else { return };
    for maker in makers() {
        for options in OPTIONS {
            for compress in [&[][..], &["-c"]] {
                let (_, model) = folder.disk(if maker == Maker::Here { 1 } else { 2 });
                let words = ["convert", "-f", "raw", "-O", "qcow2", "-o", options];
                let names = ["disk.raw", "disk.q"];
                folder.run(maker, &[&words[..], compress, &names].concat());
                folder.assert_same(Format::Qcow2, "disk.q", &model, read);
            }
        }
    }
}
