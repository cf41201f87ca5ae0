// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which kernel modules have to be loaded, and in which order.
//!
//! Dependencies come from each module's own `.modinfo` section and not from `modules.dep`:
//! distribution packages do not carry that file (depmod makes it at installation), and the module
//! is read anyway to be unpacked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};
use serde::{Deserialize, Serialize};

use crate::decompress::{Compression, unpack};
use crate::error::{Context, Error, ErrorKind, Result};

/// Largest module that is accepted, in bytes; the largest in use has a few MB.
const MODULE_LIMIT: usize = 128 << 20;
/// Depth of directories below the modules directory.
const DEPTH_LIMIT: usize = 16;

/// A module of the appliance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Its name with underscores, as in `/proc/modules`.
    pub name: String,
    /// Every module that has to be loaded before it, in loading order.
    pub dependencies: Vec<String>,
    /// Names under which the kernel asks for it (`fs-ext4`, `crypto-xts`), without device tables.
    pub aliases: Vec<String>,
    /// Size of the unpacked file in bytes.
    pub size: u64,
    /// SHA-256 of the unpacked file, in hexadecimal.
    pub sha256: String,
}

/// The result of looking for wanted modules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modules {
    /// Everything found with its dependencies, in an order in which it can be loaded.
    pub modules: Vec<Module>,
    /// Wanted modules that are part of the kernel itself.
    pub built_in: Vec<String>,
    /// Wanted modules that this kernel does not have.
    pub missing: Vec<String>,
    /// Modules that are there but cannot be loaded, with the reason: a lost dependency, a broken
    /// file.
    pub broken: BTreeMap<String, String>,
}

impl Modules {
    /// The module called `name`.
    pub fn get(&self, name: &str) -> Option<&Module> {
        self.modules.iter().find(|module| module.name == name)
    }

    /// `names` and everything that they need, in loading order, without what is not there.
    pub(crate) fn with_dependencies<'a>(
        &'a self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Vec<&'a Module> {
        let needed: BTreeSet<&str> = names
            .into_iter()
            .filter_map(|name| self.get(name))
            .flat_map(|module| {
                module.dependencies.iter().map(String::as_str).chain([module.name.as_str()])
            })
            .collect();
        self.modules.iter().filter(|module| needed.contains(module.name.as_str())).collect()
    }
}

/// A kernel's modules directory (`/lib/modules/RELEASE` or its like).
#[derive(Debug)]
pub(crate) struct ModuleTree {
    root: PathBuf,
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

impl ModuleTree {
    /// Lists the modules below `root`.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        // depmod's default search order: what an administrator updated wins.
        for first in ["updates", "extra"] {
            if root.join(first).is_dir() {
                list(&root.join(first), DEPTH_LIMIT, &mut files)?;
            }
        }
        list(root, DEPTH_LIMIT, &mut files)?;
        let list_path = root.join("modules.builtin");
        let built_in = match fs::read_to_string(&list_path) {
            Ok(text) => text.lines().filter_map(|line| module_name(Path::new(line))).collect(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => BTreeSet::new(),
            Err(e) => return Err(Error::io("reading failed", e).in_file(list_path)),
        };
        if files.is_empty() && built_in.is_empty() {
            return Err(Error::new(ErrorKind::NotFound, "no kernel modules here")
                .in_file(root)
                .remedy("name the directory of the kernel's release, such as /lib/modules/6.1.0-1-amd64"));
        }
        Ok(Self { root: root.to_owned(), files, built_in })
    }

    /// Finds `wanted` with everything it needs and hands each unpacked file to `keep` once.
    pub(crate) fn resolve<'a>(
        &self,
        wanted: impl IntoIterator<Item = &'a str>,
        keep: &mut dyn FnMut(&str, &[u8]) -> Result<()>,
    ) -> Result<Modules> {
        let mut resolution = Resolution {
            tree: self,
            found: Modules::default(),
            done: BTreeMap::new(),
            aliases: None,
        };
        for name in wanted {
            let name = name.replace('-', "_");
            if self.files.contains_key(&name) {
                match resolution.visit(&name, keep) {
                    // One broken module is no reason to do without all others; whoever cannot
                    // do without this one looks into `broken`.
                    Err(error) if error.kind() != ErrorKind::Corrupt => return Err(error),
                    Ok(_) | Err(_) => {}
                }
            } else if self.built_in.contains(&name) {
                resolution.found.built_in.push(name);
            } else {
                resolution.found.missing.push(name);
            }
        }
        Ok(resolution.found)
    }

