// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VPC (VHD).

use super::subject::{Mode, OWN, SEAL, Subject, exercise, has_no_corruption};
use super::vhdx::{BELOW, grown_is_zero};
use super::{Case, Image, disk, seal};
use std::sync::Arc;
use tranship_block::{BlockDevice, CheckReport, Repair, Result, Storage};
use tranship_vpc::{OpenOptions, Parent, ParentRequest, Vpc, check};

const PARENT: u8 = OWN;
const IGNORE: u8 = OWN + 1;
const RESIZE: u8 = OWN + 2;

struct Parts {
    has_parent: bool,
    ignores: bool,
}

impl Parts {
    fn options(&self, file: &Image, mode: Mode) -> OpenOptions {
        let request = self.has_parent.then(|| ParentRequest::read(file).ok().flatten()).flatten();
        let parent =
            request.map(|request| Parent { device: BELOW.clone(), unique_id: request.unique_id });
        OpenOptions {
            read_only: mode != Mode::Write,
            salvage: mode == Mode::Salvage,
            force_size_calc: None,
            ignore_bitmaps: self.ignores,
            parent,
        }
    }
}

impl Subject for Parts {
    fn open(&self, file: &Arc<Image>, mode: Mode) -> Result<Box<dyn BlockDevice>> {
        let options = self.options(file, mode);
        Ok(Box::new(match mode {
            Mode::Write => Vpc::open(file.clone(), options)?,
            _ => Vpc::open_read_only(file.clone(), options)?,
        }))
    }

    fn check(&self, storage: &dyn Storage, repair: Repair) -> Result<CheckReport> {
        check(storage, repair)
    }

    fn fork(&self) -> Box<dyn Subject> {
        Box::new(Self { has_parent: self.has_parent, ignores: self.ignores })
    }
}

pub(crate) fn run(input: &[u8]) {
    let case = Case::decode(input);
    let file = case.files[0].image();
    if case.has(SEAL) {
        seal::vpc(&file);
    }
    let file = Arc::new(file);
    let parts = Parts { has_parent: case.has(PARENT), ignores: case.has(IGNORE) };
    exercise(&parts, &file, &case);
    if case.has(RESIZE) {
        let report = check(&*file, Repair::Nothing);
        let is_sound = report.is_ok_and(|report| report.corruptions == 0);
        let copy = Arc::new(file.copy());
        let Ok(disk) = Vpc::open(copy.clone(), parts.options(&copy, Mode::Write)) else { return };
        let old = disk.size();
        let size = (u64::from(case.ops[0].place) << (case.ops[0].len % 12)) / 512 * 512;
        let result = disk.resize(size);
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
