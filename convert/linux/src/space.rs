// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether what will be written fits, on each filesystem that is written to.

use crate::draft::Draft;
use crate::plan::{AppendInitramfs, Step};
use std::collections::BTreeMap;
use tranship_inspect::Result;
use tranship_protocol::GuestPath;

/// Files that must be left, and bytes that are left for the guest itself.
const INODES: u64 = 100;
const RESERVE: u64 = 4 << 20;
/// Filesystems give out whole blocks.
const BLOCK: u64 = 4096;
/// What an initramfs made by the guest's own tool may need beside the old one.
const REBUILD: u64 = 128 << 20;

/// What a filesystem has to take.
#[derive(Default)]
struct Load {
    path: Option<GuestPath>,
    /// Bytes that stay.
    grows: u64,
    /// The most that is needed besides while one file is replaced.
    passing: u64,
}

/// Adds the steps for the initramfs, with backups where there is room, and blocks the
/// conversion where it does not fit.
pub(crate) fn check(
    draft: &mut Draft<'_>,
    appended: Vec<AppendInitramfs>,
    programs: &[Step],
) -> Result<()> {
    let mut loads: BTreeMap<u64, Load> = BTreeMap::new();
    for step in &draft.plan.steps {
        let Some(path) = step.path() else { continue };
        let size = match step {
            Step::WriteFile { content, .. } => length(content),
            Step::Copy { from, .. } => draft.tree.stat(from)?.map_or(0, |stat| stat.size),
            _ => 0,
        };
        let (device, existing) = holder(draft, path)?;
        let load = loads.entry(device).or_default();
        load.path.get_or_insert(existing);
        load.grows = load.grows.saturating_add(blocks(size));
    }
    for mut append in appended {
        let (device, existing) = holder(draft, &append.initrd)?;
        let load = loads.entry(device).or_default();
        let space = draft.tree.space(&existing)?;
        load.path.get_or_insert(existing);
        let added = blocks(length(&append.segment)).saturating_add(BLOCK);
        let whole = append.old_size.saturating_add(added);
        let mut name = append.initrd.file_name().to_vec();
        name.extend_from_slice(b".pre-tranship");
        let backup = append.initrd.parent().join(name);
        let with_backup = load.grows.saturating_add(whole).saturating_add(RESERVE);
        if draft.tree.lstat(&backup)?.is_none() && with_backup <= space.free_bytes {
            append.backup = Some(backup);
            load.grows = load.grows.saturating_add(whole);
        } else {
            load.grows = load.grows.saturating_add(added);
            load.passing = load.passing.max(append.old_size);
        }
        draft.plan.steps.push(Step::AppendInitramfs(append));
    }
    if !programs.is_empty() {
        let (device, existing) = holder(draft, &GuestPath::of("/boot/initrd.img"))?;
        let load = loads.entry(device).or_default();
        load.path.get_or_insert(existing);
        load.passing = load.passing.max(REBUILD);
    }
    for load in loads.into_values() {
        let Some(path) = load.path else { continue };
        let space = draft.tree.space(&path)?;
        let needed = load.grows.saturating_add(load.passing);
        if space.read_only {
            let what = format!("the filesystem of {path} can only be read");
            draft.block("read-only", what, "shut the guest down cleanly, or check its filesystems");
        } else if space.free_bytes < needed {
            let free = space.free_bytes;
            let what =
                format!("the filesystem of {path} has {free} bytes free, but {needed} are written");
            draft.block("no-space", what, "remove old kernels or other files in the guest");
        }
        if let Some(inodes) = space.free_inodes.filter(|inodes| *inodes < INODES) {
            let what = format!("the filesystem of {path} takes only {inodes} more files");
            draft.block("no-inodes", what, "remove files in the guest");
        }
    }
    Ok(())
}

/// The filesystem that a file lies on or will lie on, and the next directory that exists.
fn holder(draft: &Draft<'_>, path: &GuestPath) -> Result<(u64, GuestPath)> {
    let mut at = path.parent();
    loop {
        if let Some(stat) = draft.tree.stat(&at)? {
            return Ok((stat.device, at));
        }
        let parent = at.parent();
        if parent == at {
            return Ok((0, at));
        }
        at = parent;
    }
}

fn blocks(size: u64) -> u64 {
    size.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX)
}

fn length(content: &[u8]) -> u64 {
    u64::try_from(content.len()).unwrap_or(u64::MAX)
}
