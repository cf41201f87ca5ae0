// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks without a description: a guest with defaults around them.

use crate::files::Files;
use crate::{
    Controller, Error, ErrorKind, Firmware, Location, NetworkKind, Result, Source, SourceDisk,
    SourceKind, SourceNic, image,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tranship_formats::{Place, Spec};

const MEMORY: u64 = 2048 << 20;
/// What is cut off a file's name to get the guest's; `-sda` is how converted disks are
/// called.
const SUFFIXES: [&str; 7] = [".img", ".ova", ".qcow2", ".raw", ".vmdk", ".vmx", "-sda"];

/// For how long a server that was lost is looked for. A conversion takes minutes, and what
/// it reads is not written by anybody.
const RECONNECT: Duration = Duration::from_mins(1);

/// A guest of the disk images at `paths`, in this order, of `format` or probed. A path may
/// be a URI of an NBD server's export.
///
/// # Errors
///
/// No disks, disks that do not exist, or that are of a format that is not known.
pub fn open_disks(paths: &[PathBuf], format: Option<&str>) -> Result<Source> {
    let first = paths
        .first()
        .ok_or_else(|| Error::new(ErrorKind::Usage, "no disks are given, expected at least one"))?;
    let mut warnings = Vec::new();
    let mut disks = Vec::new();
    for (index, path) in paths.iter().enumerate() {
        disks.push(open_disk(index, path, format, &mut warnings)?);
    }
    Ok(Source {
        name: guest_name(first),
        kind: SourceKind::Disks,
        memory_bytes: MEMORY,
        vcpus: 1,
        cpu_topology: None,
        firmware: Firmware::Unknown,
        secure_boot: false,
        genid: None,
        disks,
        nics: vec![SourceNic {
            mac: None,
            network: NetworkKind::Network("default".into()),
            model: None,
            slot: None,
        }],
        removables: Vec::new(),
        sound: None,
        guest_os: None,
        warnings,
        manifest: None,
    })
}

fn open_disk(
    index: usize,
    path: &Path,
    format: Option<&str>,
    warnings: &mut Vec<String>,
) -> Result<SourceDisk> {
    let mut spec = Spec::from_word(path)
        .map_err(|error| Error::disk("cannot read the name of the disk", error))?;
    if let Place::Nbd(address) = &mut spec.place {
        address.reconnect = RECONNECT;
        let location = Location::Export { uri: spec.name.clone() };
        let name = spec.name.clone();
        return disk_of(index, &name, Files::Export(Box::new(spec)), location, format, warnings);
    }
    // The user named the path, so that a link is followed; its target's folder is the place
    // that the image may look around in.
    let path = path.canonicalize().map_err(|error| {
        let cause = tranship_block::Error::io("cannot resolve the path", error);
        Error::disk("cannot find the disk", cause).in_file(path)
    })?;
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
        Error::new(ErrorKind::Usage, "the name of the disk is not UTF-8").in_file(&path)
    })?;
    let files = Files::beside(&path);
    let location = Location::File { path: path.clone() };
    disk_of(index, name, files, location, format, warnings)
}

fn disk_of(
    index: usize,
    name: &str,
    files: Files,
    location: Location,
    format: Option<&str>,
    warnings: &mut Vec<String>,
) -> Result<SourceDisk> {
    let format = if let Some(format) = format {
        format.to_owned()
    } else {
        let probed = image::probe(&*files.open(name)?, name)?;
        if probed == "raw" {
            warnings.push(format!("no format is given for {name:?}; it is taken as raw"));
        }
        probed.to_owned()
    };
    Ok(SourceDisk {
        index,
        controller: Controller::Unknown,
        unit: None,
        format,
        name: name.to_owned(),
        location,
        files: Arc::new(files),
    })
}

/// The file's name without one known suffix; that of an export without the folders in it.
pub(crate) fn guest_name(path: &Path) -> String {
    let name = match Spec::from_word(path).map(|spec| spec.place) {
        Ok(Place::Nbd(address)) => {
            let name = address.uri.export.rsplit('/').next().unwrap_or_default().to_owned();
            if name.is_empty() { "disk".to_owned() } else { name }
        }
        _ => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    };
    let cut = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix));
    cut.filter(|cut| !cut.is_empty()).unwrap_or(&name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_one_known_suffix() {
        for (path, name) in [
            ("/a/web.img", "web"),
            ("web-sda", "web"),
            ("web-sda.qcow2", "web-sda"),
            ("web.tar", "web.tar"),
            (".img", ".img"),
            ("nbd://server/web.img", "web"),
            ("nbd+unix:///a/web.vmdk?socket=/run/web.img", "web"),
            ("nbd://server", "disk"),
        ] {
            assert_eq!(guest_name(Path::new(path)), name);
        }
    }
}
