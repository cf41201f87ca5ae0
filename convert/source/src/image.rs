// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disk images by format.

use crate::files::Files;
use crate::{Error, Result};
use std::sync::Arc;
use tranship_block::BlockDevice;
use tranship_qcow2::Qcow2;
use tranship_vmdk::{OpenOptions, Vmdk};

/// The format of the image in `device`, told by its first bytes; `raw` if they say nothing.
pub(crate) fn probe(device: &dyn BlockDevice) -> Result<&'static str> {
    let len = usize::try_from(device.size().min(4096)).unwrap_or(0);
    let mut head = vec![0; len];
    device.read_at(&mut head, 0).map_err(|error| Error::disk("cannot read the disk", error))?;
    Ok(match head.as_slice() {
        head if tranship_vmdk::probe(head) => "vmdk",
        head if head.starts_with(b"QFI\xfb") => "qcow2",
        head if head.starts_with(b"conectix") => "vpc",
        head if head.starts_with(b"vhdxfile") => "vhdx",
        _ => "raw",
    })
}

/// The guest's bytes of the image called `name`.
pub(crate) fn open(files: &Files, name: &str, format: &str) -> Result<Arc<dyn BlockDevice>> {
    let device = files.open(name)?;
    let opened: tranship_block::Result<Arc<dyn BlockDevice>> = match format {
        "raw" => Ok(device),
        "vmdk" => Vmdk::open(device, files, OpenOptions::default())
            .map(|disk| -> Arc<dyn BlockDevice> { Arc::new(disk) }),
        "qcow2" => Qcow2::open_read_only(device, None)
            .map(|disk| -> Arc<dyn BlockDevice> { Arc::new(disk) }),
        _ => {
            return Err(Error::unsupported(format!(
                "disk {name:?} has format {format:?}, expected raw, qcow2 or vmdk"
            )));
        }
    };
    opened.map_err(|error| Error::disk(format!("cannot open disk {name:?}"), error))
}
