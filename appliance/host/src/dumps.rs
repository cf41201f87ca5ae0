// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeps the memory of machines that ended by themselves, a few of them and for us alone: what
//! the appliance knew of a guest is in there.

use crate::snapshots::{open_in, private_folder};
use crate::{Error, ErrorKind, Result};
use rustix::fs::{AtFlags, OFlags};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// How many are kept.
const KEPT: usize = 2;
/// How the names of finished and unfinished ones end.
const FINISHED: &str = ".core";
const UNFINISHED: &str = ".part";

/// Writes one more, as `write` has it, and removes the oldest: its path and size.
///
/// # Errors
///
/// What `write` returns and the operating system's, nothing is kept then; a folder that others
/// have access to.
pub(crate) fn keep(
    folder: &Path,
    write: impl FnOnce(&File) -> Result<()>,
) -> Result<(PathBuf, u64)> {
    let opened = private_folder(folder)?;
    // There is never more than that on the disk, this one included.
    tidy(folder, KEPT.saturating_sub(1));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let name = format!("{}-{}", timestamp(now.as_secs()), std::process::id());
    let (part, name) = (format!("{name}{UNFINISHED}"), format!("{name}{FINISHED}"));
    let path = folder.join(&name);
    let failed = |what: &str, error: std::io::Error| {
        Error::new(ErrorKind::Io, format!("{what} {}", path.display())).because(error)
    };
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
    let file = File::from(open_in(&opened, folder, &part, flags)?);
    let finished = write(&file).and_then(|()| {
        rustix::fs::renameat(&opened, &*part, &opened, &*name)
            .map_err(|error| failed("naming", error.into()))?;
        file.metadata().map_err(|error| failed("the size of", error))
    });
    match finished {
        Ok(facts) => Ok((path, facts.len())),
        Err(error) => {
            let _ = rustix::fs::unlinkat(&opened, &*part, AtFlags::empty());
            Err(error)
        }
    }
}

/// Removes all but the `left` newest, and what was never finished.
fn tidy(folder: &Path, left: usize) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut finished = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(FINISHED) {
            finished.push(name);
        } else if let Some(name) = name.strip_suffix(UNFINISHED)
            && !is_being_written(name)
        {
            let _ = fs::remove_file(entry.path());
        }
    }
    // Names begin with the time.
    finished.sort();
    for name in finished.iter().rev().skip(left) {
        let _ = fs::remove_file(folder.join(name));
    }
}

/// Whether the process that the name ends with still runs.
fn is_being_written(name: &str) -> bool {
    let pid = name.rsplit_once('-').and_then(|(_, pid)| pid.parse().ok());
    pid.and_then(rustix::process::Pid::from_raw)
        .is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}

/// A moment as `20261122T185300Z`.
fn timestamp(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March of the year 0, in whose calendar leap days come last.
    let days = days.saturating_add(719_468);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + next;
    let (hours, minutes, seconds) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}{month:02}{day:02}T{hours:02}{minutes:02}{seconds:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn moments_are_written_as_people_read_them() {
        for (seconds, expected) in [
            (0, "19700101T000000Z"),
            (951_827_696, "20000229T123456Z"),
            (1_795_373_580, "20261122T185300Z"),
            (4_107_542_400, "21000301T000000Z"),
        ] {
            assert_eq!(timestamp(seconds), expected);
        }
    }

    #[test]
    fn two_are_kept_for_us_alone() {
        let top = tempfile::tempdir().unwrap();
        let folder = top.path().join("a/dumps");
        private_folder(&folder).unwrap();
        let old = ["20200101T000000Z-1.core", "20210101T000000Z-1.core"];
        for name in old.iter().copied().chain(["20210101T000000Z-x.part"]) {
            fs::write(folder.join(name), "").unwrap();
        }
        let (path, size) = keep(&folder, |mut file| {
            file.write_all(b"memory").unwrap();
            Ok(())
        })
        .unwrap();
        assert_eq!((fs::read(&path).unwrap(), size), (b"memory".to_vec(), 6));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&path)), (0o700, 0o600));
        let newest = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(names(&folder), [old[1].to_owned(), newest]);
    }

    #[test]
    fn a_dump_that_fails_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("dumps");
        let error = keep(&folder, |_| Err(Error::new(ErrorKind::Launch, "no"))).unwrap_err();
        assert_eq!(error.to_string(), "no");
        assert!(names(&folder).is_empty());
    }

    #[test]
    fn a_folder_that_others_can_enter_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(keep(folder.path(), |_| Ok(())).is_err());
        assert!(names(folder.path()).is_empty());
    }
}
