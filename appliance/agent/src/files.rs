// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files of the guest. Every path is resolved by the kernel with the guest's tree as its
//! root (openat2, RESOLVE_IN_ROOT), so that no link and no `..` leads out of it.

use crate::failure::{Result, io, plain, system};
use crate::programs::check_guest_is_mounted;
use crate::tools::GUEST_ROOT;
use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, XattrFlags, fchmod, fchown, fstat,
    openat2,
};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use tranship_protocol::{Attributes, FileKind, GuestPath, Name, NewFile, Space};

/// Bytes that one extended attribute may have, as in the kernel.
const XATTR_MAX: usize = 65536;

fn root() -> Result<OwnedFd> {
    check_guest_is_mounted()?;
    rustix::fs::open(GUEST_ROOT, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| system(GUEST_ROOT, error))
}

fn open_with(
    path: &GuestPath,
    flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
) -> std::result::Result<OwnedFd, OpenError> {
    let root = root().map_err(OpenError::Unmounted)?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | resolve;
    loop {
        match openat2(&root, path.as_bytes(), flags | OFlags::CLOEXEC, mode, resolve) {
            Ok(file) => return Ok(file),
            // The kernel asks to try again after a rename somewhere on the path.
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(OpenError::System(error)),
        }
    }
}

enum OpenError {
    Unmounted(tranship_protocol::Failure),
    System(Errno),
}

impl OpenError {
    fn on(self, path: &GuestPath) -> tranship_protocol::Failure {
        match self {
            Self::Unmounted(failure) => failure,
            Self::System(error) => system(path, error),
        }
    }
}

/// Opens an existing name of the guest, following links.
pub(crate) fn open(path: &GuestPath, flags: OFlags) -> Result<OwnedFd> {
    open_with(path, flags, Mode::empty(), ResolveFlags::empty()).map_err(|error| error.on(path))
}

fn kind_of(stat: &Stat) -> FileKind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Link,
        FileType::BlockDevice => FileKind::Block,
        FileType::CharacterDevice => FileKind::Character,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        _ => FileKind::File,
    }
}

fn attributes_of(stat: &Stat) -> Attributes {
    Attributes {
        kind: kind_of(stat),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        links: stat.st_nlink,
        device: stat.st_dev,
        inode: stat.st_ino,
        modified: stat.st_mtime,
    }
}

/// Attributes of a name; `follow` says whether a final link is followed.
pub(crate) fn attributes(path: &GuestPath, follow: bool) -> Result<Option<Attributes>> {
    let flags = if follow { OFlags::PATH } else { OFlags::PATH | OFlags::NOFOLLOW };
    let file = match open_with(path, flags, Mode::empty(), ResolveFlags::empty()) {
        Ok(file) => file,
        Err(OpenError::System(Errno::NOENT | Errno::NOTDIR)) => return Ok(None),
        Err(error) => return Err(error.on(path)),
    };
    fstat(&file).map(|stat| Some(attributes_of(&stat))).map_err(|error| system(path, error))
}

/// What a link says.
pub(crate) fn read_link(path: &GuestPath) -> Result<Vec<u8>> {
    let link = open(path, OFlags::PATH | OFlags::NOFOLLOW)?;
    rustix::fs::readlinkat(&link, c"", Vec::new()).map(std::ffi::CString::into_bytes).map_err(
        |error| match error {
            Errno::NOENT => system(path, Errno::INVAL),
            other => system(path, other),
        },
    )
}

/// The names in a directory, sorted.
pub(crate) fn read_dir(path: &GuestPath) -> Result<Vec<Name>> {
    let directory = open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let mut names = Vec::new();
    let entries = rustix::fs::Dir::new(directory).map_err(|error| system(path, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| system(path, error))?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Directory => FileKind::Directory,
            FileType::Symlink => FileKind::Link,
            FileType::BlockDevice => FileKind::Block,
            FileType::CharacterDevice => FileKind::Character,
            FileType::Fifo => FileKind::Fifo,
            FileType::Socket => FileKind::Socket,
            FileType::RegularFile => FileKind::File,
            // Some filesystems do not tell in the directory.
            FileType::Unknown => {
                attributes(&path.join(name), false)?.map_or(FileKind::File, |found| found.kind)
            }
        };
        names.push(Name { name: name.to_vec(), kind });
    }
    names.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(names)
}

