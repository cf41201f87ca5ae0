// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disk images by format.

use crate::files::Files;
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;
use tranship_block::BlockDevice;
use tranship_formats::{Format, OpenOptions};

/// The format of the image in `device`, told by its contents; `raw` if they say nothing.
pub(crate) fn probe(device: &dyn BlockDevice, name: &str) -> Result<&'static str> {
    tranship_formats::probe(device, Path::new(name))
        .map(Format::name)
        .map_err(|error| Error::disk(format!("cannot read disk {name:?}"), error))
}

/// The guest's bytes of the image called `name`. Files that it asks for are found among
/// the files of the source only.
pub(crate) fn open(files: &Files, name: &str, format: &str) -> Result<Arc<dyn BlockDevice>> {
    let failed = |error| Error::disk(format!("cannot open disk {name:?}"), error);
    let format: Format = format.parse().map_err(failed)?;
    let options = OpenOptions { format: Some(format), read_only: true, ..OpenOptions::default() };
    tranship_formats::open_device(files.open(name)?, Path::new(name), &options, files)
        .map(|opened| opened.device)
        .map_err(failed)
}
