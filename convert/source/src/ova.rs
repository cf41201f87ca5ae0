// SPDX-License-Identifier: Apache-2.0 OR MIT
//! OVF packages: an archive, a folder, or a description with its files beside it.

use crate::archive::Archive;
use crate::disks::guest_name;
use crate::files::Files;
use crate::manifest::Manifest;
use crate::ovf::{self, Description, DiskFile};
use crate::{Error, ErrorKind, Result, Source, SourceDisk, SourceKind, image};
use std::path::Path;
use std::sync::Arc;

/// Largest manifest; a line has some hundred bytes.
const MAX_MANIFEST: u64 = 1 << 20;

/// The guest in the OVA at `path`, which may also be a folder with an `.ovf` file or that
/// file itself.
///
/// # Errors
///
/// Compressed archives and disks, and packages of several guests, are
/// [`ErrorKind::Unsupported`]; names that lead out of the package [`ErrorKind::Denied`];
/// what is cut off or contradicts itself [`ErrorKind::Corrupt`]; disks that are not there
/// [`ErrorKind::NotFound`].
pub fn open_ova(path: &Path) -> Result<Source> {
    open_package(path).map_err(|error| error.in_file(path))
}

fn open_package(path: &Path) -> Result<Source> {
    let (files, ovf, kind) = find(path)?;
    let files = Arc::new(files);
    let text = read_text(&files, &ovf, ovf::MAX_TEXT)?;
    let description = ovf::parse(&text)?;
    let mut warnings = description.hardware.warnings.clone();
    let manifest = read_manifest(&files, &ovf)?;
    if manifest.is_none() {
        warnings.push("there is no manifest: contents cannot be verified".to_owned());
    }
    let disks = disks(&description, &files)?;
    if disks.is_empty() {
        warnings.push("the guest has no disks".to_owned());
    }
    let hardware = description.hardware;
    Ok(Source {
        name: description.name.unwrap_or_else(|| guest_name(path)),
        kind,
        memory_bytes: hardware.memory_bytes,
        vcpus: hardware.vcpus,
        cpu_topology: hardware.cpu_topology,
        firmware: hardware.firmware,
        secure_boot: hardware.secure_boot,
        genid: description.genid,
        disks,
        nics: hardware.nics,
        removables: hardware.removables,
        sound: hardware.sound,
        guest_os: description.guest_os,
        warnings,
        manifest,
    })
}

/// The files of the package and the name of the description among them.
fn find(path: &Path) -> Result<(Files, String, SourceKind)> {
    let kind = path.metadata().map_err(|error| {
        Error::disk("cannot find the package", tranship_block::Error::io("stat", error))
    })?;
    let is_ovf = |name: &str| {
        let file = name.rsplit('/').next().unwrap_or(name);
        !file.starts_with("._") && extension_of(file).eq_ignore_ascii_case("ovf")
    };
    if kind.is_dir() {
        let list = path.read_dir().map_err(|error| {
            Error::disk("cannot list the folder", tranship_block::Error::io("read", error))
        })?;
        let names: Vec<String> = list
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| is_ovf(name))
            .collect();
        return Ok((Files::Folder(path.to_owned()), only(names)?, SourceKind::Ovf));
    }
    if let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|n| is_ovf(n)) {
        return Ok((Files::beside(path), name.to_owned(), SourceKind::Ovf));
    }
    let archive = Archive::open(path)?;
    let name = only(archive.names().filter(|name| is_ovf(name)).map(str::to_owned).collect())?;
    // Names in a description are relative to it, and it may be in a folder of the archive.
    let (base, name) = match name.rsplit_once('/') {
        Some((base, file)) => (format!("{base}/"), file.to_owned()),
        None => (String::new(), name),
    };
    Ok((Files::Archive(archive, base), name, SourceKind::Ova))
}

fn extension_of(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(_, extension)| extension)
}

fn only(mut names: Vec<String>) -> Result<String> {
    names.sort();
    match names.as_slice() {
        [name] => Ok(name.clone()),
        [] => Err(Error::new(ErrorKind::NotFound, "the package holds no .ovf file")),
        several => Err(Error::unsupported(format!(
            "the package holds {} .ovf files, expected one: {}",
            several.len(),
            several.iter().take(20).map(String::as_str).collect::<Vec<_>>().join(", ")
        ))),
    }
}

fn read_text(files: &Files, name: &str, most: u64) -> Result<Vec<u8>> {
    let file = files.open(name)?;
    if file.size() > most {
        return Err(Error::corrupt(format!(
            "{name:?} has {} bytes, expected at most {most}",
            file.size()
        )));
    }
    let mut text = vec![0; usize::try_from(file.size()).unwrap_or(0)];
    file.read_at(&mut text, 0)
        .map_err(|error| Error::disk(format!("cannot read {name:?}"), error))?;
    Ok(text)
}

fn read_manifest(files: &Arc<Files>, ovf: &str) -> Result<Option<Manifest>> {
    let stem = ovf.rsplit_once('.').map_or(ovf, |(stem, _)| stem);
    match read_text(files, &format!("{stem}.mf"), MAX_MANIFEST) {
        Ok(text) => Ok(Some(Manifest::parse(&text, Arc::clone(files)))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn disks(description: &Description, files: &Arc<Files>) -> Result<Vec<SourceDisk>> {
    let items = description.disks.iter().zip(&description.hardware.disks).enumerate();
    items
        .map(|(index, (file, item))| {
            let device = files.open(&file.href).map_err(|error| missing(file, error))?;
            Ok(SourceDisk {
                index,
                controller: item.controller.clone(),
                unit: item.unit,
                format: format_of(file, &device)?.to_owned(),
                name: file.href.clone(),
                location: files.locate(&file.href)?,
                files: Arc::clone(files),
            })
        })
        .collect()
}

fn missing(file: &DiskFile, error: Error) -> Error {
    let DiskFile { id, href, .. } = file;
    match error.kind() {
        ErrorKind::NotFound => Error::new(
            ErrorKind::NotFound,
            format!("disk {id:?} is in file {href:?}, which the package does not hold"),
        ),
        ErrorKind::Denied => Error::denied(format!("disk {id:?}: {error}")),
        _ => error,
    }
}

/// The description decides; only if it is silent, the content does.
fn format_of(file: &DiskFile, device: &dyn tranship_block::BlockDevice) -> Result<&'static str> {
    if file.format.to_ascii_lowercase().contains("vmdk") {
        return Ok("vmdk");
    }
    image::probe(device, &file.href)
}
