// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMDK: single sparse files, and descriptors with an extent in another file.

use super::subject::{Mode, OWN, Subject, exercise, has_no_corruption};
use super::vhdx::{BELOW, grown_is_zero};
use super::{Case, Image, disk};
use std::sync::{Arc, Mutex};
use tranship_block::{
    BlockDevice, CheckReport, Error, ErrorKind, Gate, Repair, Request, Result, Span, Storage,
};
use tranship_vmdk::{
    ExtentFiles, OpenOptions, Parent, ResizeOptions, Vmdk, check, read_descriptor, resize,
};

const PARENT: u8 = OWN;
const RESIZE: u8 = OWN + 2;

/// The folder with the disk: one more file, of the name that is asked for first.
#[derive(Debug)]
struct Folder {
    file: Arc<Image>,
    name: Mutex<Option<String>>,
}

impl Folder {
    fn new(file: Arc<Image>) -> Self {
        Self { file, name: Mutex::new(None) }
    }

    fn find(&self, name: &str, writable: bool) -> Result<Arc<Image>> {
        let mut own = self.name.lock().unwrap();
        if own.get_or_insert_with(|| name.to_owned()) != name {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no {name:?}")));
        }
        Ok(Arc::new(self.file.view(!writable)))
    }
}

impl Gate for Folder {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        Ok(self.find(request.name, request.writable)?)
    }
}

impl ExtentFiles for Folder {
    fn open(&self, name: &str, writable: bool) -> Result<Arc<dyn Storage>> {
        Ok(self.find(name, writable)?)
    }

    fn create(&self, name: &str, _size: u64) -> Result<Arc<dyn Storage>> {
        Err(Error::new(ErrorKind::NoSpace, format!("there is no room for {name:?}")))
    }
}

struct Parts {
    has_parent: bool,
    other: Arc<Image>,
}

impl Parts {
    fn options(&self, file: &Image, mode: Mode) -> OpenOptions {
        let descriptor = read_descriptor(file).ok().flatten();
        let is_child = descriptor.is_some_and(|descriptor| descriptor.parent_cid.is_some());
        let parent =
            (self.has_parent && is_child).then(|| Parent { device: BELOW.clone(), cid: None });
        OpenOptions { parent, salvage: mode == Mode::Salvage, ignore_cid: false }
    }

    fn folder(&self) -> Folder {
        Folder::new(self.other.clone())
    }
}

impl Subject for Parts {
    fn open(&self, file: &Arc<Image>, mode: Mode) -> Result<Box<dyn BlockDevice>> {
        let options = self.options(file, mode);
        Ok(Box::new(match mode {
            Mode::Write => Vmdk::open_writable(file.clone(), &self.folder(), options)?,
            _ => Vmdk::open(file.clone(), &self.folder(), options)?,
        }))
    }

    fn check(&self, storage: &dyn Storage, repair: Repair) -> Result<CheckReport> {
        check(storage, &self.folder(), repair)
    }

    fn payload(&self, file: &Arc<Image>) -> Option<Arc<Image>> {
        // Offsets are those of the extent's file.
        let head = file.get(Span::new(0, 4)).unwrap_or_default();
        let is_extent = [b"KDMV", b"COWD", b"\xbe\xba\xfe\xca"].iter().any(|magic| head == **magic);
        Some(if is_extent { file.clone() } else { self.other.clone() })
    }

    fn fork(&self) -> Box<dyn Subject> {
        Box::new(Self { has_parent: self.has_parent, other: Arc::new(self.other.copy()) })
    }

    fn looks_again(&self) -> bool {
        false
    }

    fn is_checked(&self) -> bool {
        false
    }
}

pub(crate) fn run(input: &[u8]) {
    let case = Case::decode(input);
    let file = Arc::new(case.files[0].image());
    let other = Arc::new(case.files[1].image());
    let parts = Parts { has_parent: case.has(PARENT), other };
    exercise(&parts, &file, &case);
    if case.has(RESIZE) {
        let report = parts.check(&*file, Repair::Nothing);
        let is_sound = report.is_ok_and(|report| report.corruptions == 0);
        let parts = Parts { has_parent: parts.has_parent, other: Arc::new(parts.other.copy()) };
        let copy = Arc::new(file.copy());
        let old = parts.open(&copy, Mode::Read).map(|disk| disk.size());
        let size = u64::from(case.ops[0].place) << (case.ops[0].len % 15);
        let result = resize(&*copy, &parts.folder(), size, ResizeOptions::default());
        if is_sound {
            has_no_corruption(&result, &parts.check(&copy.view(true), Repair::Nothing));
        }
        if let Ok(disk) = parts.open(&copy, Mode::Read) {
            disk::look(&*disk, None);
            if let (true, true, Ok(old)) = (is_sound, result.is_ok(), old)
                && old < disk.size()
                && !parts.has_parent
            {
                grown_is_zero(&*disk, old, disk.size());
            }
        }
    }
}
