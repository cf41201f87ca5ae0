// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a program of the host needs to run: its libraries and its loader, found as ld.so does.
//!
//! Search order as in ld.so(8): the run path of the object and of those that loaded it, the cache,
//! the default directories. There is no `LD_LIBRARY_PATH`, since the appliance has none.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use object::Endianness;
use object::elf;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::ldcache;
use crate::tree::{Content, Node, Tree};
use crate::wanted::OPENED_AT_RUN_TIME;

/// Largest program or library that is accepted, in bytes.
const FILE_LIMIT: u64 = 512 << 20;
/// Directories that ld.so looks into without being told, with those of Debian's multiarch.
const DEFAULT_DIRS: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];
/// Links that a path may lead through, as in the kernel.
const LINK_LIMIT: usize = 40;

/// What an ELF file says about its loading.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Loading {
    interpreter: Option<PathBuf>,
    needed: Vec<String>,
    rpath: Vec<String>,
    runpath: Vec<String>,
}

/// Finds libraries of this host; remembers what it has read.
#[derive(Debug)]
pub(crate) struct Finder {
    cache: BTreeMap<String, Vec<PathBuf>>,
    read: BTreeMap<PathBuf, Option<Rc<Loading>>>,
}

impl Finder {
    /// A finder with the host's `/etc/ld.so.cache`, if there is one.
    pub(crate) fn new() -> Self {
        let cache =
            fs::read("/etc/ld.so.cache").map(|data| ldcache::parse(&data)).unwrap_or_default();
        Self { cache, read: BTreeMap::new() }
    }

    /// The paths by which `program` reaches everything it needs, itself first.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if it is no x86-64 ELF file, [`ErrorKind::NotFound`] if a
    /// library is missing.
    pub(crate) fn closure(&mut self, program: &Path) -> Result<Vec<PathBuf>> {
        let mut found = vec![program.to_owned()];
        let mut seen = BTreeSet::new();
        let mut queue = VecDeque::from([(program.to_owned(), Vec::<PathBuf>::new())]);
        while let Some((path, inherited)) = queue.pop_front() {
            let loading = self
                .loading(&path)?
                .ok_or_else(|| Error::unsupported("not an x86-64 ELF file").in_file(&path))?;
            if let Some(interpreter) = &loading.interpreter
                && seen.insert(interpreter.display().to_string())
            {
                found.push(interpreter.clone());
            }
            let origin = fs::canonicalize(&path).context("resolving", &path)?;
            let origin = origin.parent().unwrap_or(Path::new("/"));
            let dirs = |list: &[String]| -> Vec<PathBuf> {
                list.iter()
                    .map(|dir| dir.replace("${ORIGIN}", "$ORIGIN"))
                    .map(|dir| PathBuf::from(dir.replace("$ORIGIN", &origin.to_string_lossy())))
                    .filter(|dir| dir.is_absolute())
                    .collect()
            };
            // DT_RPATH goes down to the libraries of libraries and is ignored beside DT_RUNPATH.
            let mut chain =
                if loading.runpath.is_empty() { dirs(&loading.rpath) } else { Vec::new() };
            chain.extend(inherited);
            let mut search = if loading.runpath.is_empty() { chain.clone() } else { Vec::new() };
            search.extend(dirs(&loading.runpath));
            for name in &loading.needed {
                if !seen.insert(name.clone()) {
                    continue;
                }
                let library = self.library(name, &search)?.ok_or_else(|| {
                    Error::new(ErrorKind::NotFound, format!("library {name} is not found"))
                        .in_file(&path)
                })?;
                for extra in OPENED_AT_RUN_TIME.iter().filter(|(by, _)| by == name) {
                    if let Some(extra) = self.library(extra.1, &search)?
                        && seen.insert(extra.display().to_string())
                    {
                        found.push(extra.clone());
                        queue.push_back((extra, Vec::new()));
                    }
                }
                found.push(library.clone());
                queue.push_back((library, chain.clone()));
            }
        }
        Ok(found)
    }

