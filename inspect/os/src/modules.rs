// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The indexes of a kernel's modules: what needs what, and what is built in.

use crate::{Error, ErrorKind, FileKind, GuestTree, Result};
use std::collections::{BTreeMap, BTreeSet};
use tranship_protocol::GuestPath;

/// Largest index file that is read: the ones of today hold about a megabyte.
const INDEX: u64 = 32 << 20;

/// The modules of one kernel, by `modules.dep`, `modules.builtin` and `modules.softdep`.
#[derive(Clone, Debug, Default)]
pub struct ModuleIndex {
    /// Name of a module to its path below the modules directory.
    paths: BTreeMap<String, String>,
    /// Name of a module to the names that it needs.
    needs: BTreeMap<String, Vec<String>>,
    builtin: BTreeSet<String>,
}

impl ModuleIndex {
    /// Reads the indexes in the directory of one kernel's modules.
    ///
    /// # Errors
    ///
    /// `modules.dep` is not there, or a file is larger than any real one.
    pub fn read(tree: &dyn GuestTree, directory: &GuestPath) -> Result<Self> {
        let mut index = Self::default();
        let dep = directory.join("modules.dep");
        if tree.stat(&dep)?.is_none() {
            let message = "is not there, so that nothing says which module needs which";
            return Err(Error::new(ErrorKind::NotFound, message).on(&dep));
        }
        index.add_dependencies(&text(tree, &dep)?);
        index.add_builtin(&text(tree, &directory.join("modules.builtin"))?);
        index.add_soft_dependencies(&text(tree, &directory.join("modules.softdep"))?);
        Ok(index)
    }

    fn add_dependencies(&mut self, text: &str) {
        for line in text.lines() {
            let Some((path, needs)) = line.split_once(':') else { continue };
            let Some(below) = path_below(path.trim()) else { continue };
            let name = module_name(path);
            self.needs.insert(name.clone(), needs.split_whitespace().map(module_name).collect());
            self.paths.insert(name, below.to_owned());
        }
    }

    fn add_builtin(&mut self, text: &str) {
        self.builtin.extend(text.lines().map(module_name));
    }

    /// `softdep virtio_blk pre: a b post: c`: names that are useful, if they exist.
    fn add_soft_dependencies(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some("softdep"), Some(name)) = (words.next(), words.next()) else { continue };
            let Some(needs) = self.needs.get_mut(&module_name(name)) else { continue };
            needs.extend(words.filter(|word| !word.ends_with(':')).map(module_name));
        }
    }

    /// Whether the module is part of the kernel itself.
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&module_name(name))
    }

    /// The module's path below the modules directory, if there is such a file.
    pub fn path(&self, name: &str) -> Option<&str> {
        self.paths.get(&module_name(name)).map(String::as_str)
    }

    /// The names of `wanted` and of everything they need that are files, sorted.
    ///
    /// Names that are built in or unknown are left out. Circles do no harm.
    pub fn closure<'a>(&self, wanted: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut pending: Vec<String> = wanted.into_iter().map(module_name).collect();
        while let Some(name) = pending.pop() {
            if self.paths.contains_key(&name) && found.insert(name.clone()) {
                pending.extend(self.needs.get(&name).into_iter().flatten().cloned());
            }
        }
        found
    }
}

/// The path below the modules directory. Older indexes hold absolute paths; one that leads
/// anywhere else is no module of this kernel.
fn path_below(path: &str) -> Option<&str> {
    let below = match path.strip_prefix('/') {
        Some(absolute) => absolute.split_once("lib/modules/")?.1.split_once('/')?.1,
        None => path,
    };
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    below.split('/').all(plain).then_some(below)
}

/// The name by which a module is known: without directory and endings, `-` as `_`.
pub fn module_name(path: &str) -> String {
    let file = path.trim().rsplit('/').next().unwrap_or_default();
    let stem = file.split_once(".ko").map_or(file, |(stem, _)| stem);
    stem.replace('-', "_")
}

/// An index file as text; empty if it is not there.
fn text(tree: &dyn GuestTree, path: &GuestPath) -> Result<String> {
    match tree.stat(path)? {
        Some(stat) if stat.kind == FileKind::File => {
            Ok(String::from_utf8_lossy(&tree.read(path, INDEX)?).into_owned())
        }
        _ => Ok(String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> ModuleIndex {
        let mut index = ModuleIndex::default();
        index.add_dependencies(
            "kernel/a/virtio-blk.ko.xz: kernel/b/virtio.ko kernel/c/loop.ko\n\
             kernel/b/virtio.ko:\n\
             /lib/modules/6.1/kernel/c/loop.ko: kernel/a/virtio-blk.ko.xz\n\
             no colon\n../../../etc/shadow.ko:\n/etc/passwd.ko:\nkernel/..//x.ko:\n",
        );
        index.add_builtin("kernel/drivers/virtio/virtio_ring.ko\n");
        index.add_soft_dependencies("softdep virtio_blk pre: virtio post: absent\n# x\n");
        index
    }

    #[test]
    fn names_are_the_same_however_they_are_written() {
        for (path, name) in [
            ("kernel/drivers/block/virtio-blk.ko.xz", "virtio_blk"),
            ("virtio_blk", "virtio_blk"),
            ("a/b.ko", "b"),
            ("", ""),
        ] {
            assert_eq!(module_name(path), name);
        }
    }

    #[test]
    fn the_closure_follows_circles_once_and_skips_what_is_built_in() {
        let closure = index().closure(["virtio_blk", "virtio_ring", "unknown"]);
        assert_eq!(closure.into_iter().collect::<Vec<_>>(), ["loop", "virtio", "virtio_blk"]);
        assert!(index().is_builtin("virtio-ring"));
        assert_eq!(index().path("loop"), Some("kernel/c/loop.ko"));
        for outside in ["shadow", "passwd", "x"] {
            assert_eq!(index().path(outside), None, "{outside}");
        }
    }
}
