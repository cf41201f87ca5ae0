// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A writer of the `newc` cpio archives that Linux takes as initramfs.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst; every entry is a header of
//! eight-digit hexadecimal fields, the name with its NUL, and the data, each padded to 4 bytes.

use std::io::{self, Read, Write};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFBLK: u32 = 0o060_000;

/// Writes one archive. Owner is root and the time is 0 everywhere, so that equal input makes
/// equal archives.
#[derive(Debug)]
pub struct Writer<W: Write> {
    to: W,
    written: u64,
    inode: u32,
}

impl<W: Write> Writer<W> {
    /// An empty archive on `to`, which is written in small pieces: give a buffered one.
    pub fn new(to: W) -> Self {
        Self { to, written: 0, inode: 0 }
    }

    /// Adds a directory with the permission bits `mode`. Parents must have been added before.
    pub fn dir(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.header(name, S_IFDIR | mode, 0, (0, 0))
    }

    /// Adds a regular file of exactly `size` bytes.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if `content` ends early, goes on, or is larger than the format's 4 GiB.
    pub fn file(
        &mut self,
        name: &str,
        mode: u32,
        size: u64,
        content: &mut dyn Read,
    ) -> io::Result<()> {
        let small = u32::try_from(size).map_err(|_| invalid(format!("{name} has {size} bytes")))?;
        self.header(name, S_IFREG | mode, small, (0, 0))?;
        let copied = io::copy(&mut Read::take(&mut *content, size), &mut self.to)?;
        self.written += copied;
        if copied != size || content.read(&mut [0])? != 0 {
            return Err(invalid(format!("{name} changed while it was read")));
        }
        self.pad()
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        let size = u32::try_from(target.len()).map_err(|_| invalid("link too long".into()))?;
        self.header(name, S_IFLNK | 0o777, size, (0, 0))?;
        self.bytes(target.as_bytes())?;
        self.pad()
    }

    /// Adds a character device node with permission bits `mode`.
    pub fn char_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.header(name, S_IFCHR | mode, 0, (major, minor))
    }

    /// Adds a block device node with permission bits `mode`.
    pub fn block_device(
        &mut self,
        name: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> io::Result<()> {
        self.header(name, S_IFBLK | mode, 0, (major, minor))
    }

    /// Ends the archive and gives the destination back.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = u32::MAX;
        self.header("TRAILER!!!", 0, 0, (0, 0))?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn header(&mut self, name: &str, mode: u32, size: u32, device: (u32, u32)) -> io::Result<()> {
        let name = name.trim_start_matches('/');
        if name.is_empty() || name.contains('\0') {
            return Err(invalid(format!("{name:?} is no name for an archive entry")));
        }
        // The trailer has inode 0; every other entry its own, with one link, so that the kernel
        // never takes two entries for hard links of each other.
        self.inode = self.inode.wrapping_add(1);
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let name_size = name.len() + 1;
        let (major, minor) = device;
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}{minor:08x}{name_size:08x}{:08x}",
            self.inode, 0, 0, 0, 0, 0, 0
        );
        self.bytes(header.as_bytes())?;
        self.bytes(name.as_bytes())?;
        self.bytes(&[0])?;
        self.pad()
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.written += u64::try_from(bytes.len()).unwrap_or(0);
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        while !self.written.is_multiple_of(4) {
            self.bytes(&[0])?;
        }
        Ok(())
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Writer::new(Vec::new());
        archive.dir("dev", 0o755).unwrap();
        archive.char_device("dev/null", 0o666, 1, 3).unwrap();
        archive.block_device("dev/vda", 0o600, 254, 0).unwrap();
        for size in 0..6_usize {
            let data = vec![b'x'; size];
            archive.file(&format!("f{size}"), 0o644, 0, &mut io::empty()).unwrap();
            archive
                .file(&format!("g{size}"), 0o755, u64::try_from(size).unwrap(), &mut &data[..])
                .unwrap();
        }
        archive.symlink("bin", "usr/bin").unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn cpio_lists_what_was_written() {
        let Ok(mut child) = Command::new("cpio")
            .args(["-itv", "--quiet", "--numeric-uid-gid"])
            .env("TZ", "UTC")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            eprintln!("skipped: cpio is not installed");
            return;
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 16, "{text}");
        assert!(lines[0].starts_with("drwxr-xr-x"));
        assert!(lines[1].starts_with("crw-rw-rw-") && lines[1].contains("1,   3"));
        assert!(lines[2].starts_with("brw-------") && lines[2].contains("254,   0"));
        assert!(lines[14].starts_with("-rwxr-xr-x") && lines[14].ends_with("g5"));
        assert!(lines[15].ends_with("bin -> usr/bin"));
    }

    #[test]
    fn entries_start_on_four_bytes_and_the_trailer_is_last() {
        let archive = sample();
        assert_eq!(archive.len() % 4, 0);
        for (at, window) in archive.windows(6).enumerate() {
            assert!(window != b"070701" || at % 4 == 0);
        }
        assert!(archive.ends_with(b"TRAILER!!!\0\0\0\0"));
    }

    #[test]
    fn a_file_of_another_size_is_an_error() {
        for wrong in [2, 4] {
            let mut archive = Writer::new(Vec::new());
            let error = archive.file("f", 0o644, wrong, &mut &b"abc"[..]).unwrap_err();
            assert_eq!(error.to_string(), "f changed while it was read");
        }
    }
}