/// Opens a regular file for reading; anything else is refused before it is opened.
pub(crate) fn open_regular(path: &GuestPath) -> Result<File> {
    let file = open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
    let stat = fstat(&file).map_err(|error| system(path, error))?;
    match kind_of(&stat) {
        FileKind::File => Ok(File::from(file)),
        FileKind::Directory => Err(system(path, Errno::ISDIR)),
        _ => Err(plain(format!("{path}: not a regular file"))),
    }
}

/// Free space where `path` lies.
pub(crate) fn space(path: &GuestPath) -> Result<Space> {
    let file = open(path, OFlags::PATH)?;
    let found = rustix::fs::fstatvfs(&file).map_err(|error| system(path, error))?;
    Ok(Space {
        size: found.f_blocks.saturating_mul(found.f_frsize),
        free: found.f_bfree.saturating_mul(found.f_frsize),
        inodes: found.f_files,
        free_inodes: found.f_ffree,
        read_only: found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY),
    })
}

/// A directory of the guest, opened, and a name in it.
struct Place {
    directory: OwnedFd,
    name: Vec<u8>,
}

impl Place {
    /// The place of `path` itself, links followed in its directory only.
    fn of(path: &GuestPath) -> Result<Self> {
        let name = path.file_name().to_vec();
        if name.is_empty() || name == b"." || name == b".." {
            return Err(system(path, Errno::INVAL));
        }
        let directory = open(&path.parent(), OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(Self { directory, name })
    }

    /// Where the file that `file` was opened from really lies.
    fn of_open(file: &OwnedFd, path: &GuestPath) -> Result<Self> {
        let real = real_path(file).map_err(|error| io(path, &error))?;
        let inside = real
            .strip_prefix(GUEST_ROOT)
            .map_err(|_| plain(format!("{path}: has moved out of the guest")))?;
        Self::of(&GuestPath::of(inside.as_os_str().as_bytes()))
    }

    /// The name beside this one under which new contents are prepared.
    fn temporary(&self, path: &GuestPath) -> Result<Self> {
        let mut name = b".tranship-new-".to_vec();
        name.extend_from_slice(&self.name);
        // File names have at most 255 bytes.
        name.truncate(255);
        let directory = rustix::io::fcntl_dupfd_cloexec(&self.directory, 3)
            .map_err(|error| system(path, error))?;
        Ok(Self { directory, name })
    }

    fn create(&self, path: &GuestPath, new: NewFile) -> Result<File> {
        let _ = rustix::fs::unlinkat(&self.directory, self.name.as_slice(), AtFlags::empty());
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(
            &self.directory,
            self.name.as_slice(),
            flags,
            Mode::from_raw_mode(0o600),
        )
        .map_err(|error| system(path, error))?;
        set_owner(&file, new).map_err(|error| system(path, error))?;
        Ok(File::from(file))
    }

    fn rename_to(&self, to: &Self, path: &GuestPath) -> Result<()> {
        rustix::fs::renameat(
            &self.directory,
            self.name.as_slice(),
            &to.directory,
            to.name.as_slice(),
        )
        .map_err(|error| system(path, error))
    }

    fn remove(&self) {
        let _ = rustix::fs::unlinkat(&self.directory, self.name.as_slice(), AtFlags::empty());
    }
}

fn real_path(file: &OwnedFd) -> std::io::Result<PathBuf> {
    use rustix::fd::AsRawFd;
    std::fs::read_link(Path::new("/proc/self/fd").join(file.as_raw_fd().to_string()))
}

fn set_owner(file: &OwnedFd, new: NewFile) -> rustix::io::Result<()> {
    // Filesystems without owners (FAT) refuse; the mode is what they make of it.
    let (uid, gid) =
        (rustix::process::Uid::from_raw(new.uid), rustix::process::Gid::from_raw(new.gid));
    match fchown(file, Some(uid), Some(gid)) {
        Ok(()) | Err(Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    match fchmod(file, Mode::from_raw_mode(new.mode)) {
        Ok(()) | Err(Errno::PERM) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Gives `to` the extended attributes of `from`: security labels, capabilities, ACLs.
fn copy_xattrs(from: &File, to: &File, path: &GuestPath) -> Result<()> {
    let mut list = vec![0; XATTR_MAX];
    let length = match rustix::fs::flistxattr(from, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(error) => return Err(system(path, error)),
    };
    let mut value = vec![0; XATTR_MAX];
    for name in list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let length = rustix::fs::fgetxattr(from, name, &mut value[..])
            .map_err(|error| system(path, error))?;
        rustix::fs::fsetxattr(to, name, &value[..length], XattrFlags::empty())
            .map_err(|error| system(path, error))?;
    }
    Ok(())
}

fn owner_of(stat: &Stat) -> NewFile {
    NewFile { mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid }
}

/// A file that is being written and takes its place when it is complete.
pub(crate) struct Replacement {
    path: GuestPath,
    temporary: Place,
    place: Place,
    file: File,
    done: bool,
    /// Set if the file has several names: then it is rewritten where it is.
    in_place: Option<File>,
}

/// Begins to replace the file `path`, or to make it.
pub(crate) fn replace(path: &GuestPath, new: NewFile, parents: bool) -> Result<Replacement> {
    if parents {
        make_dirs(&path.parent(), 0o755)?;
    }
    let old = match open_with(
        path,
        OFlags::RDWR | OFlags::NONBLOCK,
        Mode::empty(),
        ResolveFlags::empty(),
    ) {
        Ok(file) => Some(file),
        Err(OpenError::System(Errno::NOENT)) => None,
        Err(error) => return Err(error.on(path)),
    };
    let Some(old) = old else {
        let place = Place::of(path)?;
        let temporary = place.temporary(path)?;
        let file = temporary.create(path, new)?;
        return Ok(Replacement {
            path: path.clone(),
            temporary,
            place,
            file,
            done: false,
            in_place: None,
        });
    };
    let stat = fstat(&old).map_err(|error| system(path, error))?;
    if kind_of(&stat) != FileKind::File {
        return Err(plain(format!("{path}: not a regular file")));
    }
    let place = Place::of_open(&old, path)?;
    let temporary = place.temporary(path)?;
    let file = temporary.create(path, owner_of(&stat))?;
    let old = File::from(old);
    copy_xattrs(&old, &file, path)?;
    let in_place = (stat.st_nlink > 1).then_some(old);
    Ok(Replacement { path: path.clone(), temporary, place, file, done: false, in_place })
}

impl Replacement {
    /// Adds bytes to the new contents.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| io(&self.path, &error))
    }

    /// Puts the new contents in the file's place.
    pub(crate) fn finish(mut self) -> Result<()> {
        let failed = |error: std::io::Error| io(&self.path, &error);
        if let Some(mut target) = self.in_place.take() {
            self.file.seek(SeekFrom::Start(0)).map_err(failed)?;
            target.set_len(0).map_err(failed)?;
            std::io::copy(&mut self.file, &mut target).map_err(failed)?;
            return target.sync_all().map_err(failed);
        }
        self.file.sync_all().map_err(failed)?;
        self.temporary.rename_to(&self.place, &self.path)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.done {
            self.temporary.remove();
        }
    }
}

/// Copies the whole of `from` into `to`, inside the kernel where it can.
fn copy_contents(from: &mut File, to: &mut File, path: &GuestPath) -> Result<u64> {
    std::io::copy(from, to).map_err(|error| io(path, &error))
}

/// A file to which bytes are appended.
pub(crate) struct Appending {
    replacement: Option<(Place, Place)>,
    backup: Option<GuestPath>,
    path: GuestPath,
    file: File,
    /// Where the appended bytes begin.
    pub(crate) offset: u64,
}

/// Begins to append to `path`: on a copy if the original is to stay as `backup`, else in
/// place, where cutting the file at the returned offset undoes it.
pub(crate) fn append(
    path: &GuestPath,
    align: u64,
    backup: Option<&GuestPath>,
) -> Result<Appending> {
    let old = open(path, OFlags::RDWR | OFlags::NONBLOCK)?;
    let stat = fstat(&old).map_err(|error| system(path, error))?;
    if kind_of(&stat) != FileKind::File {
        return Err(plain(format!("{path}: not a regular file")));
    }
    let place = Place::of_open(&old, path)?;
    let mut old = File::from(old);
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let offset = size
        .checked_next_multiple_of(align.max(1))
        .ok_or_else(|| plain(format!("{path}: size overflows")))?;
    let (mut file, replacement) = if backup.is_some() {
        let temporary = place.temporary(path)?;
        let mut copy = temporary.create(path, owner_of(&stat))?;
        copy_xattrs(&old, &copy, path)?;
        copy_contents(&mut old, &mut copy, path)?;
        (copy, Some((temporary, place)))
    } else {
        (old, None)
    };
    let failed = |error: std::io::Error| io(path, &error);
    file.set_len(offset).map_err(failed)?;
    file.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok(Appending { replacement, backup: backup.cloned(), path: path.clone(), file, offset })
}

impl Appending {
    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| io(&self.path, &error))
    }

    /// Makes the result visible; returns the offset where the appended bytes begin.
    pub(crate) fn finish(self) -> Result<u64> {
        self.file.sync_all().map_err(|error| io(&self.path, &error))?;
        if let Some((temporary, place)) = &self.replacement {
            if let Some(backup) = &self.backup {
                let keep = Place::of(backup)?;
                keep.remove();
                // A second name costs no space; filesystems without links get a rename,
                // which leaves a moment without the file.
                let linked = rustix::fs::linkat(
                    &place.directory,
                    place.name.as_slice(),
                    &keep.directory,
                    keep.name.as_slice(),
                    AtFlags::empty(),
                );
                if linked.is_err() {
                    place.rename_to(&keep, backup)?;
                }
            }
            temporary.rename_to(place, &self.path)?;
        }
        Ok(self.offset)
    }
}

/// Makes a directory and its parents.
pub(crate) fn make_dirs(path: &GuestPath, mode: u32) -> Result<()> {
    if let Some(found) = attributes(path, true)? {
        return match found.kind {
            FileKind::Directory => Ok(()),
            _ => Err(system(path, Errno::NOTDIR)),
        };
    }
    make_dirs(&path.parent(), mode)?;
    let place = Place::of(path)?;
    let outcome =
        rustix::fs::mkdirat(&place.directory, place.name.as_slice(), Mode::from_raw_mode(mode));
    match outcome {
        // The agent's umask must not narrow what was asked for.
        Ok(()) => rustix::fs::chmodat(
            &place.directory,
            place.name.as_slice(),
            Mode::from_raw_mode(mode),
            AtFlags::empty(),
        )
        .or_else(|error| if error == Errno::PERM { Ok(()) } else { Err(error) })
        .map_err(|error| system(path, error)),
        Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(system(path, error)),
    }
}

/// Makes a symbolic link, replacing a file or link of that name.
pub(crate) fn symlink(path: &GuestPath, target: &[u8]) -> Result<()> {
    let place = Place::of(path)?;
    let temporary = place.temporary(path)?;
    temporary.remove();
    rustix::fs::symlinkat(target, &temporary.directory, temporary.name.as_slice())
        .map_err(|error| system(path, error))?;
    temporary.rename_to(&place, path).inspect_err(|_| temporary.remove())
}

/// Copies a regular file with its attributes.
pub(crate) fn copy(from: &GuestPath, to: &GuestPath) -> Result<()> {
    let mut source = open_regular(from)?;
    let stat = fstat(&source).map_err(|error| system(from, error))?;
    let place = Place::of(to)?;
    let temporary = place.temporary(to)?;
    let mut target = temporary.create(to, owner_of(&stat))?;
    copy_contents(&mut source, &mut target, to)
        .and_then(|_| copy_xattrs(&source, &target, to))
        .and_then(|()| target.sync_all().map_err(|error| io(to, &error)))
        .and_then(|()| temporary.rename_to(&place, to))
        .inspect_err(|_| temporary.remove())
}

/// Removes a file or link.
pub(crate) fn remove(path: &GuestPath) -> Result<()> {
    let place = match attributes(&path.parent(), true)? {
        Some(_) => Place::of(path)?,
        None => return Ok(()),
    };
    match rustix::fs::unlinkat(&place.directory, place.name.as_slice(), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(system(path, error)),
    }
}

/// The appliance's path of a guest's directory, free of links, to mount something on.
pub(crate) fn directory_for_mount(path: &GuestPath) -> Result<String> {
    let directory = open(path, OFlags::PATH | OFlags::DIRECTORY)?;
    let real = real_path(&directory).map_err(|error| io(path, &error))?;
    real.into_os_string()
        .into_string()
        .map_err(|_| plain(format!("{path}: mountpoints must have names in UTF-8")))
}

/// Reads up to `buffer.len()` bytes; 0 at the end.
pub(crate) fn read_some(file: &mut File, buffer: &mut [u8], path: &GuestPath) -> Result<usize> {
    loop {
        match file.read(buffer) {
            Ok(count) => return Ok(count),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io(path, &error)),
        }
    }
}

/// Whether a guest's directory exists as a directory and not as a link, in the appliance's
/// eyes: what programs of the guest get /dev, /proc and /sys mounted on.
pub(crate) fn is_plain_directory(name: &str) -> bool {
    rustix::fs::statat(CWD, format!("{GUEST_ROOT}/{name}"), AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| kind_of(&stat) == FileKind::Directory)
}
