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
    fn dependencies_come_before_the_module() {
        let index = parse_index("ext4: /m/ext4.ko /m/mbcache.ko /m/jbd2.ko\ndm-mod: /m/dm.ko\n");
        assert_eq!(index["ext4"], ["/m/mbcache.ko", "/m/jbd2.ko", "/m/ext4.ko"]);
        assert_eq!(index["dm_mod"], ["/m/dm.ko"]);
    }
}
