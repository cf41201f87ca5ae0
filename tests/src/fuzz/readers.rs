// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The formats that are only read.

use super::disk::{look, verify};
use super::qcow2::CHEAP;
use super::vhdx::BELOW;
use super::{Case, Image, seal};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Gate, Request, Result};
use tranship_cloop::Cloop;
use tranship_dmg::Dmg;
use tranship_luks::Luks;
use tranship_parallels::{Bundle, BundleOptions};
use tranship_qed::Qed;
use tranship_vdi::Vdi;

const SEAL: u8 = 0;
const SALVAGE: u8 = 1;
const PARENT: u8 = 4;

/// Looks at the disk that `open` gives, as it is and salvaged; opening it again gives the
/// same bytes.
pub(crate) fn read(
    case: &Case,
    file: Option<&dyn BlockDevice>,
    open: impl Fn(bool) -> Result<Box<dyn BlockDevice>>,
) {
    for salvage in [false, true].into_iter().take(1 + usize::from(case.has(SALVAGE))) {
        let Ok(disk) = open(salvage) else { continue };
        let seen = look(&*disk, file);
        drop(disk);
        let disk = open(salvage).expect("what could be opened once can be opened again");
        verify(&*disk, &seen);
    }
}

fn image(case: &Case, number: usize) -> Arc<Image> {
    Arc::new(case.files[number].image().view(true))
}

pub(crate) fn vdi(input: &[u8]) {
    let case = Case::decode(input);
    let file = image(&case, 0);
    let header = tranship_vdi::Header::read(&file);
    let has_parent =
        header.as_ref().is_ok_and(|header| header.kind == tranship_vdi::Kind::Differencing);
    read(&case, Some(&file), |salvage| {
        let parent = header.as_ref().ok().filter(|_| has_parent && case.has(PARENT));
        let parent = parent.map(|header| tranship_vdi::Parent {
            device: BELOW.clone(),
            uuid: header.parent,
            modification: header.parent_modification,
        });
        let options = tranship_vdi::OpenOptions { salvage, parent };
        Ok(Box::new(Vdi::open_read_only(file.clone(), options)?))
    });
}

pub(crate) fn qed(input: &[u8]) {
    let case = Case::decode(input);
    let file = image(&case, 0);
    let has_backing =
        tranship_qed::Header::read(&file).is_ok_and(|header| header.backing.is_some());
    read(&case, Some(&file), |salvage| {
        let backing =
            (has_backing && case.has(PARENT)).then(|| -> Arc<dyn BlockDevice> { BELOW.clone() });
        let options = tranship_qed::OpenOptions { salvage, backing };
        Ok(Box::new(Qed::open_read_only(file.clone(), options)?))
    });
}

pub(crate) fn dmg(input: &[u8]) {
    let case = Case::decode(input);
    let file = image(&case, 0);
    read(&case, Some(&file), |_| Ok(Box::new(Dmg::open_read_only(file.clone())?)));
}

pub(crate) fn cloop(input: &[u8]) {
    let case = Case::decode(input);
    let file = image(&case, 0);
    read(&case, Some(&file), |_| Ok(Box::new(Cloop::open_read_only(file.clone())?)));
}

pub(crate) fn luks(input: &[u8]) {
    let case = Case::decode(input);
    let file = case.files[0].image();
    if case.has(SEAL) {
        seal::luks(&file);
    }
    let file = Arc::new(file.view(true));
    read(&case, None, |_| Ok(Box::new(Luks::unlock(file.clone(), b"fuzz", &CHEAP)?)));
}

/// Gives one file, whatever its name.
#[derive(Debug)]
struct OneFile(Arc<Image>);

impl Gate for OneFile {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        if request.name.contains("none") {
            return Err(Error::new(ErrorKind::NotFound, "there is no such file"));
        }
        Ok(self.0.clone())
    }
}

/// A growing image, or a bundle: then the first file is the descriptor.
pub(crate) fn parallels(input: &[u8]) {
    let case = Case::decode(input);
    let (file, other) = (image(&case, 0), image(&case, 1));
    let text = case.files[0].pieces.first().map(|(_, bytes)| bytes.clone()).unwrap_or_default();
    if text.starts_with(b"<") {
        let len = usize::try_from(case.files[0].len).unwrap().min(text.len());
        let text = String::from_utf8_lossy(&text[..len]);
        read(&case, Some(&other), |salvage| {
            let options = BundleOptions { state: None, salvage };
            Ok(Box::new(Bundle::open(&text, &OneFile(other.clone()), &options)?))
        });
        return;
    }
    read(&case, Some(&file), |salvage| {
        let parent = case.has(PARENT).then(|| -> Arc<dyn BlockDevice> { BELOW.clone() });
        let options = tranship_parallels::OpenOptions { parent, salvage };
        Ok(Box::new(tranship_parallels::Image::open_read_only(file.clone(), options)?))
    });
}
