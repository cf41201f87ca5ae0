// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a filesystem is told about the file of a new image, which it takes only while the
//! file is empty.

use crate::failure::Failure;
use crate::image::console::Console;
use crate::image::options::Options;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Setter, ioctl, opcode};
use std::fs::File;
use std::path::Path;

/// `struct fsxattr` of linux/fs.h.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// `FS_XFLAG_EXTSIZE`: the file has an extent size of its own.
const HAS_EXTENT_SIZE: u32 = 0x800;
/// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR`.
const GET: rustix::ioctl::Opcode = opcode::read::<Attributes>(b'X', 31);
const SET: rustix::ioctl::Opcode = opcode::write::<Attributes>(b'X', 32);

/// What a filesystem is to know about a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hints {
    in_place: bool,
    /// Bytes; zero leaves it to the filesystem.
    extent_size: u32,
}

impl Hints {
    /// What the options `nocow` and `extent_size_hint` say.
    pub(super) fn of(options: &Options) -> Result<Self, Failure> {
        let hint = options.number("extent_size_hint").unwrap_or(0);
        let extent_size = u32::try_from(hint)
            .map_err(|_| Failure::usage("Extent size hint is too large: it has to be below 4G"))?;
        Ok(Self { in_place: options.switch("nocow") == Some(true), extent_size })
    }

    /// Tells the filesystem of `file`, which is empty. One that cannot do it is no failure,
    /// but worth a word.
    pub(super) fn tell(self, file: &File, console: Console) {
        if self.in_place {
            let set =
                ioctl_getflags(file).and_then(|flags| ioctl_setflags(file, flags | IFlags::NOCOW));
            if let Err(error) = set {
                console.warn(&format!("nocow has no effect on this filesystem: {error}"));
            }
        }
        if self.extent_size > 0
            && let Err(error) = allocate_in(file, self.extent_size)
        {
            console.warn(&format!("Failed to set extent size hint: {error}"));
        }
    }
}

/// Makes the file `path` empty if its filesystem is to be told something about it.
pub(super) fn prepare(path: &Path, options: &Options, console: Console) -> Result<(), Failure> {
    let hints = Hints::of(options)?;
    let is_other = std::fs::metadata(path).is_ok_and(|facts| !facts.is_file());
    if is_other || hints == (Hints { in_place: false, extent_size: 0 }) {
        return Ok(());
    }
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .map_err(|error| Failure::usage("Could not create the image").because(&error))?;
    hints.tell(&file, console);
    Ok(())
}

/// Has the filesystem allocate `extent_size` bytes at a time.
fn allocate_in(file: &File, extent_size: u32) -> Result<(), Errno> {
    let found = attributes(file)?;
    let wanted = Attributes { flags: found.flags | HAS_EXTENT_SIZE, extent_size, ..found };
    // SAFETY: FS_IOC_FSSETXATTR reads a `struct fsxattr`, which `Attributes` is: the same
    // fields in C's order and 28 bytes. The kernel keeps no pointer to it.
    unsafe { ioctl(file, Setter::<SET, Attributes>::new(wanted)) }?;
    // ext4 takes it and forgets it.
    if attributes(file)?.extent_size == extent_size { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}

fn attributes(file: &File) -> Result<Attributes, Errno> {
    // SAFETY: FS_IOC_FSGETXATTR fills a `struct fsxattr`, which `Attributes` is, and for
    // which any bytes are values.
    unsafe { ioctl(file, Getter::<GET, Attributes>::new()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_numbers_are_those_of_its_header() {
        assert_eq!(size_of::<Attributes>(), 28);
        assert_eq!((GET, SET), (0x801c_581f, 0x401c_5820));
    }

    #[test]
    fn a_filesystem_takes_an_extent_size_or_says_why_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create_new(folder.path().join("disk")).unwrap();
        match allocate_in(&file, 1 << 20) {
            Ok(()) => assert_eq!(attributes(&file).unwrap().extent_size, 1 << 20),
            Err(error) => {
                let known = [Errno::OPNOTSUPP, Errno::NOTTY, Errno::INVAL, Errno::PERM];
                assert!(known.contains(&error), "{error}");
            }
        }
    }
}
