// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is done to an image of any format.

use super::changes::change;
use super::disk::{Seen, look, verify};
use super::{Case, Image};
use std::sync::Arc;
use tranship_block::{BlockDevice, CheckReport, ErrorKind, Repair, Result, Storage};

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Read,
    Salvage,
    Write,
}

/// Switches of [`Case::flags`] that mean the same for all formats.
pub(crate) const SEAL: u8 = 0;
const SALVAGE: u8 = 1;
const REPAIR: u8 = 2;
const WRITE: u8 = 3;
/// The first one that is left to the format.
pub(crate) const OWN: u8 = 4;

/// A format, as far as it differs from others.
pub(crate) trait Subject {
    /// The disk in `file`.
    fn open(&self, file: &Arc<Image>, mode: Mode) -> Result<Box<dyn BlockDevice>>;

    /// Checks the image in `storage`.
    fn check(&self, storage: &dyn Storage, repair: Repair) -> Result<CheckReport>;

    /// Where stored bytes lie as they are, if they do.
    fn payload(&self, file: &Arc<Image>) -> Option<Arc<Image>> {
        Some(file.clone())
    }

    /// The same with copies of all further files, to be written.
    fn fork(&self) -> Box<dyn Subject>;

    /// Whether a report counts what is left after a repair, rather than what it could not
    /// mend: in an image with contradictions these are not the same.
    fn looks_again(&self) -> bool {
        true
    }

    /// Whether all that can be wrong with an image shows in a check.
    fn is_checked(&self) -> bool {
        true
    }
}

/// Reads, checks, repairs and writes an image.
pub(crate) fn exercise(subject: &dyn Subject, file: &Arc<Image>, case: &Case) {
    file.set_read_only(true);
    let before = subject.check(&**file, Repair::Nothing);
    let is_sound = before.as_ref().is_ok_and(|report| report.corruptions == 0);
    let seen = look_at(subject, file, Mode::Read);
    if let (Ok(report), Err(error)) = (&before, &seen) {
        let is_hidden = report.is_clean() && error.kind() == ErrorKind::Corrupt;
        assert!(!is_hidden || !subject.is_checked(), "clean, but cannot be opened: {error}");
    }
    if case.has(SALVAGE) {
        let _ = look_at(subject, file, Mode::Salvage);
    }
    if case.has(REPAIR) {
        for level in [Repair::Leaks, Repair::All] {
            repair(&*subject.fork(), file, level, before.as_ref().ok(), seen.as_deref().ok());
        }
    }
    if case.has(WRITE) {
        write(&*subject.fork(), &Arc::new(file.copy()), case, is_sound);
    }
}

fn look_at(subject: &dyn Subject, file: &Arc<Image>, mode: Mode) -> Result<Vec<Seen>> {
    let disk = subject.open(file, mode)?;
    let payload = subject.payload(file);
    Ok(look(&*disk, payload.as_deref().map(|file| -> &dyn BlockDevice { file })))
}

/// What is there after a repair is as good as the report says, and the guest's bytes are
/// what they were.
fn repair(
    subject: &dyn Subject,
    file: &Image,
    level: Repair,
    before: Option<&CheckReport>,
    seen: Option<&[Seen]>,
) {
    let copy = Arc::new(file.copy());
    let report = subject.check(&*copy, level);
    copy.set_read_only(true);
    let again = subject.check(&*copy, Repair::Nothing);
    let Ok(report) = report else { return };
    let again = again.expect("an image that was repaired can be checked");
    if !report.is_clean() && !subject.looks_again() {
        return;
    }
    assert_eq!(
        (again.corruptions, again.leaks, again.check_errors),
        (report.corruptions, report.leaks, report.check_errors),
        "{level:?} left something else than it said: {:#?}, then {:#?}",
        report.details,
        again.details
    );
    if before.is_some_and(CheckReport::is_clean) {
        assert!(report.is_clean(), "{level:?} of a clean image: {:#?}", report.details);
    }
    if let (Some(seen), true) = (seen, before.is_some_and(|before| before.corruptions == 0)) {
        let disk = subject.open(&copy, Mode::Read).expect("a repaired image can be opened");
        verify(&*disk, seen);
    }
}

/// What was written and flushed is there, and a sound image stays sound.
fn write(subject: &dyn Subject, file: &Arc<Image>, case: &Case, is_sound: bool) {
    let Ok(disk) = subject.open(file, Mode::Write) else { return };
    let promises = change(&*disk, &case.ops, is_sound);
    let is_safe = disk.flush().is_ok() && is_sound;
    if is_safe {
        promises.verify(&*disk);
    }
    let seen = is_safe.then(|| look(&*disk, None));
    drop(disk);
    file.set_read_only(true);
    let report = subject.check(&**file, Repair::Nothing);
    if !is_sound {
        let _ = look_at(subject, file, Mode::Read);
        return;
    }
    let report = report.expect("an image that was written can be checked");
    assert_eq!(report.corruptions, 0, "writing broke it: {:#?}", report.details);
    let disk = subject.open(file, Mode::Read).expect("an image that was written can be opened");
    if let Some(seen) = seen {
        promises.verify(&*disk);
        verify(&*disk, &seen);
    }
}

/// What was sound is sound after a change, whether that worked or not.
pub(crate) fn has_no_corruption<T>(result: &Result<T>, report: &Result<CheckReport>) {
    let done = result.as_ref().map(drop);
    let report = report.as_ref().expect("a changed image can be checked");
    assert_eq!(report.corruptions, 0, "the change ({done:?}) broke it: {:#?}", report.details);
}