    /// The file that ld.so would load for `name`.
    fn library(&mut self, name: &str, search: &[PathBuf]) -> Result<Option<PathBuf>> {
        let candidates: Vec<PathBuf> = if name.starts_with('/') {
            vec![PathBuf::from(name)]
        } else {
            let cached = self.cache.get(name).cloned().unwrap_or_default();
            search
                .iter()
                .map(|dir| dir.join(name))
                .chain(cached)
                .chain(DEFAULT_DIRS.iter().map(|dir| Path::new(dir).join(name)))
                .collect()
        };
        for candidate in candidates {
            // A library of another machine or class is passed over, as ld.so does.
            if candidate.is_file() && self.loading(&candidate)?.is_some() {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }

    fn loading(&mut self, path: &Path) -> Result<Option<Rc<Loading>>> {
        if let Some(known) = self.read.get(path) {
            return Ok(known.clone());
        }
        let size = fs::metadata(path).context("looking at", path)?.len();
        if size > FILE_LIMIT {
            return Err(Error::unsupported(format!("program of {size} bytes")).in_file(path));
        }
        let data = fs::read(path).context("reading", path)?;
        let loading = parse(&data).map_err(|e| e.in_file(path))?.map(Rc::new);
        self.read.insert(path.to_owned(), loading.clone());
        Ok(loading)
    }
}

/// Whether the file runs without a loader, that is, brings everything with it.
pub(crate) fn is_elf(data: &[u8]) -> bool {
    data.starts_with(b"\x7fELF")
}

/// `None` if it is no little-endian x86-64 ELF file.
fn parse(data: &[u8]) -> Result<Option<Loading>> {
    if !is_elf(data) {
        return Ok(None);
    }
    let Ok(header) = elf::FileHeader64::<Endianness>::parse(data) else {
        return Ok(None);
    };
    let Ok(endian) = header.endian() else {
        return Ok(None);
    };
    if header.e_machine(endian) != elf::EM_X86_64 {
        return Ok(None);
    }
    let broken = |e: object::read::Error| Error::corrupt("ELF file is broken").because(e);
    let segments = header.program_headers(endian, data).map_err(broken)?;
    let mut loading = Loading::default();
    for segment in segments {
        if let Some(path) = segment.interpreter(endian, data).map_err(broken)? {
            loading.interpreter = Some(PathBuf::from(OsString::from_vec(path.to_vec())));
        }
        let Some(entries) = segment.dynamic(endian, data).map_err(broken)? else {
            continue;
        };
        let value = |tag: elf::DynamicTag| {
            entries.iter().find(|entry| entry.tag(endian) == tag).map(|entry| entry.val(endian))
        };
        let (Some(at), Some(size)) = (value(elf::DT_STRTAB), value(elf::DT_STRSZ)) else {
            continue;
        };
        // DT_STRTAB is an address: the load segment around it says where in the file it is.
        let strings = segments
            .iter()
            .filter(|load| load.p_type(endian) == elf::PT_LOAD)
            .find_map(|load| load.data_range(endian, data, at, size).ok().flatten())
            .ok_or_else(|| {
                Error::corrupt(format!("dynamic strings at {at:#x} are not in the file"))
            })?;
        let string = |offset: u64| -> Result<String> {
            usize::try_from(offset)
                .ok()
                .and_then(|offset| strings.get(offset..))
                .and_then(|tail| tail.split(|&b| b == 0).next())
                .and_then(|name| std::str::from_utf8(name).ok())
                .map(str::to_owned)
                .ok_or_else(|| Error::corrupt(format!("dynamic string at {offset:#x} is no text")))
        };
        let paths = |list: String| list.split(':').map(str::to_owned).collect::<Vec<_>>();
        for entry in entries {
            let offset = entry.val(endian);
            match entry.tag(endian) {
                elf::DT_NULL => break,
                elf::DT_NEEDED => loading.needed.push(string(offset)?),
                elf::DT_RPATH => loading.rpath.extend(paths(string(offset)?)),
                elf::DT_RUNPATH => loading.runpath.extend(paths(string(offset)?)),
                _ => {}
            }
        }
    }
    Ok(Some(loading))
}

/// Puts the host's file at `path` into the tree with every link on the way to it, so that the same
/// path leads to the same file inside. Returns the path without links.
pub(crate) fn put_host_path(tree: &mut Tree, path: &Path) -> Result<PathBuf> {
    let mut ahead: VecDeque<OsString> = path
        .components()
        .filter(|part| *part != Component::RootDir)
        .map(|part| part.as_os_str().to_owned())
        .collect();
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = ahead.pop_front() {
        if part == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&part);
        let kind = fs::symlink_metadata(&next).context("looking at", &next)?;
        if !kind.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > LINK_LIMIT {
            return Err(Error::corrupt("too many symbolic links").in_file(path));
        }
        let target = fs::read_link(&next).context("reading the link", &next)?;
        tree.put(&next, Node::Link(relative(&target, &at)))?;
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        for part in target.components().rev() {
            if matches!(part, Component::Normal(_) | Component::ParentDir) {
                ahead.push_front(part.as_os_str().to_owned());
            }
        }
    }
    let kind = fs::metadata(&at).context("looking at", &at)?;
    let executable = std::os::unix::fs::PermissionsExt::mode(&kind.permissions()) & 0o111 != 0;
    let node = if kind.is_dir() {
        Node::Dir
    } else {
        Node::File { content: Content::Host(at.clone()), executable }
    };
    tree.put(&at, node)?;
    Ok(at)
}

/// `target` as seen from the directory `from`: works before the agent has made the image its root.
fn relative(target: &Path, from: &Path) -> PathBuf {
    let Ok(inside) = target.strip_prefix("/") else {
        return target.to_owned();
    };
    let ups = from.components().filter(|part| *part != Component::RootDir).map(|_| "..");
    let path: PathBuf = ups.collect();
    path.join(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_program_brings_its_loader_and_libraries() {
        let Ok(shell) = fs::canonicalize("/bin/sh") else {
            eprintln!("skipped: no /bin/sh here");
            return;
        };
        let mut finder = Finder::new();
        let found = finder.closure(&shell).unwrap();
        assert_eq!(found.first(), Some(&shell));
        let names: Vec<_> =
            found.iter().map(|p| p.file_name().unwrap().to_string_lossy().into_owned()).collect();
        assert!(names.iter().any(|n| n.starts_with("ld-")), "{names:?}");
        assert!(names.iter().any(|n| n.starts_with("libc.")), "{names:?}");
        let mut tree = Tree::default();
        for path in &found {
            let real = put_host_path(&mut tree, path).unwrap();
            assert_eq!(real, fs::canonicalize(path).unwrap());
        }
        // Each path that was used leads to a file inside as well, whatever is merged on the host.
        let out = tempfile::tempdir().unwrap();
        for (path, node) in tree.iter() {
            let to = out.path().join(path);
            match node {
                Node::Dir => fs::create_dir(to).unwrap(),
                Node::Link(target) => std::os::unix::fs::symlink(target, to).unwrap(),
                Node::File { .. } => fs::write(to, "x").unwrap(),
            }
        }
        for path in &found {
            assert!(out.path().join(path.strip_prefix("/").unwrap()).is_file(), "{path:?}");
        }
    }

    #[test]
    fn a_script_and_a_foreign_machine_are_no_programs() {
        assert_eq!(parse(b"#!/bin/sh\n").unwrap(), None);
        let mut arm = fs::read("/proc/self/exe").unwrap();
        arm[18] = 183;
        assert_eq!(parse(&arm).unwrap(), None);
    }

    #[test]
    fn cut_programs_do_not_panic() {
        let program = fs::read("/proc/self/exe").unwrap();
        for cut in [4, 20, 63, 64, 100, 500, 700, 5000] {
            let _ = parse(&program[..cut]);
        }
    }

    #[test]
    fn absolute_links_become_relative() {
        assert_eq!(
            relative(Path::new("/usr/bin/x"), Path::new("/usr/sbin")),
            Path::new("../../usr/bin/x")
        );
        assert_eq!(relative(Path::new("lib.so.1"), Path::new("/usr/lib")), Path::new("lib.so.1"));
        assert_eq!(relative(Path::new("/x"), Path::new("/")), Path::new("x"));
    }
}
