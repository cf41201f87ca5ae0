// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Puts the artifacts together, or finds that nothing has changed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cache::{Cache, Lock, Stamp};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::export::{IMPORT_POINTER, Imported};
use crate::kernel::{self, Kernel, PACKAGE_POINTER};
use crate::modules::Modules;
use crate::tools::{self, Tool, ToolsInfo};
use crate::wanted::BUILDER_VERSION;
use crate::{Event, Progress, digest, initramfs};

/// The program that becomes `/init`.
#[derive(Clone, Debug)]
pub struct AgentSource {
    /// An x86-64 executable; if it is dynamic, its libraries come along. It should be stripped.
    pub path: PathBuf,
}

/// Points to the kernel that was named last.
const NAMED_POINTER: &str = "named.json";

/// A kernel that the user names instead of a downloaded one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelSource {
    /// A bzImage or an uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// Its modules directory, such as `/lib/modules/6.1.0-56-amd64`.
    pub modules: PathBuf,
}

/// What to build and where to keep it.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// A directory of this user alone; created if need be.
    pub cache_dir: PathBuf,
    /// The agent.
    pub agent: AgentSource,
    /// A kernel instead of the distribution's package. It is used from then on where none is
    /// named, until a refresh.
    pub kernel: Option<KernelSource>,
    /// Use the kernel and tools of the imported appliance. Without it they are used only when no
    /// kernel package can be had.
    pub imported: bool,
    /// Look for a newer kernel package even if one was downloaded before.
    pub refresh: bool,
}

/// What is in an appliance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the builder's layout.
    pub builder: u32,
    /// What `uname -r` prints in the appliance.
    pub kernel_release: String,
    /// The package or the file that the kernel comes from.
    pub kernel_source: String,
    /// SHA-256 of the kernel, in hexadecimal.
    pub kernel_sha256: String,
    /// SHA-256 of the tools image, in hexadecimal.
    pub tools_sha256: String,
    /// All modules: of the tools image, and of the initramfs.
    pub modules: Modules,
    /// Names of the modules in the initramfs, in loading order.
    pub transport: Vec<String>,
    /// All programs that were looked for.
    pub tools: Vec<Tool>,
}

/// A finished appliance in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appliance {
    /// The uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// The uncompressed cpio archive.
    pub initramfs: PathBuf,
    /// The squashfs image for the first virtio disk, to be attached read-only.
    pub tools: PathBuf,
    /// What `uname -r` prints in it.
    pub kernel_release: String,
    /// Changes whenever one of the three files has other content.
    pub key: String,
    /// What is in it.
    pub manifest: Manifest,
    pub(crate) kernel_key: String,
    pub(crate) tools_key: String,
    pub(crate) initramfs_key: String,
}

/// A finished appliance with everything whose change makes it stale.
#[derive(Debug, Serialize, Deserialize)]
struct Current {
    builder: u32,
    stamps: Vec<Stamp>,
    appliance: Appliance,
}

/// Builds the appliance, or returns the one in the cache if nothing it depends on has changed.
///
/// Checking a warm cache only takes `stat` calls. Several processes may build at once: one works,
/// the others wait for it.
///
/// # Errors
///
/// Every error that the user can do something about carries a remedy.
pub fn build(options: &BuildOptions, progress: &Progress<'_>) -> Result<Appliance> {
    let cache = Cache::open(&options.cache_dir)?;
    let name = current_name(options);
    // Relative to where somebody else starts it would be another file.
    let absolute = |path: &Path| std::path::absolute(path).context("opening", path);
    let named = match &options.kernel {
        Some(KernelSource { kernel, modules }) => {
            Some(KernelSource { kernel: absolute(kernel)?, modules: absolute(modules)? })
        }
        None => None,
    };
    let ready = || {
        let same = named.is_none() || named == cache.read_json(NAMED_POINTER);
        if options.refresh || !same { None } else { current(&cache, &name) }
    };
    if let Some(appliance) = ready() {
        return Ok(appliance);
    }
    if cfg!(not(target_arch = "x86_64")) {
        return Err(Error::unsupported("the appliance exists for x86-64 hosts only"));
    }
    let lock = cache.lock(progress)?;
    // Another process may have built it while this one waited.
    if let Some(appliance) = ready() {
        return Ok(appliance);
    }
    let agent = fs::canonicalize(&options.agent.path).context("opening", &options.agent.path)?;
    let parts = parts(options, &cache, &lock, progress)?;
    let initramfs = initramfs::build(&cache, &lock, &parts.kernel, &agent, progress)?;
    if let Some(source) = &named {
        cache.write_json(&lock, NAMED_POINTER, source)?;
    } else if options.refresh {
        cache.remove(&lock, NAMED_POINTER)?;
    }
    let info = parts.kernel.info;
    let appliance = Appliance {
        kernel: cache.artifact("kernels", &parts.kernel.key).join("vmlinux"),
        initramfs: cache.artifact("initramfs", &initramfs.key).join("initramfs.cpio"),
        tools: cache.artifact("tools", &parts.tools_key).join("tools.squashfs"),
        kernel_release: info.release.clone(),
        key: digest::key([&*parts.kernel.key, &*parts.tools_key, &*initramfs.key]),
        manifest: Manifest {
            builder: BUILDER_VERSION,
            kernel_release: info.release,
            kernel_source: info.source,
            kernel_sha256: info.vmlinux_sha256,
            tools_sha256: parts.tools.sha256,
            modules: info.modules,
            transport: initramfs.transport,
            tools: parts.tools.tools,
        },
        kernel_key: parts.kernel.key,
        tools_key: parts.tools_key,
        initramfs_key: initramfs.key,
    };
    let mut stamps = parts.stamps;
    stamps.extend(initramfs.stamps);
    stamps.push(Stamp::of(&options.agent.path));
    let pointers = [PACKAGE_POINTER, IMPORT_POINTER, NAMED_POINTER].map(|name| cache.file(name));
    let made = [&appliance.kernel, &appliance.initramfs, &appliance.tools];
    stamps.extend(pointers.iter().chain(made).map(|path| Stamp::of(path)));
    let current = Current { builder: BUILDER_VERSION, stamps, appliance };
    cache.write_json(&lock, &name, &current)?;
    cache.collect_garbage(&lock, &used(&cache, &lock));
    Ok(current.appliance)
}

