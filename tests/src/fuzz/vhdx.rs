// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VHDX.

use super::subject::{Mode, OWN, SEAL, Subject, exercise, has_no_corruption};
use super::{Case, Image, disk, seal};
use std::sync::{Arc, LazyLock};
use tranship_block::{BlockDevice, CheckReport, Repair, Result, Span, Storage};
use tranship_vhdx::{OpenOptions, Parent, Shrink, Vhdx, check, compact, read_parent};

const PARENT: u8 = OWN;
const COMPACT: u8 = OWN + 1;
const RESIZE: u8 = OWN + 2;

/// What is below a differencing disk.
pub(crate) static BELOW: LazyLock<Arc<Image>> = LazyLock::new(|| {
    let image = Image::new(3 << 20);
    for place in [0, 100_000, 1 << 20, (3 << 20) - 7000] {
        let bytes: Vec<u8> = (place..place + 7000).map(|at| (at % 251) as u8 | 1).collect();
        image.put(place, &bytes);
    }
    Arc::new(image.view(true))
});

struct Parts {
    has_parent: bool,
}

impl Parts {
    fn options(&self, file: &Image, mode: Mode) -> OpenOptions {
        let locator = self.has_parent.then(|| read_parent(file).ok().flatten()).flatten();
        let parent = locator.map(|locator| Parent {
            device: BELOW.clone(),
            data_write_guid: locator.linkage.first().copied().unwrap_or_default(),
        });
        OpenOptions { read_only: mode != Mode::Write, salvage: mode == Mode::Salvage, parent }
    }
}

impl Subject for Parts {
    fn open(&self, file: &Arc<Image>, mode: Mode) -> Result<Box<dyn BlockDevice>> {
        let options = self.options(file, mode);
        Ok(Box::new(match mode {
            Mode::Write => Vhdx::open(file.clone(), options)?,
            _ => Vhdx::open_read_only(file.clone(), options)?,
        }))
    }

    fn check(&self, storage: &dyn Storage, repair: Repair) -> Result<CheckReport> {
        check(storage, repair)
    }

    fn fork(&self) -> Box<dyn Subject> {
        Box::new(Self { has_parent: self.has_parent })
    }
}

pub(crate) fn run(input: &[u8]) {
    let case = Case::decode(input);
    let file = case.files[0].image();
    if case.has(SEAL) {
        seal::vhdx(&file);
    }
    let file = Arc::new(file);
    let parts = Parts { has_parent: case.has(PARENT) };
    exercise(&parts, &file, &case);
    let report = check(&*file, Repair::Nothing);
    let is_sound = report.is_ok_and(|report| report.corruptions == 0);
    if case.has(COMPACT) {
        let copy = Arc::new(file.copy());
        let storage: Arc<dyn Storage> = copy.clone();
        let seen = parts.open(&file, Mode::Read).map(|disk| disk::look(&*disk, None));
        let result = compact(&storage);
        if is_sound {
            has_no_corruption(&result, &check(&copy.view(true), Repair::Nothing));
            if let Ok(seen) = seen {
                let disk = parts.open(&copy, Mode::Read).expect("it is still an image");
                disk::verify(&*disk, &seen);
            }
        }
    }
    if case.has(RESIZE) {
        let copy = Arc::new(file.copy());
        let Ok(disk) = Vhdx::open(copy.clone(), parts.options(&copy, Mode::Write)) else { return };
        let old = disk.size();
        let size = (u64::from(case.ops[0].place) << (case.ops[0].len % 22)) / 4096 * 4096;
        let shrink = if case.variant & 1 == 0 { Shrink::KeepData } else { Shrink::LoseData };
        let result = disk.resize(size, shrink);
        if result.is_ok() {
            assert_eq!(disk.size(), size);
            if is_sound && size > old {
                grown_is_zero(&disk, old, size);
            }
        }
        drop(disk);
        if is_sound {
            has_no_corruption(&result, &check(&copy.view(true), Repair::Nothing));
        }
        let _ = parts.open(&copy, Mode::Read).map(|disk| disk::look(&*disk, None));
    }
}

/// New bytes of a disk read as zero.
pub(crate) fn grown_is_zero(device: &dyn BlockDevice, old: u64, size: u64) {
    let span = Span::new(old, (size - old).min(50_000));
    let seen = disk::read(device, span.start, span.len);
    let bytes = seen.bytes.expect("what is new can be read");
    assert!(bytes.iter().all(|byte| *byte == 0), "new bytes are not zero");
}
