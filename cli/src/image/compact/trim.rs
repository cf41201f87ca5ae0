// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Has the guest's filesystems give back what they do not use.

use crate::appliance::telling;
use crate::args::MachineArgs;
use crate::failure::Failure;
use crate::image::console::Console;
use crate::image::source::Source;
use crate::places;
use tranship_appliance::{CancelToken, Drive, ErrorKind, Guest};
use tranship_protocol::GuestPath;

/// Mounts each filesystem of the disk in the appliance and trims it; the bytes that they
/// gave back.
pub(super) fn trim(source: Source, cancel: &CancelToken, console: Console) -> Result<u64, Failure> {
    let machine = MachineArgs::from_environment()?;
    let mut guest = Guest::new(places::settings(&machine)).with_cancel(cancel.clone());
    let drive =
        Drive { device: source.opened.device, read_only: false, durable: true, image: None };
    drop(source.opened.layers);
    guest.add_drive(drive)?;
    guest.launch(&places::boot(&telling())?)?;
    let root = GuestPath::of("/");
    let (mut bytes, mut filesystems) = (0_u64, 0);
    for volume in guest.volumes()? {
        let fstype = volume.tag("TYPE").unwrap_or_default();
        if fstype.is_empty() || fstype == "swap" {
            continue;
        }
        // What cannot be mounted or trimmed keeps its space, and the others do not have to.
        let given_back =
            guest.mount(&volume.device, &root, "", None).and_then(|()| guest.trim(&root));
        match given_back {
            Ok(more) => {
                bytes = bytes.saturating_add(more);
                filesystems += 1;
            }
            Err(error) if error.kind() == ErrorKind::Call => {
                console.warn(&format!("{} is not trimmed: {error}", volume.device));
            }
            Err(error) => return Err(error.into()),
        }
        guest.unmount_all()?;
    }
    guest.shutdown()?;
    if filesystems == 0 {
        console.warn("there is no filesystem on the disk that could be trimmed");
    }
    Ok(bytes)
}