    /// Names and aliases of the libraries and ciphers, which soft dependencies refer to by alias
    /// (`softdep: pre: crc32c`). Looking only there keeps it to some hundred small files.
    fn crypto_aliases(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let mut aliases: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, path) in &self.files {
            let inside = path.strip_prefix(&self.root).unwrap_or(path);
            if !inside
                .components()
                .any(|part| ["crypto", "lib"].contains(&&*part.as_os_str().to_string_lossy()))
            {
                continue;
            }
            for alias in Modinfo::of(&read_module(path)?, path)?.aliases {
                aliases.entry(alias).or_default().push(name.clone());
            }
        }
        Ok(aliases)
    }
}

/// State of one search: modules that are being looked at map to `None`.
struct Resolution<'a> {
    tree: &'a ModuleTree,
    found: Modules,
    done: BTreeMap<String, Option<Vec<String>>>,
    aliases: Option<BTreeMap<String, Vec<String>>>,
}

impl Resolution<'_> {
    /// Adds `name` behind its dependencies and returns those, in loading order. A module that
    /// failed once fails whoever needs it.
    fn visit(
        &mut self,
        name: &str,
        keep: &mut dyn FnMut(&str, &[u8]) -> Result<()>,
    ) -> Result<Vec<String>> {
        if let Some(why) = self.found.broken.get(name) {
            return Err(Error::corrupt(why.clone()));
        }
        let visited = self.visit_new(name, keep);
        if let Err(error) = &visited
            && error.kind() == ErrorKind::Corrupt
        {
            self.done.remove(name);
            self.found.broken.insert(name.to_owned(), error.to_string());
        }
        visited
    }

    fn visit_new(
        &mut self,
        name: &str,
        keep: &mut dyn FnMut(&str, &[u8]) -> Result<()>,
    ) -> Result<Vec<String>> {
        if let Some(done) = self.done.get(name) {
            // A cycle can only come from soft dependencies, which need not hold.
            return Ok(done.clone().unwrap_or_default());
        }
        self.done.insert(name.to_owned(), None);
        let Some(path) = self.tree.files.get(name) else {
            return Ok(Vec::new());
        };
        let data = read_module(path)?;
        let info = Modinfo::of(&data, path)?;
        let mut before: Vec<String> = Vec::new();
        for (dependency, hard) in info
            .depends
            .iter()
            .map(|d| (d.clone(), true))
            .chain(info.soft.iter().map(|d| (d.clone(), false)))
        {
            let Some(dependency) = self.module_for(&dependency)? else {
                if hard && !self.tree.built_in.contains(&dependency) {
                    return Err(Error::corrupt(format!(
                        "module {name} needs {dependency}, which is neither a module nor built in"
                    ))
                    .in_file(path));
                }
                continue;
            };
            let first = match self.visit(&dependency, keep) {
                Err(error) if !hard && error.kind() == ErrorKind::Corrupt => continue,
                first => first?,
            };
            for needed in first.into_iter().chain([dependency]) {
                if needed != name && !before.contains(&needed) {
                    before.push(needed);
                }
            }
        }
        keep(name, &data)?;
        self.found.modules.push(Module {
            name: name.to_owned(),
            dependencies: before.clone(),
            aliases: info.aliases,
            size: u64::try_from(data.len()).unwrap_or(u64::MAX),
            sha256: crate::digest::of_bytes(&data),
        });
        self.done.insert(name.to_owned(), Some(before.clone()));
        Ok(before)
    }

    /// The module that a dependency means: itself, or the one that always works behind an alias.
    fn module_for(&mut self, name: &str) -> Result<Option<String>> {
        if self.tree.files.contains_key(name) {
            return Ok(Some(name.to_owned()));
        }
        if self.tree.built_in.contains(name) {
            return Ok(None);
        }
        if self.aliases.is_none() {
            self.aliases = Some(self.tree.crypto_aliases()?);
        }
        let aliases = self.aliases.iter().flatten();
        // The generic implementation, since an accelerated one fails to load on other processors.
        let mut behind: Vec<&String> = aliases
            .filter(|(alias, _)| alias.replace('-', "_") == name)
            .flat_map(|(_, modules)| modules)
            .collect();
        behind.sort_by_key(|module| (!module.ends_with("_generic"), *module));
        Ok(behind.first().map(|module| (*module).clone()))
    }
}

