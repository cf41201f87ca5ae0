// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMDK, beside the crate `vmdk-core`.

use crate::{Folder, Maker, SIZE, cases, makers};
use proptest::prelude::*;
use tranship_format_testing::operations;
use tranship_formats::Format;
use vmdk::{VmdkChainReader, VmdkFileReader};

/// Those that can be changed.
const OPTIONS: &[&str] = &[
    "subformat=monolithicSparse",
    "subformat=monolithicSparse,zeroed_grain=on",
    "subformat=monolithicFlat",
    "subformat=twoGbMaxExtentSparse",
    "subformat=twoGbMaxExtentFlat",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn what_is_written_here_reads_the_same(
        (maker, options, ops) in cases(OPTIONS, 64 << 10),
    ) {
        let Some(folder) = Folder::new() else { return Ok(()) };
        folder.create(maker, "vmdk", options, "disk.vmdk");
        let mut model = vec![0; SIZE as usize];
        folder.work(Format::Vmdk, "disk.vmdk", &mut model, &ops);
        folder.assert_same(Format::Vmdk, "disk.vmdk", &model, |path| {
            VmdkFileReader::open_path(path).unwrap()
        });
    }

    #[test]
    fn snapshots_read_the_same(
        (maker, _, below) in cases(OPTIONS, 64 << 10),
        above in operations(SIZE, 64 << 10, 12),
    ) {
        let Some(folder) = Folder::new() else { return Ok(()) };
        folder.create(maker, "vmdk", OPTIONS[0], "disk.vmdk");
        let mut model = vec![0; SIZE as usize];
        folder.work(Format::Vmdk, "disk.vmdk", &mut model, &below);
        let words = ["create", "-q", "-f", "vmdk", "-b", "disk.vmdk", "-F", "vmdk", "child.vmdk"];
        folder.run(maker, &words);
        folder.work(Format::Vmdk, "child.vmdk", &mut model, &above);
        folder.assert_same(Format::Vmdk, "child.vmdk", &model, |path| {
            VmdkChainReader::open(path).unwrap()
        });
    }
}

#[test]
fn conversions_read_the_same() {
    let Some(folder) = Folder::new() else { return };
    for maker in makers() {
        for options in OPTIONS.iter().chain(&["subformat=streamOptimized"]) {
            let (_, model) = folder.disk(if maker == Maker::Here { 1 } else { 2 });
            let words = ["convert", "-f", "raw", "-O", "vmdk", "-o", options];
            folder.run(maker, &[&words[..], &["disk.raw", "disk.vmdk"]].concat());
            folder.assert_same(Format::Vmdk, "disk.vmdk", &model, |path| {
                VmdkFileReader::open_path(path).unwrap()
            });
        }
    }
}
