// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tools artifact: the host's disk programs with their libraries, and the modules, in one
//! image.
//!
//! Layout: `tools.squashfs` and `tools.json`. Inside, beside the programs at the host's own paths:
//!
//! - `/lib/modules/RELEASE/NAME.ko`
//! - `/lib/modules/index`: a line `NAME: PATH DEPENDENCY-PATH...` for each module, dependencies in
//!   loading order; what is built into the kernel has no line;
//! - `/lib/modules/aliases`: a line `ALIAS NAME` for each name that the kernel may ask for.

use std::fmt::Write;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cache::{Cache, Lock, Stamp, write_json};
use crate::elf::{Finder, is_elf, put_host_path};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::kernel::Kernel;
use crate::package::find_program;
use crate::tree::{Content, Node, Tree};
use crate::wanted::{BUILDER_VERSION, DATA_FILES, EMPTY_DIRS, PROGRAM_DIRS, tools};
use crate::{Event, Progress, digest, squash};

/// A program of the tools image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// Its name, as it is called.
    pub name: String,
    /// Whether it is in the image.
    pub present: bool,
    /// The Debian package that brings it; other distributions mostly agree.
    pub package: String,
    /// Why a program of the host is not in the image, such as a missing library.
    pub problem: Option<String>,
}

/// What is known about a tools artifact.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ToolsInfo {
    pub(crate) sha256: String,
    pub(crate) tools: Vec<Tool>,
}

/// A tools artifact in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) key: String,
    pub(crate) info: ToolsInfo,
    /// Host files and directories whose change makes another image.
    pub(crate) stamps: Vec<Stamp>,
}

/// The artifact with `key`, if it is there.
pub(crate) fn load(cache: &Cache, key: &str) -> Option<ToolsInfo> {
    let dir = cache.artifact("tools", key);
    let info = serde_json::from_slice(&fs::read(dir.join("tools.json")).ok()?).ok()?;
    dir.join("tools.squashfs").is_file().then_some(info)
}

/// The tools of this host with the modules of `kernel`, from the cache if nothing changed.
pub(crate) fn build(
    cache: &Cache,
    lock: &Lock,
    kernel: &Kernel,
    progress: &Progress<'_>,
) -> Result<Tools> {
    // Taken before the files are read: what changes in between is noticed the next time.
    let mut stamps: Vec<Stamp> = PROGRAM_DIRS.iter().map(|dir| Stamp::of(Path::new(dir))).collect();
    let (mut tree, tools) = collect()?;
    stamps.extend(tree.host_files().map(Stamp::of));
    let mut lines = vec![BUILDER_VERSION.to_string(), kernel.key.clone()];
    // Not the directories' own stamps: a new program that is none of ours changes nothing.
    lines.extend(stamps.iter().skip(PROGRAM_DIRS.len()).map(Stamp::line));
    for (path, node) in tree.iter() {
        let target = if let Node::Link(target) = node { target.as_path() } else { Path::new("") };
        lines.push(format!("{} {}", path.display(), target.display()));
    }
    let key = digest::key(lines.iter().map(String::as_str));
    if let Some(info) = load(cache, &key) {
        return Ok(Tools { key, info, stamps });
    }
    progress(Event::Packing { what: "tools" });
    put_modules(&mut tree, kernel, &cache.artifact("kernels", &kernel.key).join("modules"))?;
    let work = cache.temporary(lock)?;
    let dir = work.path().join("tools");
    fs::create_dir(&dir).context("creating", &dir)?;
    let image = dir.join("tools.squashfs");
    squash::write(&tree, &image)?;
    let info = ToolsInfo { sha256: digest::of_file(&image)?, tools };
    let path = dir.join("tools.json");
    let mut file = File::create_new(&path).context("creating", &path)?;
    write_json(&mut file, &info).map_err(|e| e.in_file(&path))?;
    cache.install(lock, &dir, "tools", &key)?;
    Ok(Tools { key, info, stamps })
}

