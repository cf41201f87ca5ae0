// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks of the formats that are only read.

use crate::Format;
use tranship_block::{BlockDevice, CheckReport, Result};

/// Checks the image in `file`, which has a format that is only read: nothing is repaired.
/// `None` for all other formats, and for those without redundancy.
///
/// # Errors
///
/// A header that cannot be read, and I/O errors.
pub fn check_read_only(format: Format, file: &dyn BlockDevice) -> Result<Option<CheckReport>> {
    match format {
        Format::Vdi => tranship_vdi::check(file).map(Some),
        Format::Qed => tranship_qed::check(file).map(Some),
        Format::Parallels => tranship_parallels::check(file).map(Some),
        _ => Ok(None),
    }
}
