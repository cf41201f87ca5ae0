// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Loads kernel modules in an order that was worked out when the appliance was built.

use crate::failure::{Result, io, plain, system};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::{self, File};
use std::sync::OnceLock;

/// Modules of the initramfs, one path a line, dependencies first.
const BOOT_LIST: &str = "/modules.load";

/// Modules of the tools disk: `name: path dependency-path…`, dependencies first.
const INDEX: &str = "/lib/modules/index";

/// Loads what the agent needs to reach its ports and disks.
pub(crate) fn load_boot_modules() -> Result<()> {
    let list = fs::read_to_string(BOOT_LIST).map_err(|error| io(BOOT_LIST, &error))?;
    list.lines().map(str::trim).filter(|line| !line.is_empty()).try_for_each(insert)
}

fn insert(path: &str) -> Result<()> {
    let file = File::open(path).map_err(|error| io(path, &error))?;
    match rustix::system::finit_module(&file, c"", 0) {
        // Built in, or loaded before.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(system(format_args!("loading {path}"), error)),
    }
}

/// Loads `name` with everything that it needs; a name that the index does not have is
/// taken to be built into the kernel.
pub(crate) fn load(name: &str) -> Result<()> {
    static PATHS: OnceLock<HashMap<String, Vec<String>>> = OnceLock::new();
    crate::tools::ensure()?;
    if PATHS.get().is_none() {
        let text = fs::read_to_string(INDEX).map_err(|error| io(INDEX, &error))?;
        // Another thread may have been faster; both read the same file.
        let _ = PATHS.set(parse_index(&text));
    }
    let wanted = name.replace('-', "_");
    let Some(paths) = PATHS.get().and_then(|index| index.get(&wanted)) else {
        return Ok(());
    };
    paths
        .iter()
        .try_for_each(|path| insert(path))
        .map_err(|failure| plain(format!("kernel module {name}: {}", failure.message)))
}

/// Aliases of the tools disk: `alias name`, such as `fs-ext2 ext4`.
const ALIASES: &str = "/lib/modules/aliases";

/// Loads the driver of a filesystem, which may be part of another one's.
pub(crate) fn load_filesystem(fstype: &str) -> Result<()> {
    crate::tools::ensure()?;
    let text = fs::read_to_string(ALIASES).unwrap_or_default();
    load(driver_of(&text, fstype).unwrap_or(fstype))
}

/// The module that the kernel would ask for to mount a filesystem of this type.
fn driver_of<'a>(aliases: &'a str, fstype: &str) -> Option<&'a str> {
    aliases.lines().find_map(|line| {
        let (alias, module) = line.split_once(' ')?;
        (alias.strip_prefix("fs-")? == fstype).then_some(module.trim())
    })
}

/// Name to the paths to insert in order; the module's own path comes last.
fn parse_index(text: &str) -> HashMap<String, Vec<String>> {
    let mut index = HashMap::new();
    for line in text.lines() {
        let Some((name, paths)) = line.split_once(':') else { continue };
        let mut paths = paths.split_whitespace().map(str::to_owned);
        let Some(own) = paths.next() else { continue };
        let order = paths.chain([own]).collect();
        index.insert(name.trim().replace('-', "_"), order);
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filesystem_may_be_part_of_another_driver() {
        let aliases = "fs-ext2 ext4\nfs-ext4 ext4\ncrypto-xts xts\n";
        assert_eq!(driver_of(aliases, "ext2"), Some("ext4"));
        assert_eq!(driver_of(aliases, "xts"), None);
    }

    #[test]
    fn dependencies_come_before_the_module() {
        let index = parse_index("ext4: /m/ext4.ko /m/mbcache.ko /m/jbd2.ko\ndm-mod: /m/dm.ko\n");
        assert_eq!(index["ext4"], ["/m/mbcache.ko", "/m/jbd2.ko", "/m/ext4.ko"]);
        assert_eq!(index["dm_mod"], ["/m/dm.ko"]);
    }
}
