// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The gate for images that lie in a folder.

use crate::Files;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Gate, Request, Result};
use tranship_raw::{Access, RawFile};

/// Opens regular files in an image's own folder, and in folders that its user allowed.
///
/// Names that are absolute, that climb out with `..` or through a symbolic link, that
/// look like a protocol (`nbd:`, `json:`) or that lead to anything but a regular file are
/// refused. The kernel resolves names below a folder that is already open, so that
/// nobody can move a link into place between a check and its use.
#[derive(Clone, Debug)]
pub struct FolderGate {
    /// The folder of the image, which relative names start from; an image that is in no
    /// folder, such as one on a server, has none.
    pub folder: Option<PathBuf>,
    /// Folders in which absolute names and names with `..` may end as well.
    pub allowed: Vec<PathBuf>,
    /// Where the files come from.
    pub files: Files,
}

impl FolderGate {
    /// The gate for the image at `path`.
    pub fn beside(path: &Path, allowed: &[PathBuf]) -> Self {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let (folder, allowed) = (Some(folder.to_owned()), allowed.to_vec());
        Self { folder, allowed, files: Files::System }
    }

    /// The gate for an image that is in no folder: absolute names alone can be allowed.
    pub fn nowhere(allowed: &[PathBuf]) -> Self {
        Self { folder: None, allowed: allowed.to_vec(), files: Files::System }
    }

    /// The path that a name means.
    fn whole(&self, request: Request<'_>) -> Result<PathBuf> {
        let name = Path::new(request.name);
        match &self.folder {
            Some(folder) => Ok(folder.join(name)),
            None if name.is_absolute() => Ok(name.to_owned()),
            None => Err(denied(request, "is relative, and the image is in no folder")),
        }
    }

    /// Opens what `request` names as a file, whose path tells where it was found.
    ///
    /// # Errors
    ///
    /// As [`Gate::open`].
    pub fn open_file(&self, request: Request<'_>) -> Result<RawFile> {
        check_name(request)?;
        let whole = self.whole(request)?;
        self.files.open(&whole, access(request), || self.find(&whole, request))
    }

    /// Opens what `request` names, which is `whole`, by its name.
    fn find(&self, whole: &Path, request: Request<'_>) -> Result<RawFile> {
        let name = Path::new(request.name);
        let is_plain =
            name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        let found = match &self.folder {
            Some(folder) if is_plain => beneath(folder, name, request)?,
            _ => None,
        };
        let file = match found {
            Some(file) => file,
            None => self.in_allowed(whole, request)?,
        };
        let access = access(request);
        let file = RawFile::from_file(file, whole, access)
            .map_err(|error| denied(request, "is not a regular file").because(error))?;
        if file.is_block_device() {
            return Err(denied(request, "is a block device"));
        }
        Ok(file)
    }

    /// Opens what an image is based on, wherever it is: a regular file or block device.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] for anything else, and for names that look like a protocol.
    pub fn open_parent(&self, request: Request<'_>) -> Result<RawFile> {
        check_name(request)?;
        let whole = self.whole(request)?;
        let open = || RawFile::open(&whole, access(request));
        self.files.open(&whole, access(request), open).map_err(|error| match error.kind() {
            ErrorKind::Unsupported => {
                denied(request, "is neither a regular file nor a block device").because(error)
            }
            _ => error,
        })
    }

    /// Looks for `whole` in the folders that the user allowed.
    fn in_allowed(&self, whole: &Path, request: Request<'_>) -> Result<File> {
        if self.allowed.is_empty() {
            return Err(denied(request, "is outside of the image's folder"));
        }
        let place = whole.canonicalize().map_err(|error| {
            Error::io(format!("cannot find {} {:?}", request.role, request.name), error)
        })?;
        for folder in &self.allowed {
            let Ok(folder) = folder.canonicalize() else { continue };
            if let Ok(below) = place.strip_prefix(&folder)
                && let Some(file) = beneath(&folder, below, request)?
            {
                return Ok(file);
            }
        }
        Err(denied(request, "is outside of the image's folder and of those that are allowed"))
    }
}

