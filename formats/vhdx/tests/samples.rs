// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks by other vendors' software, and hostile ones.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use tranship_block::{Repair, Result, Storage, Zeroing};
use tranship_format_testing::{Op, Sample, apply, contents, digest, exercise, samples, verify};
use tranship_raw::{Access, RawFile};
use tranship_vhdx::{OpenOptions, Parent, Vhdx, check, compact, read_data_write_guid, read_parent};

/// Opens a disk with the parent that lies beside it.
fn open(path: &Path) -> Result<Vhdx> {
    let file = Arc::new(RawFile::open(path, Access::ReadOnly)?);
    Vhdx::open_read_only(file, options(path)?)
}

fn options(path: &Path) -> Result<OpenOptions> {
    let file = RawFile::open(path, Access::ReadOnly)?;
    let mut options = OpenOptions::default();
    if let Some(wanted) = read_parent(&file)? {
        let beside = path.parent().unwrap().join(wanted.names[0].path());
        let parent = RawFile::open(&beside, Access::ReadOnly)?;
        let data_write_guid = read_data_write_guid(&parent)?;
        options.parent = Some(Parent { device: Arc::new(open(&beside)?), data_write_guid });
    }
    Ok(options)
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

#[test]
fn samples_can_be_changed_and_compacted() {
    let all = samples();
    let whole = |sample: &&Sample| {
        sample.format.as_deref() == Some("vhdx")
            && sample.expect == "content"
            && sample.virtual_size == Some(4 << 20)
    };
    for sample in all.iter().filter(whole) {
        let folder = tempfile::tempdir().unwrap();
        let path = sample.unpack(folder.path(), &all);
        let mut model = contents(&open(&path).unwrap());
        let file: Arc<dyn Storage> = Arc::new(RawFile::open(&path, Access::ReadWrite).unwrap());
        let image = Vhdx::open(file.clone(), options(&path).unwrap()).unwrap();
        for op in [
            Op::Write(3_000_001, 70_000, 1),
            Op::Write(2 << 20, 100, 2),
            Op::Flush,
            Op::Discard(0, 4 << 20),
            Op::Write(1_000_000, 1_000_000, 3),
            Op::Zero(1_100_000, 50_000, Zeroing::MayUnmap),
        ] {
            apply(&image, &mut model, &op);
        }
        drop(image);
        verify(&open(&path).unwrap(), &model);
        let report = check(&*file, Repair::Nothing).unwrap();
        assert_eq!(report.corruptions, 0, "{}: {:?}", sample.path, report.details);
        let compacted = compact(&file).unwrap();
        eprintln!("{}: {compacted:?}", sample.path);
        verify(&open(&path).unwrap(), &model);
    }
}
