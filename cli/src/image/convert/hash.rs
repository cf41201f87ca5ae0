// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hashes of a disk that is there already.

use super::plan::HASH_CHUNK;
use super::watch::Watch;
use crate::failure::Failure;
use crate::image::console::{Console, Progress};
use std::path::Path;
use std::sync::Arc;
use tranship_appliance::CancelToken;
use tranship_block::{BlockDevice, CopyOptions, copy};
use tranship_formats::{Format, OpenOptions, Place, Spec};

/// Writes the hashes of `disk` to the file `path`: it is copied to nowhere.
pub(crate) fn write_hashes(
    disk: &Arc<dyn BlockDevice>,
    path: &Path,
    salvage: bool,
    (progress, cancel): (&Progress, &CancelToken),
    console: Console,
) -> Result<(), Failure> {
    let spec = Spec {
        place: Place::Null { size: disk.size() },
        format: Some(Format::Raw),
        ..Spec::from_path(Path::new("nowhere"))
    };
    let nowhere = tranship_formats::open_spec(&spec, &OpenOptions::default())?.device;
    let options = CopyOptions {
        target_is_zero: true,
        offload: false,
        salvage,
        hash: Some(HASH_CHUNK),
        ..CopyOptions::default()
    };
    let watch = Watch::new(progress, cancel, Some(path), disk.size(), None)?;
    let copied = copy(disk, &nowhere, &options, &watch)?;
    watch.finish(copied, console)
}