/// Finds the programs of this host with all that they need.
fn collect() -> Result<(Tree, Vec<Tool>)> {
    let mut tree = Tree::default();
    // First the host's top level as it is: on a merged-usr host /lib64 must lead to usr/lib64,
    // because every program names its loader by that path.
    for top in ["/bin", "/sbin", "/lib", "/lib64", "/usr/sbin", "/usr/lib64"] {
        if Path::new(top).exists() {
            put_host_path(&mut tree, Path::new(top))?;
        }
    }
    tree.put_dirs(&EMPTY_DIRS)?;
    let mut finder = Finder::new();
    let mut states = Vec::new();
    for tool in tools() {
        let problem = match find_program(tool.name) {
            None => None,
            Some(path) => match add(&mut tree, &mut finder, &path) {
                Ok(()) => {
                    states.push(Tool {
                        name: tool.name.to_owned(),
                        present: true,
                        package: tool.package.to_owned(),
                        problem: None,
                    });
                    continue;
                }
                Err(error) => Some(error.to_string()),
            },
        };
        if tool.required {
            let why = problem.unwrap_or_else(|| "it is not installed".to_owned());
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("program {} is needed for the appliance: {why}", tool.name),
            )
            .remedy(
                "install the disk tools, on Debian and Ubuntu with `apt-get install e2fsprogs \
                 util-linux mount fdisk gdisk lvm2 mdadm cryptsetup-bin ntfs-3g xfsprogs \
                 btrfs-progs dosfstools`; or import an exported appliance",
            ));
        }
        states.push(Tool {
            name: tool.name.to_owned(),
            present: false,
            package: tool.package.to_owned(),
            problem,
        });
    }
    for file in DATA_FILES.iter().map(Path::new).filter(|path| path.is_file()) {
        put_host_path(&mut tree, file)?;
    }
    Ok((tree, states))
}

/// Adds a program with its libraries, or a script if its interpreter can be added.
fn add(tree: &mut Tree, finder: &mut Finder, path: &Path) -> Result<()> {
    let mut head = [0; 256];
    let mut file = File::open(path).context("opening", path)?;
    let read = file.read(&mut head).context("reading", path)?;
    let head = head.get(..read).unwrap_or_default();
    let mut files = if is_elf(head) {
        finder.closure(path)?
    } else {
        // Only the shell: an interpreter like Python needs far more than its libraries.
        let shell = interpreter(head)
            .filter(|shell| shell.file_name().is_some_and(|name| name == "sh"))
            .ok_or_else(|| Error::unsupported("neither an ELF program nor a shell script"))?;
        let mut files = finder.closure(&shell)?;
        files.push(path.to_owned());
        files
    };
    // Found as a whole before the first goes in: a tool with a missing library adds nothing.
    files.dedup();
    for file in &files {
        put_host_path(tree, file)?;
    }
    Ok(())
}

/// The program after `#!`.
fn interpreter(head: &[u8]) -> Option<PathBuf> {
    let line = head.strip_prefix(b"#!")?.split(|&b| b == b'\n').next()?;
    let word = std::str::from_utf8(line).ok()?.split_whitespace().next()?;
    Some(PathBuf::from(word)).filter(|path| path.is_absolute())
}

/// Adds the modules with their index.
fn put_modules(tree: &mut Tree, kernel: &Kernel, files: &Path) -> Result<()> {
    let release = &kernel.info.release;
    // /lib is a link on merged-usr hosts, and nothing can be put below a link.
    let lib = fs::canonicalize("/lib").unwrap_or_else(|_| PathBuf::from("/lib"));
    let base = lib.join("modules");
    let mut index = String::new();
    let mut aliases = String::new();
    for module in &kernel.info.modules.modules {
        let name = &module.name;
        let content = Content::Host(files.join(format!("{name}.ko")));
        tree.put(
            base.join(release).join(format!("{name}.ko")),
            Node::File { content, executable: false },
        )?;
        let _ = write!(index, "{name}: /lib/modules/{release}/{name}.ko");
        for dependency in &module.dependencies {
            let _ = write!(index, " /lib/modules/{release}/{dependency}.ko");
        }
        index.push('\n');
        for alias in &module.aliases {
            let _ = writeln!(aliases, "{alias} {name}");
        }
    }
    for (file, text) in [("index", index), ("aliases", aliases)] {
        let content = Content::Bytes(text.into_bytes());
        tree.put(base.join(file), Node::File { content, executable: false })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interpreter_of_a_script_is_its_first_word() {
        for (head, expected) in [
            (&b"#!/bin/sh -f\nx"[..], Some("/bin/sh")),
            (b"#! /bin/sh\n", Some("/bin/sh")),
            (b"#!sh\n", None),
            (b"\x7fELF", None),
            (b"#!\n", None),
        ] {
            assert_eq!(interpreter(head), expected.map(PathBuf::from));
        }
    }
}
