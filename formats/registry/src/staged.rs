// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A new image that has its name only when it is complete.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use tranship_block::{Error, Result};

/// What the names of files begin with that belong to the try.
const NOTE: &str = ".tranship-";

/// A place for the files of a new image, next to where they will be.
///
/// They are made in a hidden folder beside the target under the names that they will have,
/// so that a disk of several files refers to the right ones, and are renamed at the end,
/// the first file last. Whatever happens before leaves nothing that looks like the image.
/// Dropping it removes the folder, unless it is to be kept for another try.
#[derive(Debug)]
pub struct Staged {
    target: PathBuf,
    /// None if the target cannot be replaced by renaming: a device, or a file in a folder
    /// in which nothing may be made.
    folder: Option<PathBuf>,
    keep: bool,
}

impl Staged {
    /// Makes a place for the image `target`. With `keep`, what an earlier try left there
    /// stays, and is kept again if this one fails.
    ///
    /// # Errors
    ///
    /// What the operating system reports.
    pub fn begin(target: &Path, keep: bool) -> Result<Self> {
        // Who names a link means what it leads to, and does not want it replaced.
        let target = match target.canonicalize() {
            Ok(target) => target,
            Err(_) => target.to_owned(),
        };
        let (is_there, is_file) = match fs::metadata(&target) {
            Ok(metadata) => (true, metadata.is_file()),
            Err(_) => (false, false),
        };
        if is_there && !is_file {
            return Ok(Self { target, folder: None, keep: false });
        }
        let folder = Self::folder_of(&target)?;
        if !keep {
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    let text = "cannot remove what an interrupted run has left";
                    return Err(Error::io(text, error).in_file(folder));
                }
                _ => {}
            }
        }
        match fs::create_dir(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && keep => {}
            Err(error) if is_there && is_refused(&error) => {
                return Ok(Self { target, folder: None, keep: false });
            }
            Err(error) => {
                return Err(
                    Error::io("cannot make a folder for the new image", error).in_file(folder)
                );
            }
        }
        Ok(Self { target, folder: Some(folder), keep })
    }

    fn folder_of(target: &Path) -> Result<PathBuf> {
        let name = target
            .file_name()
            .ok_or_else(|| Error::usage("target has no file name").in_file(target))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".tranship-part");
        Ok(target.with_file_name(hidden))
    }

    /// Where the first file of the image is to be made.
    pub fn path(&self) -> PathBuf {
        match (&self.folder, self.target.file_name()) {
            (Some(folder), Some(name)) => folder.join(name),
            _ => self.target.clone(),
        }
    }

    /// A file of this name that belongs to the try, not to the image; `None` where there is
    /// no place for one.
    pub fn note(&self, name: &str) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join(format!("{NOTE}{name}")))
    }

    /// Gives all files their names. Existing files of these names are replaced; the first
    /// one keeps its owner and its mode.
    ///
    /// # Errors
    ///
    /// What the operating system reports; the files that had their turn stay.
    pub fn publish(mut self) -> Result<()> {
        let Some(folder) = self.folder.clone() else { return Ok(()) };
        let first = self.path();
        if let Ok(old) = fs::metadata(&self.target) {
            let failed = |error| Error::io("cannot keep the mode", error).in_file(&first);
            fs::set_permissions(&first, old.permissions()).map_err(failed)?;
            // Only root can give files away: the others are their owners already.
            let _ = chown(&first, Some(old.uid()), Some(old.gid()));
        }
        let failed = |error| Error::io("cannot list the new files", error).in_file(&folder);
        let mut files = Vec::new();
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let is_note = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(NOTE.as_bytes()));
            if path != first && !is_note {
                files.push(path);
            }
        }
        files.push(first);
        for file in files {
            let Some(name) = file.file_name() else { continue };
            let to = self.target.with_file_name(name);
            fs::rename(&file, &to).map_err(|error| {
                Error::io("cannot give the new image its name", error).in_file(to)
            })?;
        }
        self.keep = false;
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(folder) = self.folder.as_ref().filter(|_| !self.keep) {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

fn is_refused(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn the_target_changes_only_when_the_image_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("disk");
        fs::write(&target, "old").unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o640)).unwrap();
        symlink("disk", folder.path().join("link")).unwrap();
        let link = folder.path().join("link");

        let staged = Staged::begin(&link, false).unwrap();
        fs::write(staged.path(), "half").unwrap();
        drop(staged);
        assert_eq!(fs::read(&target).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);

        let staged = Staged::begin(&link, false).unwrap();
        fs::write(staged.path(), "new").unwrap();
        fs::write(staged.path().with_file_name("disk-flat"), "flat").unwrap();
        fs::write(staged.note("state").unwrap(), "state").unwrap();
        staged.publish().unwrap();
        assert_eq!(fs::read(&link).unwrap(), b"new");
        assert_eq!(fs::read(folder.path().join("disk-flat")).unwrap(), b"flat");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn what_is_kept_is_found_again_and_otherwise_removed() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("disk");
        for (keep, found) in [(true, false), (true, true), (false, false), (true, false)] {
            let staged = Staged::begin(&target, keep).unwrap();
            assert_eq!(staged.path().exists(), found, "{keep}");
            fs::write(staged.path(), "half").unwrap();
        }
        assert!(!target.exists());
    }

    #[test]
    fn devices_are_written_where_they_are() {
        let staged = Staged::begin(Path::new("/dev/null"), false).unwrap();
        assert_eq!(staged.path(), Path::new("/dev/null"));
        assert_eq!(staged.note("state"), None);
        staged.publish().unwrap();
    }
}