impl Gate for FolderGate {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        Ok(Arc::new(self.open_file(request)?))
    }
}

fn denied(request: Request<'_>, why: &str) -> Error {
    Error::new(
        ErrorKind::Denied,
        format!("the image asks for {} {:?}, which {why}", request.role, request.name),
    )
}

fn access(request: Request<'_>) -> Access {
    if request.writable { Access::ReadWrite } else { Access::ReadOnly }
}

fn check_name(request: Request<'_>) -> Result<()> {
    let name = request.name;
    if name.is_empty() || name.contains('\0') {
        return Err(denied(request, "is no file name"));
    }
    // A file whose name has a colon in it can still be reached as "./name".
    if name.split('/').next().is_some_and(|start| start.contains(':')) {
        return Err(denied(request, "looks like a protocol, not like a file"));
    }
    Ok(())
}

/// Opens `name` below `folder`; `None` if it leads out of it.
fn beneath(folder: &Path, name: &Path, request: Request<'_>) -> Result<Option<File>> {
    let failed = |errno: Errno| {
        Error::io(format!("cannot open {} {:?}", request.role, request.name), errno.into())
            .in_file(folder)
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let start = rustix::fs::openat(CWD, folder, flags, Mode::empty()).map_err(failed)?;
    let mode = if request.writable { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    loop {
        return match rustix::fs::openat2(&start, name, flags, Mode::empty(), resolve) {
            Ok(file) => Ok(Some(File::from(file))),
            Err(Errno::XDEV | Errno::LOOP) => Ok(None),
            // The kernel saw a rename on the way and could not be sure.
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(errno) => Err(failed(errno)),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn request(name: &str) -> Request<'_> {
        Request { name, role: "backing file", writable: false }
    }

    #[test]
    fn only_regular_files_in_the_folder_are_opened() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("images");
        std::fs::create_dir_all(folder.join("sub")).unwrap();
        let secret = outer.path().join("secret");
        std::fs::write(&secret, "secret").unwrap();
        std::fs::write(folder.join("base"), "base").unwrap();
        std::fs::write(folder.join("a:b"), "colon").unwrap();
        std::fs::write(folder.join("sub/base"), "base").unwrap();
        symlink("base", folder.join("inner")).unwrap();
        symlink("../secret", folder.join("outer")).unwrap();
        symlink("/dev/zero", folder.join("zero")).unwrap();
        symlink("..", folder.join("up")).unwrap();
        rustix::fs::mknodat(
            CWD,
            folder.join("fifo"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        let gate = FolderGate::beside(&folder.join("image"), &[]);
        for name in ["base", "./base", "sub/base", "inner", "./a:b"] {
            gate.open(request(name)).unwrap();
        }
        let absolute = secret.to_str().unwrap();
        let own = folder.join("base");
        for name in [
            "../secret",
            "sub/../../secret",
            "outer",
            "up/secret",
            "zero",
            "fifo",
            "sub",
            "a:b",
            "/etc/passwd",
            "json:{}",
            "nbd://localhost/x",
            "file:base",
            "",
            "b\0",
            absolute,
            own.to_str().unwrap(),
            "..",
        ] {
            let error = gate.open(request(name)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied, "{name}: {error}");
        }
        assert_eq!(gate.open(request("none")).unwrap_err().kind(), ErrorKind::NotFound);

        let wide = FolderGate::beside(&folder.join("image"), &[outer.path().to_owned()]);
        for name in [absolute, "../secret", "outer", own.to_str().unwrap()] {
            wide.open(request(name)).unwrap();
        }
        for name in ["/etc/passwd", "zero", "../../../../../etc/passwd"] {
            let error = wide.open(request(name)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied, "{name}: {error}");
        }
    }
}