/// What a module says about itself.
#[derive(Debug, Default, PartialEq, Eq)]
struct Modinfo {
    depends: Vec<String>,
    soft: Vec<String>,
    aliases: Vec<String>,
}

impl Modinfo {
    fn of(module: &[u8], path: &Path) -> Result<Self> {
        let broken = |e| Error::corrupt("not a kernel module").because(e).in_file(path);
        let file = object::File::parse(module).map_err(broken)?;
        match file.section_by_name(".modinfo") {
            Some(section) => Ok(Self::parse(section.data().map_err(broken)?)),
            None => Err(Error::corrupt("kernel module has no .modinfo section").in_file(path)),
        }
    }

    /// `key=value` strings, each ended by NUL.
    fn parse(section: &[u8]) -> Self {
        let mut info = Self::default();
        let names = |list: &str, by: fn(char) -> bool| -> Vec<String> {
            list.split(by).filter(|n| !n.is_empty()).map(|n| n.replace('-', "_")).collect()
        };
        for entry in section.split(|&b| b == 0).filter_map(|entry| std::str::from_utf8(entry).ok())
        {
            match entry.split_once('=') {
                Some(("depends", list)) => info.depends.extend(names(list, |c| c == ',')),
                Some(("softdep", list)) => {
                    // "pre: a b post: c d"; what comes after does not matter for working at all.
                    let pre = list.split("post:").next().unwrap_or_default();
                    if let Some(pre) = pre.trim().strip_prefix("pre:") {
                        info.soft.extend(names(pre, char::is_whitespace));
                    }
                }
                Some(("alias", alias)) if !alias.contains([':', ' ', '\n']) => {
                    info.aliases.push(alias.to_owned());
                }
                _ => {}
            }
        }
        info
    }
}

/// Adds every module file below `dir`; those that are there already win.
fn list(dir: &Path, depth: usize, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(dir)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .context("listing", dir)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        // Links (`build`, `source`) lead out of the modules.
        let kind = entry.file_type().context("looking at", &path)?;
        if kind.is_dir() && depth > 0 {
            list(&path, depth - 1, files)?;
        } else if kind.is_file()
            && let Some(name) = module_name(&path)
        {
            files.entry(name).or_insert(path);
        }
    }
    Ok(())
}

/// `virtio_ring` for `.../virtio-ring.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let name = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .find_map(|ending| name.strip_suffix(ending))?;
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
    (plain && !name.is_empty()).then(|| name.replace('-', "_"))
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let data = fs::read(path).context("reading", path)?;
    match Compression::detect(&data) {
        Some(kind) => unpack(kind, &data, MODULE_LIMIT).map_err(|e| e.in_file(path)),
        None => Ok(data),
    }
}

#[cfg(test)]
mod tests {
    use object::write;

    use super::*;
    use crate::decompress::tests::pack;

    fn module(modinfo: &str) -> Vec<u8> {
        let mut object = write::Object::new(
            object::BinaryFormat::Elf,
            object::Architecture::X86_64,
            object::Endianness::Little,
        );
        let section =
            object.add_section(Vec::new(), b".modinfo".to_vec(), object::SectionKind::ReadOnlyData);
        object.append_section_data(section, modinfo.as_bytes(), 1);
        object.write().unwrap()
    }

    fn tree(modules: &[(&str, &str)]) -> (tempfile::TempDir, ModuleTree) {
        let dir = tempfile::tempdir().unwrap();
        for (path, modinfo) in modules {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let data = module(modinfo);
            let data = match path.extension().unwrap().to_str().unwrap() {
                "xz" => pack(Compression::Xz, &data),
                "zst" => pack(Compression::Zstd, &data),
                "gz" => pack(Compression::Gzip, &data),
                _ => data,
            };
            fs::write(path, data).unwrap();
        }
        fs::write(dir.path().join("modules.builtin"), "kernel/fs/fuse/fuse.ko\n").unwrap();
        let tree = ModuleTree::open(dir.path()).unwrap();
        (dir, tree)
    }

