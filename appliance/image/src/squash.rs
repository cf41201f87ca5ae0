// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tools image: a squashfs whose data is stored uncompressed.
//!
//! Under emulation the guest would pay for every byte it unpacks, and on the host the page cache
//! shares an uncompressed file between all appliances. The superblock names zlib, which every
//! kernel's squashfs can mount, though no block uses it.

use std::fs::File;
use std::io::{BufWriter, Cursor, Write};
use std::path::Path;

use backhand::compression::{CompressionAction, Compressor};
use backhand::kind::Kind;
use backhand::{BackhandError, FilesystemCompressor, FilesystemWriter, NodeHeader, SuperBlock};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::tree::{Content, Node, Tree};

/// Data block size. 128 KiB is what every kernel's default read-ahead window covers in one go.
const BLOCK: u32 = 128 << 10;

/// Never compresses. The writer stores a block as it is when the result is larger than the input.
struct Stored;

impl CompressionAction for Stored {
    type Error = BackhandError;
    type Compressor = Compressor;
    type FilesystemCompressor = FilesystemCompressor;
    type SuperBlock = SuperBlock;

    fn decompress(
        &self,
        _bytes: &[u8],
        _out: &mut Vec<u8>,
        _compressor: Compressor,
    ) -> std::result::Result<(), BackhandError> {
        Err(BackhandError::InvalidCompressionOption)
    }

    fn compress(
        &self,
        bytes: &[u8],
        _options: FilesystemCompressor,
        _block_size: u32,
    ) -> std::result::Result<Vec<u8>, BackhandError> {
        Ok(vec![0; bytes.len().saturating_add(1)])
    }
}

static STORED: Stored = Stored;

/// Packs `tree` into the new file `out`. Equal trees give equal images.
pub(crate) fn write(tree: &Tree, out: &Path) -> Result<()> {
    let failed = |e: BackhandError| {
        Error::new(ErrorKind::Io, "writing the squashfs failed").because(e).in_file(out)
    };
    let mut image = FilesystemWriter::default();
    image.set_kind(Kind::new_v4(&STORED));
    image.set_block_size(BLOCK);
    image.set_time(0);
    image.set_root_mode(0o755);
    image.set_only_root_id();
    image.set_emit_compression_options(false);
    image.set_compressor(FilesystemCompressor::new(Compressor::Gzip, None).map_err(failed)?);
    let header = |mode| NodeHeader::new(mode, 0, 0, 0);
    for (path, node) in tree.iter() {
        match node {
            Node::Dir => image.push_dir(path, header(0o755)),
            Node::Link(target) => image.push_symlink(target, path, header(0o777)),
            Node::File { content, executable } => {
                let header = header(if *executable { 0o755 } else { 0o644 });
                match content {
                    Content::Host(source) => image.push_file_from_path(source, path, header),
                    Content::Bytes(bytes) => {
                        image.push_file(Cursor::new(bytes.clone()), path, header)
                    }
                }
            }
        }
        .map_err(failed)?;
    }
    let mut file = BufWriter::new(File::create_new(out).context("creating", out)?);
    image.write(&mut file).map_err(failed)?;
    file.flush().context("writing", out)?;
    file.into_inner()
        .map_err(std::io::IntoInnerError::into_error)
        .and_then(|file| file.sync_all())
        .context("writing", out)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::default();
        tree.put("bin", Node::Link("usr/bin".into())).unwrap();
        tree.put_dirs(&["proc", "usr/bin"]).unwrap();
        tree.put_text("etc/small", "small\n".into()).unwrap();
        tree.put_text("etc/empty", String::new()).unwrap();
        let large = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
        tree.put("usr/bin/large", Node::File { content: Content::Bytes(large), executable: true })
            .unwrap();
        tree
    }

    /// Compares a mounted or unpacked image with the sample.
    fn check(root: &Path) {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::read_to_string(root.join("etc/small")).unwrap(), "small\n");
        assert_eq!(fs::metadata(root.join("etc/empty")).unwrap().len(), 0);
        let large = fs::read(root.join("bin/large")).unwrap();
        assert!(large.chunks(4).zip(0..500_000_u32).all(|(raw, n)| raw == n.to_le_bytes()));
        assert_eq!(large.len(), 2_000_000);
        let mode = fs::metadata(root.join("usr/bin/large")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        assert!(root.join("proc").is_dir());
    }

    #[test]
    fn equal_trees_give_equal_images() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        write(&sample(), &a).unwrap();
        write(&sample(), &b).unwrap();
        assert!(fs::read(a).unwrap() == fs::read(b).unwrap());
    }

    #[test]
    fn unsquashfs_reads_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        write(&sample(), &image).unwrap();
        let to = dir.path().join("to");
        let Ok(run) =
            Command::new("unsquashfs").args(["-q", "-n", "-d"]).arg(&to).arg(&image).output()
        else {
            eprintln!("skipped: unsquashfs is not installed");
            return;
        };
        assert!(run.status.success(), "{run:?}");
        check(&to);
    }

    #[test]
    fn the_kernel_mounts_the_image() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        if !fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("squashfs") {
            eprintln!("skipped: this kernel has no squashfs");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        write(&sample(), &image).unwrap();
        let to = dir.path().join("to");
        fs::create_dir(&to).unwrap();
        let run = Command::new("mount")
            .args(["-t", "squashfs", "-o", "loop,ro"])
            .args([&image, &to])
            .output();
        if !run.is_ok_and(|run| run.status.success()) {
            eprintln!("skipped: loop mounts are not possible here");
            return;
        }
        let checked = std::panic::catch_unwind(|| check(&to));
        assert!(Command::new("umount").arg(&to).status().unwrap().success());
        checked.unwrap();
    }
}
