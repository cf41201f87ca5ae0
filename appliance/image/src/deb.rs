// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernel and modules out of a Debian package, without dpkg.
//!
//! deb(5): an `ar` archive with `debian-binary`, `control.tar.*` and `data.tar.*`.

use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use crate::decompress::Compression;
use crate::error::{Context, Error, Result};

const AR_MAGIC: &[u8; 8] = b"!<arch>\n";
const AR_HEADER: usize = 60;
/// Bytes that one package may unpack to; Debian's generic kernel has 0.4 GB.
const UNPACKED_LIMIT: u64 = 8 << 30;

/// Unpacks `boot/vmlinuz-*` and `lib/modules/**` of the package `deb` below `to`, which must exist.
/// Everything else, links and odd names are passed over.
pub(crate) fn unpack(deb: &Path, to: &Path) -> Result<()> {
    let mut file = BufReader::new(File::open(deb).context("opening", deb)?);
    let (name, size) = find_data(&mut file).map_err(|e| e.in_file(deb))?;
    let member = file.take(size);
    let mut start = BufReader::with_capacity(1 << 16, member);
    let head = std::io::BufRead::fill_buf(&mut start).context("reading", deb)?;
    let kind = Compression::detect(head);
    let reader: Box<dyn Read> = match kind {
        Some(kind) => kind.reader(start).map_err(|e| e.in_file(deb))?,
        None if name == "data.tar" => Box::new(start),
        None => {
            return Err(Error::unsupported(format!("{name} has no known compression")).in_file(deb));
        }
    };
    untar(reader, to).map_err(|e| e.in_file(deb))
}

/// Goes to the start of the data member and returns its name and size.
fn find_data(file: &mut (impl Read + Seek)) -> Result<(String, u64)> {
    let read = |e| Error::io("reading the package failed", e);
    let mut magic = [0; 8];
    file.read_exact(&mut magic).map_err(read)?;
    if &magic != AR_MAGIC {
        return Err(Error::corrupt("no Debian package: ar magic is missing"));
    }
    loop {
        let mut header = [0; AR_HEADER];
        file.read_exact(&mut header)
            .map_err(|e| Error::corrupt("package ends without a data.tar member").because(e))?;
        let text = String::from_utf8_lossy(&header);
        let name = text.get(..16).unwrap_or_default().trim_end().trim_end_matches('/').to_owned();
        let size: u64 = text
            .get(48..58)
            .and_then(|size| size.trim_end().parse().ok())
            .ok_or_else(|| Error::corrupt(format!("size of ar member {name} is no number")))?;
        if name.starts_with("data.tar") {
            return Ok((name, size));
        }
        // Members start on even offsets.
        let skip = i64::try_from(size.saturating_add(size % 2))
            .map_err(|_| Error::corrupt(format!("ar member {name} has {size} bytes")))?;
        file.seek(SeekFrom::Current(skip)).map_err(read)?;
    }
}

fn untar(reader: impl Read, to: &Path) -> Result<()> {
    let broken = |e| Error::corrupt("tar archive in the package is broken").because(e);
    let mut archive = tar::Archive::new(reader);
    let mut left = UNPACKED_LIMIT;
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let name = entry.path().map_err(broken)?.into_owned();
        let Some(name) = kernel_file(&name).filter(|_| entry.header().entry_type().is_file())
        else {
            continue;
        };
        left = left.checked_sub(entry.size()).ok_or_else(|| {
            Error::corrupt(format!("package unpacks to more than {UNPACKED_LIMIT} bytes"))
        })?;
        // Only plain components (checked above) below a directory that only we write to: no entry
        // can lead out of it, since no link is ever made.
        let path = to.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).context("creating", parent)?;
        }
        let mut out = File::create_new(&path).context("creating", &path)?;
        std::io::copy(&mut entry, &mut out)
            .map_err(|e| Error::io("unpacking failed", e).in_file(&path))?;
    }
    Ok(())
}

/// Where a wanted file goes: `boot/...` or `lib/modules/...`, whatever prefix the package uses.
fn kernel_file(name: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => plain.push(part),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    let plain = plain.strip_prefix("usr").map(Path::to_owned).unwrap_or(plain);
    let file = plain.file_name()?.to_str()?;
    let kernel = plain.starts_with("boot") && file.starts_with("vmlinuz-");
    // Fedora and newer packages keep the kernel beside its modules.
    let modules = plain.starts_with("lib/modules")
        && (file.contains(".ko") || file == "vmlinuz" || file == "modules.builtin");
    (kernel || modules).then_some(plain)
}

