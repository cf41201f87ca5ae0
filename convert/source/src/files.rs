// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files that belong to a source: those of a folder or an archive, or one export of a
//! server. Nothing else is reachable.

use crate::archive::Archive;
use crate::{Error, ErrorKind, Location, Result};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, Gate, Request};
use tranship_formats::{Format, OpenOptions, Spec};
use tranship_raw::{Access, RawFile};

/// A place that relative names are looked up in.
#[derive(Debug)]
pub(crate) enum Files {
    /// A folder of the host.
    Folder(PathBuf),
    /// An archive, and the folder inside of it that names are relative to.
    Archive(Archive, String),
    /// One disk on a server, which has no other files.
    Export(Box<Spec>),
}

impl Files {
    /// The folder that `file` is in.
    pub(crate) fn beside(file: &Path) -> Self {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
        Self::Folder(folder.unwrap_or(Path::new(".")).to_owned())
    }

    /// Opens the file called `name`, as plain bytes.
    pub(crate) fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        if !matches!(self, Self::Export(_)) {
            check_name(name)?;
        }
        match self {
            Self::Export(spec) if spec.name == name => {
                let options = OpenOptions {
                    format: Some(Format::Raw),
                    read_only: true,
                    ..OpenOptions::default()
                };
                tranship_formats::open_spec(spec, &options)
                    .map(|opened| opened.device)
                    .map_err(|error| Error::disk(format!("cannot open {name:?}"), error))
            }
            Self::Export(spec) => Err(no_other(spec, name)),
            Self::Folder(folder) => {
                let path = inside(folder, name)?;
                let file = RawFile::open(&path, Access::ReadOnly)
                    .map_err(|error| Error::disk(format!("cannot open {name:?}"), error))?;
                Ok(Arc::new(file))
            }
            Self::Archive(archive, base) => archive.open_member(&format!("{base}{name}")),
        }
    }

    /// Where the file called `name` is.
    pub(crate) fn locate(&self, name: &str) -> Result<Location> {
        check_name(name)?;
        match self {
            Self::Export(spec) => Err(no_other(spec, name)),
            Self::Folder(folder) => Ok(Location::File { path: inside(folder, name)? }),
            Self::Archive(archive, base) => archive.locate(&format!("{base}{name}")),
        }
    }
}

impl Gate for Files {
    fn open(&self, request: Request<'_>) -> tranship_block::Result<Arc<dyn BlockDevice>> {
        if request.writable {
            return Err(tranship_block::Error::usage("sources are read-only"));
        }
        Self::open(self, request.name).map_err(|error| {
            let kind = match error.kind() {
                ErrorKind::Denied => tranship_block::ErrorKind::Denied,
                ErrorKind::NotFound => tranship_block::ErrorKind::NotFound,
                _ => tranship_block::ErrorKind::Io,
            };
            let message = format!("{} {:?} cannot be opened", request.role, request.name);
            tranship_block::Error::new(kind, message).because(error)
        })
    }
}

fn no_other(spec: &Spec, name: &str) -> Error {
    Error::denied(format!(
        "{} asks for {name:?}, and a disk on a server has no other files",
        spec.name
    ))
}

/// Refuses names that lead out of the place that they are looked up in.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let scheme = name.split_once("://").is_some();
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    let hostile = name.is_empty()
        || name.contains(['\0', '\\'])
        || scheme
        || !Path::new(name).components().all(plain);
    if hostile {
        return Err(Error::denied(format!(
            "name {name:?} is not allowed, expected a file beside or below the description"
        )));
    }
    Ok(())
}

/// The path of `name` in `folder`, with links resolved, if that is still in `folder`.
fn inside(folder: &Path, name: &str) -> Result<PathBuf> {
    let resolve = |path: &Path| {
        path.canonicalize().map_err(|error| {
            Error::disk(
                format!("cannot find {name:?}"),
                tranship_block::Error::io("cannot resolve the path", error).in_file(path),
            )
        })
    };
    let path = resolve(&folder.join(name))?;
    if !path.starts_with(resolve(folder)?) {
        return Err(Error::denied(format!("name {name:?} is a link out of its folder")));
    }
    Ok(path)
}
