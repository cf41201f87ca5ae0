// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks by other vendors' software and hostile ones, outside of the source tree.
#![allow(clippy::unwrap_used, reason = "the manifest is part of the test")]

mod folder;

use tranship_format_testing::{digest, exercise, samples};

#[test]
fn samples_meet_their_expectations() {
    let all = samples();
    let mut seen = 0;
    for sample in all.iter().filter(|sample| sample.format.as_deref() == Some("vmdk")) {
        let folder = tempfile::tempdir().unwrap();
        let path = &sample.path;
        let file = sample.unpack(folder.path(), &all);
        match (sample.expect.as_str(), folder::open(&file)) {
            ("content", disk) => {
                let disk = disk.unwrap_or_else(|error| panic!("{path}: {error}"));
                assert_eq!(Some(tranship_block::BlockDevice::size(&disk)), sample.virtual_size);
                assert_eq!(Some(digest(&disk).unwrap()), sample.content_digest, "{path}");
            }
            ("open", disk) => drop(disk.unwrap_or_else(|error| panic!("{path}: {error}"))),
            ("refuse" | "no-leak", Ok(_)) => panic!("{path} was opened"),
            ("clean", Ok(disk)) => exercise(&disk),
            (_, Err(error)) => eprintln!("{path}: {error}"),
            (expect, Ok(_)) => panic!("{path}: unknown expectation {expect}"),
        }
        seen += 1;
    }
    assert!(all.is_empty() || seen > 15, "only {seen} VMDK rows in the manifest");
}
