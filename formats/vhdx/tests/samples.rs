// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks by other vendors' software, and hostile ones.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use tranship_block::{Repair, Result};
use tranship_format_testing::{digest, exercise, samples};
use tranship_raw::{Access, RawFile};
use tranship_vhdx::{OpenOptions, Parent, Vhdx, check, read_data_write_guid, read_parent};

/// Opens a disk with the parent that lies beside it.
fn open(path: &Path) -> Result<Vhdx> {
    let file = Arc::new(RawFile::open(path, Access::ReadOnly)?);
    let mut options = OpenOptions::default();
    if let Some(wanted) = read_parent(&file)? {
        let beside = path.parent().unwrap().join(wanted.names[0].path());
        let parent = RawFile::open(&beside, Access::ReadOnly)?;
        let data_write_guid = read_data_write_guid(&parent)?;
        options.parent = Some(Parent { device: Arc::new(open(&beside)?), data_write_guid });
    }
    Vhdx::open_read_only(file, options)
}

#[test]
fn samples_meet_their_expectations() {
    let all = samples();
    for sample in all.iter().filter(|sample| sample.format.as_deref() == Some("vhdx")) {
        let folder = tempfile::tempdir().unwrap();
        let path = sample.unpack(folder.path(), &all);
        let name = &sample.path;
        let before = std::fs::read(&path).unwrap();
        match (sample.expect.as_str(), open(&path)) {
            ("content", disk) => {
                let disk = disk.unwrap_or_else(|error| panic!("{name}: {error}"));
                let found = digest(&disk).unwrap();
                assert_eq!(Some(found), sample.content_digest, "{name}");
                assert!(disk.warnings().is_empty(), "{name}: {:?}", disk.warnings());
                eprintln!("{name}: {:?} by {:?}", disk.subformat(), disk.creator());
                let file = RawFile::open(&path, Access::ReadOnly).unwrap();
                let report = check(&file, Repair::Nothing).unwrap();
                assert_eq!(report.corruptions, 0, "{name}: {:?}", report.details);
            }
            ("open", disk) => {
                let disk = disk.unwrap_or_else(|error| panic!("{name}: {error}"));
                exercise(&disk);
                eprintln!("{name}: {:?}", disk.warnings());
            }
            ("refuse", Ok(_)) => panic!("{name} was opened"),
            ("clean", Ok(disk)) => exercise(&disk),
            ("refuse" | "clean", Err(error)) => eprintln!("{name}: {error}"),
            (other, _) => panic!("{name}: unknown expectation {other}"),
        }
        assert!(std::fs::read(&path).unwrap() == before, "{name} was changed by reading");
    }
}
