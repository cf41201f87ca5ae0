// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel artifact: the ELF kernel with exactly the modules that the appliance uses.
//!
//! Layout: `vmlinux`, `modules/NAME.ko` (unpacked) and `kernel.json`.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cache::{Cache, Lock, Stamp, write_json, write_synced};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::modules::{ModuleTree, Modules};
use crate::wanted::{BUILDER_VERSION, ON_DEMAND, TRANSPORT};
use crate::{Event, Progress, digest, package, vmlinux};

/// Points to the artifact of the downloaded package.
pub(crate) const PACKAGE_POINTER: &str = "package.json";

/// What is known about a kernel artifact.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct KernelInfo {
    pub(crate) release: String,
    /// The package or the file that it comes from.
    pub(crate) source: String,
    pub(crate) vmlinux_sha256: String,
    pub(crate) modules: Modules,
}

/// A kernel artifact in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) key: String,
    pub(crate) info: KernelInfo,
}

/// The artifact with `key`, if it is there.
pub(crate) fn load(cache: &Cache, key: &str) -> Option<Kernel> {
    let dir = cache.artifact("kernels", key);
    let info = serde_json::from_slice(&fs::read(dir.join("kernel.json")).ok()?).ok()?;
    dir.join("vmlinux").is_file().then(|| Kernel { key: key.to_owned(), info })
}

/// The files whose change makes another kernel of what the user named.
pub(crate) fn stamps(kernel: &Path, modules: &Path) -> Vec<Stamp> {
    ["", "modules.builtin", "modules.order", "modules.dep", "updates", "extra", "kernel"]
        .iter()
        .map(|name| modules.join(name))
        .chain([kernel.to_owned()])
        .map(|path| Stamp::of(&path))
        .collect()
}

/// The artifact of a kernel and modules that the user named.
pub(crate) fn from_files(
    cache: &Cache,
    lock: &Lock,
    kernel: &Path,
    modules: &Path,
    progress: &Progress<'_>,
) -> Result<Kernel> {
    let lines: Vec<_> = stamps(kernel, modules).iter().map(Stamp::line).collect();
    let key = key_of(&lines.join("\n"));
    if let Some(found) = load(cache, &key) {
        return Ok(found);
    }
    make(cache, lock, &key, &kernel.display().to_string(), kernel, modules, progress)
}

/// The artifact of the distribution's package: the one downloaded before, or a new one.
pub(crate) fn from_package(
    cache: &Cache,
    lock: &Lock,
    refresh: bool,
    progress: &Progress<'_>,
) -> Result<Kernel> {
    if !refresh
        && let Some(key) = cache.read_json::<String>(PACKAGE_POINTER)
        && let Some(found) = load(cache, &key)
        // An artifact of another builder has another selection of modules.
        && key == key_of(&found.info.source)
    {
        return Ok(found);
    }
    let work = cache.temporary(lock)?;
    let unpacked = package::fetch(work.path(), progress)?;
    let key = key_of(&unpacked.source);
    let made = match load(cache, &key) {
        Some(same) => same,
        None => make(
            cache,
            lock,
            &key,
            &unpacked.source,
            &unpacked.kernel,
            &unpacked.modules,
            progress,
        )?,
    };
    cache.write_json(lock, PACKAGE_POINTER, &key)?;
    Ok(made)
}

fn key_of(source: &str) -> String {
    let version = BUILDER_VERSION.to_string();
    let transport = TRANSPORT.iter().map(|(name, _)| *name);
    let fixed = [version.as_str(), source];
    digest::key(fixed.into_iter().chain(transport).chain(ON_DEMAND.iter().copied()))
}

fn make(
    cache: &Cache,
    lock: &Lock,
    key: &str,
    source: &str,
    kernel: &Path,
    modules: &Path,
    progress: &Progress<'_>,
) -> Result<Kernel> {
    progress(Event::Extracting { package: source.to_owned() });
    let image = fs::read(kernel).context("reading", kernel).map_err(|e| {
        if e.kind() == ErrorKind::Denied {
            e.remedy(
                "this kernel is readable for root only: copy it to where you can read it and \
                 name the copy with --kernel, or leave --kernel out to use a downloaded package",
            )
        } else {
            e.remedy("name an existing kernel with --kernel")
        }
    })?;
    let extracted = vmlinux::extract(&image).map_err(|e| e.in_file(kernel))?;
    let release = extracted
        .release
        .or_else(|| modules.file_name()?.to_str().map(str::to_owned))
        .filter(|release| vmlinux::is_release(release))
        .ok_or_else(|| Error::corrupt("kernel does not say its release").in_file(kernel))?;
    // Modules of another release would be refused by the kernel one by one, in the guest.
    if let Some(name) = modules.file_name().and_then(|name| name.to_str())
        && vmlinux::is_release(name)
        && name != release
    {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("kernel has release {release}, the modules are for {name}"),
        )
        .in_file(kernel)
        .remedy("name a kernel and modules of the same release"));
    }
    let work = cache.temporary(lock)?;
    let dir = work.path().join("kernel");
    let to = dir.join("modules");
    fs::create_dir_all(&to).context("creating", &to)?;
    write_synced(&dir.join("vmlinux"), &extracted.elf)?;
    let wanted = TRANSPORT.iter().map(|(name, _)| *name).chain(ON_DEMAND.iter().copied());
    let modules = ModuleTree::open(modules)?.resolve(wanted, &mut |name, data| {
        let path = to.join(format!("{name}.ko"));
        fs::write(&path, data).context("writing", &path)
    })?;
    let lost: Vec<_> = TRANSPORT
        .iter()
        .filter(|(_, required)| *required)
        .map(|(name, _)| *name)
        .filter(|name| {
            modules.missing.iter().any(|m| m == name) || modules.broken.contains_key(*name)
        })
        .collect();
    if !lost.is_empty() {
        return Err(Error::unsupported(format!(
            "kernel {release} lacks {}, without which the appliance cannot start",
            lost.join(", ")
        ))
        .in_file(kernel)
        .remedy("name another kernel with --kernel and --modules"));
    }
    let info = KernelInfo {
        release,
        source: source.to_owned(),
        vmlinux_sha256: digest::of_bytes(&extracted.elf),
        modules,
    };
    let path = dir.join("kernel.json");
    let mut file = fs::File::create_new(&path).context("creating", &path)?;
    write_json(&mut file, &info).map_err(|e| e.in_file(&path))?;
    cache.install(lock, &dir, "kernels", key)?;
    Ok(Kernel { key: key.to_owned(), info })
}