/// Kernel and tools, wherever they come from.
struct Parts {
    kernel: Kernel,
    tools_key: String,
    tools: ToolsInfo,
    stamps: Vec<Stamp>,
}

fn parts(
    options: &BuildOptions,
    cache: &Cache,
    lock: &Lock,
    progress: &Progress<'_>,
) -> Result<Parts> {
    if options.imported {
        if options.kernel.is_some() {
            return Err(Error::new(
                ErrorKind::Usage,
                "a kernel was named, but an imported appliance brings its own",
            ));
        }
        return imported(cache)?.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "no appliance was imported into this cache")
                .in_file(&options.cache_dir)
                .remedy("import an exported appliance first")
        });
    }
    let mut stamps = Vec::new();
    let named = options.kernel.clone();
    let named = named.or_else(|| cache.read_json(NAMED_POINTER).filter(|_| !options.refresh));
    let kernel = if let Some(source) = &named {
        let path = |path: &Path| {
            fs::canonicalize(path).context("opening", path).map_err(|error| {
                error.remedy(
                    "name an existing kernel with --kernel and --modules, or go back to the \
                     distribution's package with `tranship appliance build --refresh`",
                )
            })
        };
        let (file, modules) = (path(&source.kernel)?, path(&source.modules)?);
        stamps.extend(kernel::stamps(&file, &modules));
        kernel::from_files(cache, lock, &file, &modules, progress)?
    } else {
        match kernel::from_package(cache, lock, options.refresh, progress) {
            Ok(kernel) => kernel,
            // An explicit wish for a new package must not end in an old import.
            Err(error) if !options.refresh => {
                return match imported(cache)? {
                    Some(parts) => {
                        progress(Event::UsingImported { because: error.to_string() });
                        Ok(parts)
                    }
                    None => Err(error),
                };
            }
            Err(error) => return Err(error),
        }
    };
    let tools = tools::build(cache, lock, &kernel, progress)?;
    stamps.extend(tools.stamps);
    Ok(Parts { kernel, tools_key: tools.key, tools: tools.info, stamps })
}

/// The kernel and tools of the import, if there is one.
fn imported(cache: &Cache) -> Result<Option<Parts>> {
    let Some(pointer) = cache.read_json::<Imported>(IMPORT_POINTER) else {
        return Ok(None);
    };
    let incomplete = || {
        Error::new(ErrorKind::Corrupt, "imported appliance is incomplete")
            .in_file(cache.file(IMPORT_POINTER))
            .remedy("import it again")
    };
    let kernel = kernel::load(cache, &pointer.key).ok_or_else(incomplete)?;
    let tools = tools::load(cache, &pointer.key).ok_or_else(incomplete)?;
    Ok(Some(Parts { kernel, tools_key: pointer.key, tools, stamps: Vec::new() }))
}

/// One file per set of options, so that two sets do not push each other out.
fn current_name(options: &BuildOptions) -> String {
    let mut parts = vec![
        BUILDER_VERSION.to_string(),
        options.agent.path.display().to_string(),
        options.imported.to_string(),
    ];
    if let Some(source) = &options.kernel {
        parts.push(source.kernel.display().to_string());
        parts.push(source.modules.display().to_string());
    }
    format!("current-{}.json", digest::key(parts.iter().map(String::as_str)))
}

fn current(cache: &Cache, name: &str) -> Option<Appliance> {
    let current: Current = cache.read_json(name)?;
    let fresh = current.builder == BUILDER_VERSION && current.stamps.iter().all(Stamp::holds);
    fresh.then_some(current.appliance)
}

/// Keys of the artifacts that are still wanted.
fn used(cache: &Cache, lock: &Lock) -> BTreeSet<String> {
    let sets = cache.option_sets(lock);
    let appliances = sets
        .iter()
        .filter_map(|name| cache.read_json::<Current>(name))
        .map(|current| current.appliance)
        .flat_map(|a| [a.kernel_key, a.tools_key, a.initramfs_key]);
    let package = cache.read_json::<String>(PACKAGE_POINTER);
    let import = cache.read_json::<Imported>(IMPORT_POINTER).map(|pointer| pointer.key);
    appliances.chain(package).chain(import).collect()
}
