// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The initramfs artifact: the agent as `/init` and the modules to reach the tools image.
//!
//! It is small and never compressed: an agent that was just built is packed in milliseconds, and
//! the guest has nothing to unpack. `/modules.load` lists the module files, a path a line, in the
//! order in which they have to be loaded; what is built into the kernel is not in it.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::cache::{Cache, Lock, Stamp};
use crate::cpio;
use crate::elf::{Finder, put_host_path};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::kernel::Kernel;
use crate::tree::{Content, Node, Tree};
use crate::wanted::{BUILDER_VERSION, TRANSPORT};
use crate::{Event, Progress, digest};

const FILE: &str = "initramfs.cpio";

/// An initramfs artifact in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Initramfs {
    pub(crate) key: String,
    /// Names of the modules in it, in loading order.
    pub(crate) transport: Vec<String>,
    /// Files whose change makes another initramfs.
    pub(crate) stamps: Vec<Stamp>,
}

/// The initramfs of `agent` for `kernel`, from the cache if nothing changed.
pub(crate) fn build(
    cache: &Cache,
    lock: &Lock,
    kernel: &Kernel,
    agent: &Path,
    progress: &Progress<'_>,
) -> Result<Initramfs> {
    let agent_stamp = Stamp::of(agent);
    let mut tree = Tree::default();
    for path in Finder::new().closure(agent)?.iter().skip(1) {
        put_host_path(&mut tree, path)?;
    }
    let mut stamps: Vec<Stamp> = tree.host_files().map(Stamp::of).collect();
    let mut lines = vec![BUILDER_VERSION.to_string(), kernel.key.clone(), digest::of_file(agent)?];
    lines.extend(stamps.iter().map(Stamp::line));
    stamps.push(agent_stamp);
    let key = digest::key(lines.iter().map(String::as_str));
    let modules: Vec<String> = kernel
        .info
        .modules
        .with_dependencies(TRANSPORT.iter().map(|(name, _)| *name))
        .iter()
        .map(|module| module.name.clone())
        .collect();
    let made = Initramfs { key, transport: modules, stamps };
    if cache.artifact("initramfs", &made.key).join(FILE).is_file() {
        return Ok(made);
    }
    progress(Event::Packing { what: "initramfs" });
    tree.put("init", Node::File { content: Content::Host(agent.to_owned()), executable: true })?;
    tree.put_dirs(&[
        "dev", "modules", "mnt", "proc", "root", "run", "sys", "sysroot", "tmp", "tools",
    ])?;
    let files = cache.artifact("kernels", &kernel.key).join("modules");
    let mut order = String::new();
    for name in &made.transport {
        let content = Content::Host(files.join(format!("{name}.ko")));
        tree.put(format!("modules/{name}.ko"), Node::File { content, executable: false })?;
        let _ = writeln!(order, "/modules/{name}.ko");
    }
    tree.put_text("modules.load", order)?;
    let work = cache.temporary(lock)?;
    let dir = work.path().join("initramfs");
    fs::create_dir(&dir).context("creating", &dir)?;
    write(&tree, &dir.join(FILE))?;
    cache.install(lock, &dir, "initramfs", &made.key)?;
    Ok(made)
}

fn write(tree: &Tree, out: &Path) -> Result<()> {
    let file = File::create_new(out).context("creating", out)?;
    let mut archive = cpio::Writer::new(BufWriter::with_capacity(1 << 20, file));
    for (path, node) in tree.iter() {
        let name = text(path)?;
        match node {
            Node::Dir => archive.dir(name, 0o755),
            Node::Link(target) => archive.symlink(name, text(target)?),
            Node::File { content, executable } => {
                let mode = if *executable { 0o755 } else { 0o644 };
                match content {
                    Content::Bytes(bytes) => {
                        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                        archive.file(name, mode, size, &mut bytes.as_slice())
                    }
                    Content::Host(source) => {
                        let mut from = File::open(source).context("opening", source)?;
                        let size = from.metadata().context("looking at", source)?.len();
                        archive.file(name, mode, size, &mut from)
                    }
                }
            }
        }
        .context("writing", out)?;
    }
    // The kernel opens the console for init before devtmpfs is mounted.
    archive
        .char_device("dev/console", 0o600, 5, 1)
        .and_then(|()| archive.char_device("dev/null", 0o666, 1, 3))
        .context("writing", out)?;
    let mut buffered = archive.finish().context("writing", out)?;
    buffered.flush().and_then(|()| buffered.get_ref().sync_all()).context("writing", out)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, "path for the initramfs is not UTF-8").in_file(path)
    })
}