/// The kernel image and the modules directory below `root`, after [`unpack`].
pub(crate) fn find_kernel(root: &Path) -> Result<(PathBuf, PathBuf)> {
    let nothing = |what: &str| {
        Error::new(crate::ErrorKind::NotFound, format!("the kernel packages hold no {what}"))
    };
    let names = |dir: &Path| -> Vec<PathBuf> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        names.sort();
        names
    };
    let modules = names(&root.join("lib/modules")).pop().ok_or_else(|| nothing("lib/modules"))?;
    let kernel = names(&root.join("boot"))
        .pop()
        .or_else(|| Some(modules.join("vmlinuz")).filter(|path| path.is_file()))
        .ok_or_else(|| nothing("vmlinuz"))?;
    Ok((kernel, modules))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::decompress::tests::pack;

    fn package(ending: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, data) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(u64::try_from(data.len()).unwrap());
            header.set_mode(0o644);
            // set_path refuses names that lead out, which is just what is tested here.
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            tar.append(&header, *data).unwrap();
        }
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        tar.append_link(&mut link, "lib/modules/1.0/a.ko.link", "/etc").unwrap();
        let tar = tar.into_inner().unwrap();
        let data = match ending {
            ".xz" => pack(Compression::Xz, &tar),
            ".zst" => pack(Compression::Zstd, &tar),
            ".gz" => pack(Compression::Gzip, &tar),
            _ => tar,
        };
        let mut ar = AR_MAGIC.to_vec();
        for (name, data) in [
            ("debian-binary", &b"2.0\n"[..]),
            ("control.tar.xz", b"odd"),
            (&format!("data.tar{ending}"), &data),
        ] {
            ar.extend(
                format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100_644, data.len())
                    .bytes(),
            );
            ar.extend(data);
            if data.len() % 2 == 1 {
                ar.push(b'\n');
            }
        }
        ar
    }

    fn unpacked(package: &[u8]) -> (tempfile::TempDir, Result<()>) {
        let dir = tempfile::tempdir().unwrap();
        let deb = dir.path().join("k.deb");
        fs::write(&deb, package).unwrap();
        fs::create_dir(dir.path().join("to")).unwrap();
        let result = unpack(&deb, &dir.path().join("to"));
        (dir, result)
    }

    #[test]
    fn kernel_and_modules_come_out_of_every_compression() {
        for ending in ["", ".xz", ".zst", ".gz"] {
            let (dir, result) = unpacked(&package(
                ending,
                &[
                    ("./boot/vmlinuz-1.0", b"kernel"),
                    ("./usr/lib/modules/1.0/kernel/fs/a.ko", b"module"),
                    ("./usr/lib/modules/1.0/modules.builtin", b""),
                    ("./usr/share/doc/x", b"doc"),
                ],
            ));
            result.unwrap();
            let to = dir.path().join("to");
            let (kernel, modules) = find_kernel(&to).unwrap();
            assert_eq!(fs::read(kernel).unwrap(), b"kernel");
            assert_eq!(fs::read(modules.join("kernel/fs/a.ko")).unwrap(), b"module");
            assert!(!to.join("share").exists() && !modules.join("a.ko.link").exists());
        }
    }

    #[test]
    fn no_entry_leads_out_of_the_directory() {
        let (dir, result) = unpacked(&package(
            ".gz",
            &[
                ("../lib/modules/1.0/a.ko", b"x"),
                ("lib/modules/../../../b.ko", b"x"),
                ("/lib/modules/1.0/c.ko", b"x"),
            ],
        ));
        result.unwrap();
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["k.deb", "to"]);
        assert!(dir.path().join("to/lib/modules/1.0/c.ko").is_file());
    }

    #[test]
    fn broken_packages_are_named() {
        let good = package(".xz", &[("boot/vmlinuz-1", &[7; 5000])]);
        for (data, text) in [
            (&b"rpm"[..], "reading the package failed"),
            (&[0; 100], "ar magic is missing"),
            (&good[..70], "without a data.tar member"),
            (&good[..good.len() - 80], "tar archive in the package is broken"),
        ] {
            let error = unpacked(data).1.unwrap_err();
            assert!(error.message().contains(text), "{error}");
            assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io));
        }
    }
}