    #[test]
    fn dependencies_come_first_and_compressed_files_are_unpacked() {
        let (_dir, tree) = tree(&[
            (
                "kernel/fs/ext4/ext4.ko.xz",
                "depends=mbcache,jbd2\0softdep=pre: crc32c\0alias=fs-ext4\0",
            ),
            ("kernel/fs/mbcache.ko.zst", "depends=\0"),
            ("kernel/fs/jbd2/jbd2.ko.gz", "depends=crc16\0"),
            ("kernel/lib/crc16.ko", "license=GPL\0"),
            ("kernel/arch/x86/crypto/crc32c-intel.ko", "alias=crc32c\0alias=cpu:type:x86\0"),
            ("kernel/crypto/crc32c_generic.ko", "alias=crc32c\0alias=crypto-crc32c\0"),
        ]);
        let mut kept = Vec::new();
        let found = tree
            .resolve(["ext4", "fuse", "ntfs3", "crc16"], &mut |name, data| {
                assert!(data.starts_with(b"\x7fELF"));
                kept.push(name.to_owned());
                Ok(())
            })
            .unwrap();
        let order: Vec<_> = found.modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(order, ["mbcache", "crc16", "jbd2", "crc32c_generic", "ext4"]);
        assert_eq!(kept, order);
        assert_eq!(found.get("ext4").unwrap().dependencies, order[..4]);
        assert_eq!(found.get("ext4").unwrap().aliases, ["fs-ext4"]);
        assert_eq!((found.built_in, found.missing), (vec!["fuse".into()], vec!["ntfs3".into()]));
    }

    #[test]
    fn updated_modules_win_over_the_kernels_own() {
        let (_dir, tree) = tree(&[
            ("kernel/fs/a.ko", "depends=\0alias=old\0"),
            ("updates/dkms/a.ko", "depends=\0alias=new\0"),
        ]);
        let found = tree.resolve(["a"], &mut |_, _| Ok(())).unwrap();
        assert_eq!(found.modules[0].aliases, ["new"]);
    }

    #[test]
    fn soft_cycles_end_and_a_lost_hard_dependency_breaks_its_users() {
        let (_dir, cyclic) = tree(&[
            ("a.ko", "softdep=pre: b post: c\0"),
            ("b.ko", "softdep=pre: a\0depends=fuse\0"),
        ]);
        let found = cyclic.resolve(["a"], &mut |_, _| Ok(())).unwrap();
        let order: Vec<_> = found.modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(order, ["b", "a"]);

        let (_dir, lost) = tree(&[
            ("a.ko", "depends=gone\0"),
            ("b.ko", "depends=a\0"),
            ("c.ko", "softdep=pre: a\0"),
        ]);
        let found = lost.resolve(["a", "b", "c"], &mut |_, _| Ok(())).unwrap();
        let order: Vec<_> = found.modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(order, ["c"]);
        assert!(found.modules[0].dependencies.is_empty());
        assert_eq!(found.broken.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert!(
            found.broken["a"]
                .ends_with("module a needs gone, which is neither a module nor built in")
        );
    }

    #[test]
    fn only_needed_modules_are_selected_from_a_result() {
        let (_dir, tree) = tree(&[("a.ko", "depends=b\0"), ("b.ko", "\0"), ("c.ko", "\0")]);
        let found = tree.resolve(["c", "a"], &mut |_, _| Ok(())).unwrap();
        let names: Vec<_> =
            found.with_dependencies(["a", "x"]).iter().map(|m| m.name.clone()).collect();
        assert_eq!(names, ["b", "a"]);
    }

    #[test]
    fn an_empty_directory_is_not_a_modules_directory() {
        let dir = tempfile::tempdir().unwrap();
        let error = ModuleTree::open(dir.path()).unwrap_err();
        assert!(error.what_helps().unwrap().contains("/lib/modules/"));
    }
}
