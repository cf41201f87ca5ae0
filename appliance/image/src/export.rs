// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One file with kernel, modules and tools, for machines without a package manager or network.
//!
//! A zstd-compressed tar: first `manifest.json` with the size and SHA-256 of every file, then those
//! files in its order. The agent is not in it; the importing program adds its own, so that agent
//! and host always have the same version.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::build::Appliance;
use crate::cache::{Cache, write_json};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::kernel::KernelInfo;
use crate::tools::ToolsInfo;
use crate::wanted::BUILDER_VERSION;
use crate::{Progress, digest, vmlinux};

/// Points to the artifacts of the import.
pub(crate) const IMPORT_POINTER: &str = "imported.json";
const MANIFEST: &str = "manifest.json";
const MANIFEST_LIMIT: u64 = 16 << 20;
const FILES_LIMIT: usize = 4096;
const TOTAL_LIMIT: u64 = 4 << 30;
const COMPRESSION_LEVEL: i32 = 3;

/// The key of the imported kernel and tools.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Imported {
    pub(crate) key: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Packed {
    builder: u32,
    kernel: KernelInfo,
    tools: ToolsInfo,
    files: Vec<PackedFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct PackedFile {
    name: String,
    size: u64,
    sha256: String,
}

/// What an import brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// What `uname -r` prints in it.
    pub kernel_release: String,
    /// The package or the file that its kernel comes from.
    pub kernel_source: String,
    /// Names of the programs in its tools image.
    pub tools: Vec<String>,
}

/// Writes `appliance` without its agent to the new file `out`.
///
/// # Errors
///
/// An existing `out` is an error; a failure leaves no file behind.
pub fn export(appliance: &Appliance, out: &Path) -> Result<()> {
    let sources = files_of(appliance)?;
    let mut files = Vec::new();
    for (name, path) in &sources {
        let size = fs::metadata(path).context("looking at", path)?.len();
        files.push(PackedFile { name: name.clone(), size, sha256: digest::of_file(path)? });
    }
    let manifest = &appliance.manifest;
    let packed = Packed {
        builder: BUILDER_VERSION,
        kernel: KernelInfo {
            release: manifest.kernel_release.clone(),
            source: manifest.kernel_source.clone(),
            vmlinux_sha256: manifest.kernel_sha256.clone(),
            modules: manifest.modules.clone(),
        },
        tools: ToolsInfo { sha256: manifest.tools_sha256.clone(), tools: manifest.tools.clone() },
        files,
    };
    let json = serde_json::to_vec_pretty(&packed)
        .map_err(|e| Error::new(ErrorKind::Io, "manifest cannot be written as JSON").because(e))?;
    if out.exists() {
        return Err(Error::new(ErrorKind::Usage, "exists already").in_file(out));
    }
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(parent).context("creating a file", parent)?;
    pack(file.as_file_mut(), &json, &sources, &packed.files).context("writing", out)?;
    file.persist_noclobber(out).map_err(|e| e.error).context("renaming", out)?;
    Ok(())
}

fn pack(
    out: &mut File,
    json: &[u8],
    sources: &[(String, PathBuf)],
    files: &[PackedFile],
) -> std::io::Result<()> {
    let to = zstd::Encoder::new(BufWriter::new(out), COMPRESSION_LEVEL)?;
    let mut tar = tar::Builder::new(to);
    append(&mut tar, MANIFEST, u64::try_from(json.len()).unwrap_or(u64::MAX), json)?;
    for ((name, path), packed) in sources.iter().zip(files) {
        append(&mut tar, name, packed.size, File::open(path)?)?;
    }
    let mut buffered = tar.into_inner()?.finish()?;
    buffered.flush()?;
    buffered.get_ref().sync_all()
}

fn append(
    tar: &mut tar::Builder<impl Write>,
    name: &str,
    size: u64,
    data: impl Read,
) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(0);
    tar.append_data(&mut header, name, data.take(size))
}

/// Names in the archive and where they are.
fn files_of(appliance: &Appliance) -> Result<Vec<(String, PathBuf)>> {
    let modules = appliance.kernel.with_file_name("modules");
    let mut files = vec![
        ("vmlinux".to_owned(), appliance.kernel.clone()),
        ("tools.squashfs".to_owned(), appliance.tools.clone()),
    ];
    for module in &appliance.manifest.modules.modules {
        let file = format!("{}.ko", module.name);
        files.push((format!("modules/{file}"), modules.join(file)));
    }
    match files.iter().find(|(_, path)| !path.is_file()) {
        Some((_, lost)) => {
            Err(Error::new(ErrorKind::NotFound, "appliance is incomplete").in_file(lost))
        }
        None => Ok(files),
    }
}

