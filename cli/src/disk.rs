// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens the disks that the command line names.

use crate::failure::Failure;
use std::path::Path;
use std::sync::Arc;
use tranship_appliance::{Drive, Image, Server};
use tranship_block::{BlockDevice, Meter, Storage};
use tranship_formats::{Files, Format, Noted, OpenOptions, Spec};
use tranship_qcow2::{CreateOptions, Qcow2};
use tranship_raw::{Access, RawFile};

/// A disk, and what was noticed about it.
#[derive(Debug)]
pub(crate) struct Disk {
    /// For the appliance.
    pub(crate) drive: Drive,
    /// Sentences without a full stop.
    pub(crate) warnings: Vec<String>,
}

/// What may happen to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// It is written to.
    Write,
    /// It can be written to, but what is written is thrown away.
    Discard,
    /// It cannot be written to.
    Read,
}

/// Opens the image at `path`, a file or a URI of NBD; its format is guessed if it is not named. What is
/// thrown away is not counted by `meter`.
pub(crate) fn open(
    path: &Path,
    format: Option<&str>,
    usage: Use,
    meter: &Meter,
) -> Result<Disk, Failure> {
    let named = format.map(str::parse::<Format>).transpose()?;
    let read_only = usage != Use::Write;
    let spec = Spec::from_word(path)?;
    let metered = meter.disk("image", &path.to_string_lossy());
    // Another process can open the disk from what is noted.
    let options = OpenOptions {
        format: named,
        read_only,
        meter: metered.clone(),
        files: Files::Noting(Arc::default()),
        ..OpenOptions::default()
    };
    let opened = tranship_formats::open_spec(&spec, &options)?;
    let Noted { files, servers } = options.files.noted();
    let files = files.into_iter().map(|noted| (noted.path, noted.writable, noted.file));
    let servers = servers
        .into_iter()
        .map(|noted| Server::new(noted.name, noted.address, noted.options, noted.remote));
    let image = Image {
        path: path.to_owned(),
        format: format.map(ToOwned::to_owned),
        files: Arc::new(files.collect()),
        servers: Arc::new(servers.collect()),
        discard: usage == Use::Discard,
        meter: metered,
    };
    let device = match usage {
        Use::Write | Use::Read => opened.device,
        Use::Discard => overlay(opened.device)?,
    };
    let (read_only, durable) = (usage == Use::Read, usage == Use::Write);
    let drive = Drive { device, read_only, durable, image: Some(image) };
    Ok(Disk { drive, warnings: opened.warnings })
}

/// An overlay in a file without a name: it ends with this process, however that ends.
pub(crate) fn overlay(backing: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>, Failure> {
    let file =
        tempfile::tempfile().map_err(|error| Failure::io("making a temporary file", &error))?;
    let name = std::env::temp_dir().join("overlay of a read-only disk");
    let storage: Arc<dyn Storage> = Arc::new(RawFile::from_file(file, name, Access::ReadWrite)?);
    tranship_qcow2::create(&*storage, &CreateOptions::new(backing.size()))?;
    let options = tranship_qcow2::OpenOptions { backing: Some(backing), ..Default::default() };
    Ok(Arc::new(Qcow2::open(storage, options)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_a_read_only_disk_is_thrown_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        std::fs::write(&path, vec![7_u8; 1 << 20]).unwrap();
        let disk = open(&path, Some("raw"), Use::Discard, &Meter::default()).unwrap().drive;
        disk.device.write_at(&[1; 512], 4096).unwrap();
        let mut found = [0; 1024];
        disk.device.read_at(&mut found, 4096 - 512).unwrap();
        assert_eq!((found[0], found[512]), (7, 1));
        disk.device.flush().unwrap();
        drop(disk);
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 7));
    }

    #[test]
    fn unknown_formats_and_files_are_named() {
        let failure =
            open(Path::new("/nowhere/d.img"), None, Use::Read, &Meter::default()).unwrap_err();
        assert!(failure.render("p").contains("/nowhere/d.img"), "{failure:?}");
        let failure = open(Path::new("/nowhere/d.img"), Some("ntfs"), Use::Read, &Meter::default())
            .unwrap_err();
        assert!(failure.message().contains("ntfs"), "{failure:?}");
        assert_eq!(failure.exit_code(), 2);
    }
}
