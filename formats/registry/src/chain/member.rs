// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that are members of a tar archive: those of an OVA.

use super::{Image, Place, Walk, part_of};
use crate::layer::Disk;
use crate::spec::{Member, Spec};
use crate::{Format, probe};
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Gate, Request, Result};
use tranship_tar::Archive;

/// Endings of the names of raw disks, which nothing inside of them shows.
const RAW: [&str; 2] = [".img", ".raw"];

/// The other members, for a disk that asks for them.
#[derive(Debug)]
struct Beside<'a> {
    archive: &'a Archive,
    /// The folder in the archive, empty or with a slash at its end.
    folder: &'a str,
}

impl Gate for Beside<'_> {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        if request.writable {
            return Err(Error::usage("members of an archive are read-only"));
        }
        self.archive.member(&format!("{}{}", self.folder, request.name)).map_err(|error| {
            let message = format!("{} {:?} cannot be opened", request.role, request.name);
            Error::new(error.kind(), message).because(error)
        })
    }
}

impl Walk<'_> {
    /// Opens a disk in the archive `file`, which lies at `path`.
    pub(super) fn member(
        &mut self,
        spec: &Spec,
        wanted: &Member,
        (file, path): (Arc<dyn BlockDevice>, &Path),
        (read_only, direct): (bool, bool),
        format: Option<Format>,
    ) -> Result<Disk> {
        if !read_only {
            let hint =
                "members of an archive are read-only: open the disk so, or unpack the archive";
            return Err(Error::usage(hint).in_file(path));
        }
        let archive = Archive::open(file).map_err(|error| error.in_file(path))?;
        let name = match wanted {
            Member::Named(name) => name.clone(),
            Member::OnlyDisk => only_disk(&archive).map_err(|error| error.in_file(path))?,
        };
        let inside = path.join(&name);
        let device = archive.member(&name).map_err(|error| error.in_file(path))?;
        let format = match format {
            Some(format) => format,
            None => self.first_format(&*device, &inside)?,
        };
        let device = match spec.slice {
            None => device,
            Some(slice) => part_of(device, slice, &inside)?,
        };
        let folder = name.rfind('/').and_then(|slash| name.get(..=slash)).unwrap_or_default();
        let gate = Beside { archive: &archive, folder };
        let image = Image {
            file: device,
            storage: None,
            name: &spec.name,
            path: &inside,
            format,
            spec: Some(spec),
            direct,
        };
        self.image(image, &Place::Elsewhere(&gate))
    }
}

/// The name of the only disk in an archive.
fn only_disk(archive: &Archive) -> Result<String> {
    let mut disks = Vec::new();
    for name in archive.names() {
        let file = name.rsplit('/').next().unwrap_or(name);
        // What macOS keeps beside a file.
        if file.starts_with("._") {
            continue;
        }
        let named_raw = RAW.iter().any(|ending| file.to_ascii_lowercase().ends_with(ending));
        if named_raw || probe(&*archive.member(name)?, Path::new(name))? != Format::Raw {
            disks.push(name);
        }
    }
    match disks.as_slice() {
        [name] => Ok((*name).to_owned()),
        [] => Err(Error::unsupported(
            "the archive has no member that looks like a disk: name one with \
             tar:PATH:member=NAME, or give the format raw for the archive itself",
        )),
        several => Err(Error::usage(format!(
            "the archive has {} disks, choose one with tar:PATH:member=NAME: {}",
            several.len(),
            several.iter().take(20).copied().collect::<Vec<_>>().join(", ")
        ))),
    }
}
