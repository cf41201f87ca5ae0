// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's disks as the machine gets them: what is written goes to a file that is
//! thrown away, and the disks themselves are open for reading only.

use super::machine::export;
use crate::libvirt::Disk;
use crate::{Error, ErrorKind, Result};
use std::path::Path;
use std::sync::Arc;
use tranship_block::BlockDevice;
use tranship_formats::Format;
use tranship_nbd::{Export, Limits, Running, Server};
use tranship_qcow2::{CreateOptions, Qcow2};
use tranship_raw::RawFile;

/// Serves an overlay of every disk on `socket`; the overlays' files lie in `folder`.
pub(crate) fn serve(disks: &[Disk], folder: &Path, socket: &Path) -> Result<Running> {
    let exports = disks
        .iter()
        .enumerate()
        .map(|(index, disk)| {
            let device = overlay(disk, &folder.join(format!("overlay{index}")))?;
            Ok(Export::new(export(index), device))
        })
        .collect::<Result<Vec<Export>>>()?;
    let server = Server::bind(socket, exports, Limits::default()).and_then(Server::start);
    server.map_err(|error| {
        Error::new(ErrorKind::Transient, "serving the guest's disks").because(error)
    })
}

/// The disk under a layer at `file` that takes everything that is written.
fn overlay(disk: &Disk, file: &Path) -> Result<Arc<dyn BlockDevice>> {
    let failed = |error: tranship_block::Error| {
        use tranship_block::ErrorKind as Kind;
        let kind = match error.kind() {
            Kind::Busy | Kind::Io | Kind::NoSpace => ErrorKind::Transient,
            _ => ErrorKind::Input,
        };
        Error::new(kind, format!("disk {} of the guest", disk.target)).because(error)
    };
    let format: Format = disk.format.parse().map_err(failed)?;
    let options = tranship_formats::OpenOptions {
        format: Some(format),
        read_only: true,
        ..tranship_formats::OpenOptions::default()
    };
    let backing = tranship_formats::open(&disk.path, &options).map_err(failed)?.device;
    let storage = RawFile::create(file, 0).map_err(failed)?;
    tranship_qcow2::create(&storage, &CreateOptions::new(backing.size())).map_err(failed)?;
    let options = tranship_qcow2::OpenOptions {
        backing: Some(backing),
        ..tranship_qcow2::OpenOptions::default()
    };
    Ok(Arc::new(Qcow2::open(Arc::new(storage), options).map_err(failed)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libvirt::Bus;

    fn disk(path: &Path, format: &str) -> Disk {
        Disk {
            path: path.into(),
            format: format.into(),
            target: "vda".into(),
            bus: Bus::Virtio,
            boot_order: None,
        }
    }

    #[test]
    fn writes_never_reach_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let contents = vec![7; 200_000];
        std::fs::write(&path, &contents).unwrap();
        let mut permissions = std::fs::metadata(&path).unwrap().permissions();
        permissions.set_readonly(true);
        std::fs::set_permissions(&path, permissions).unwrap();
        let device = overlay(&disk(&path, "raw"), &folder.path().join("overlay")).unwrap();
        device.write_at(&[1; 4096], 65_536).unwrap();
        device.flush().unwrap();
        let mut read = [0; 8192];
        device.read_at(&mut read, 65_536).unwrap();
        assert_eq!((read[4095], read[4096]), (1, 7));
        assert_eq!(std::fs::read(&path).unwrap(), contents);
    }

    #[test]
    fn a_disk_that_cannot_be_opened_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = disk(&folder.path().join("none"), "raw");
        let error = overlay(&missing, &folder.path().join("o")).unwrap_err();
        assert_eq!((error.kind(), error.to_string().contains("vda")), (ErrorKind::Input, true));
        let unknown = disk(&folder.path().join("none"), "x");
        assert_eq!(overlay(&unknown, Path::new("/o")).unwrap_err().kind(), ErrorKind::Input);
    }
}
