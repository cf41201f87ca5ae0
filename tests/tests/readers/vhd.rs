// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VHD, beside the crate `vhd`.

use crate::{Folder, Maker, SIZE, cases, makers};
use proptest::prelude::*;
use std::path::Path;
use tranship_formats::Format;
use vhd::VhdReader;

// Fixed disks are raw for whoever guesses, so the tests never do.
const OPTIONS: &[&str] =
    &["subformat=dynamic,force_size=on", "subformat=fixed,force_size=on", "subformat=dynamic"];

fn read(path: &Path) -> VhdReader {
    VhdReader::open(path).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn what_is_written_here_reads_the_same(
        (maker, options, ops) in cases(OPTIONS, 2 << 20),
    ) {
        let Some(folder) = Folder::new() else { return Ok(()) };
        folder.create(maker, "vpc", options, "disk.vhd");
        // Sizes are rounded up to whole cylinders.
        let size = folder.device(Format::Vpc, "disk.vhd").size();
        prop_assert!(size == SIZE || size > SIZE && !options.contains("force_size"));
        let mut model = vec![0; size as usize];
        folder.work(Format::Vpc, "disk.vhd", &mut model, &ops);
        folder.assert_same(Format::Vpc, "disk.vhd", &model, read);
    }
}

#[test]
fn conversions_read_the_same() {
    let Some(folder) = Folder::new() else { return };
    for maker in makers() {
        for options in &OPTIONS[..2] {
            let (_, model) = folder.disk(if maker == Maker::Here { 1 } else { 2 });
            let words = ["convert", "-f", "raw", "-O", "vpc", "-o", options];
            folder.run(maker, &[&words[..], &["disk.raw", "disk.vhd"]].concat());
            folder.assert_same(Format::Vpc, "disk.vhd", &model, read);
        }
    }
}