/// Checks the exported appliance at `path` and installs it in the cache, where [`crate::build()`]
/// uses it if told to, or if it can get no kernel package.
///
/// # Errors
///
/// [`ErrorKind::Corrupt`] if a file is missing, changed or not in the manifest: then the cache
/// stays as it was.
pub fn import(path: &Path, cache_dir: &Path, progress: &Progress<'_>) -> Result<Import> {
    let cache = Cache::open(cache_dir)?;
    let lock = cache.lock(progress)?;
    let work = cache.temporary(&lock)?;
    let (key, packed) = unpack(path, work.path()).map_err(|e| e.in_file(path))?;
    let json = |name: &Path, write: &dyn Fn(&mut File) -> Result<()>| {
        File::create_new(name).context("creating", name).and_then(|mut file| write(&mut file))
    };
    let (kernel, tools) = (work.path().join("kernel"), work.path().join("tools"));
    json(&kernel.join("kernel.json"), &|file| write_json(file, &packed.kernel))?;
    json(&tools.join("tools.json"), &|file| write_json(file, &packed.tools))?;
    cache.install(&lock, &kernel, "kernels", &key)?;
    cache.install(&lock, &tools, "tools", &key)?;
    cache.write_json(&lock, IMPORT_POINTER, &Imported { key })?;
    let tools = packed.tools.tools.into_iter().filter(|tool| tool.present);
    Ok(Import {
        kernel_release: packed.kernel.release,
        kernel_source: packed.kernel.source,
        tools: tools.map(|tool| tool.name).collect(),
    })
}

/// Unpacks below `work/kernel` and `work/tools`; the key is the manifest's digest.
fn unpack(path: &Path, work: &Path) -> Result<(String, Packed)> {
    let broken = |e| Error::corrupt("exported appliance is broken").because(e);
    let file = File::open(path).context("opening", path)?;
    let reader = zstd::Decoder::new(BufReader::new(file)).map_err(broken)?;
    let mut archive = tar::Archive::new(reader);
    let mut entries = archive.entries().map_err(broken)?;
    let mut first = entries
        .next()
        .ok_or_else(|| Error::corrupt("exported appliance is empty"))?
        .map_err(broken)?;
    if first.path_bytes() != MANIFEST.as_bytes() || first.size() > MANIFEST_LIMIT {
        return Err(Error::corrupt(format!("exported appliance does not start with {MANIFEST}")));
    }
    let mut json = Vec::new();
    first.read_to_end(&mut json).map_err(broken)?;
    let packed: Packed = serde_json::from_slice(&json)
        .map_err(|e| Error::corrupt(format!("{MANIFEST} cannot be read")).because(e))?;
    check(&packed)?;
    for dir in ["kernel/modules", "tools"] {
        let dir = work.join(dir);
        fs::create_dir_all(&dir).context("creating", &dir)?;
    }
    for expected in &packed.files {
        let name = &expected.name;
        let mut entry = entries
            .next()
            .ok_or_else(|| Error::corrupt(format!("exported appliance ends before {name}")))?
            .map_err(broken)?;
        if entry.path_bytes() != name.as_bytes() || entry.size() != expected.size {
            return Err(Error::corrupt(format!(
                "expected {name} with {} bytes, found {} with {}",
                expected.size,
                String::from_utf8_lossy(&entry.path_bytes()),
                entry.size()
            )));
        }
        // The name was checked: it is one of ours, without a way out.
        let dir = if name == "tools.squashfs" { "tools" } else { "kernel" };
        let to = work.join(dir).join(name);
        if copy(&mut entry, &to)? != expected.sha256 {
            return Err(Error::corrupt(format!("{name} does not have the SHA-256 of {MANIFEST}")));
        }
    }
    if entries.next().is_some() {
        return Err(Error::corrupt("exported appliance has files that are not in its manifest"));
    }
    Ok((digest::key([&*digest::of_bytes(&json)]), packed))
}

/// Names, numbers and sizes before anything is written.
fn check(packed: &Packed) -> Result<()> {
    if packed.builder != BUILDER_VERSION {
        return Err(Error::unsupported(format!(
            "appliance has layout {}, this program has {BUILDER_VERSION}",
            packed.builder
        ))
        .remedy("export it again with this version"));
    }
    if !vmlinux::is_release(&packed.kernel.release) {
        return Err(Error::corrupt(format!("kernel release is {:?}", packed.kernel.release)));
    }
    let total = packed.files.iter().try_fold(0_u64, |sum, file| sum.checked_add(file.size));
    if packed.files.len() > FILES_LIMIT || total.is_none_or(|total| total > TOTAL_LIMIT) {
        return Err(Error::corrupt(format!(
            "appliance of {} files is too large",
            packed.files.len()
        )));
    }
    let plain = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    let mut expected = BTreeSet::from(["vmlinux".to_owned(), "tools.squashfs".to_owned()]);
    for module in &packed.kernel.modules.modules {
        if !plain(&module.name) {
            return Err(Error::corrupt(format!("module name is {:?}", module.name)));
        }
        expected.insert(format!("modules/{}.ko", module.name));
    }
    let names: BTreeSet<String> = packed.files.iter().map(|file| file.name.clone()).collect();
    if names != expected || names.len() != packed.files.len() {
        let odd = names.symmetric_difference(&expected).next().cloned().unwrap_or_default();
        return Err(Error::corrupt(format!("files and modules of the manifest differ: {odd:?}")));
    }
    Ok(())
}

/// Copies and returns the SHA-256.
fn copy(from: &mut impl Read, to: &Path) -> Result<String> {
    let mut file = File::create_new(to).context("creating", to)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = from
            .read(&mut buffer)
            .map_err(|e| Error::corrupt("exported appliance is broken").because(e))?;
        let Some(part) = buffer.get(..n).filter(|part| !part.is_empty()) else {
            break;
        };
        hash.update(part);
        file.write_all(part).context("writing", to)?;
    }
    file.sync_all().context("writing", to)?;
    Ok(digest::hex(&hash.finalize()))
}
