// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The old hypervisor's tools, consoles outside the bootloader, and stale caches.

use crate::draft::Draft;
use tranship_inspect::{Facts, FileKind, Init, Result, SeLinux};
use tranship_protocol::GuestPath;

/// Stops the tools from starting. Their packages are a matter of the first start.
pub(crate) fn plan(draft: &mut Draft<'_>, facts: &Facts) -> Result<()> {
    let systemd = matches!(facts.os.init, Init::Systemd { .. });
    for tool in &facts.tools {
        let why = format!("the tools of {} have nothing to talk to on KVM", tool.hypervisor);
        if systemd {
            for unit in &tool.units {
                draft.symlink(&format!("/etc/systemd/system/{unit}"), "/dev/null", &why)?;
            }
            continue;
        }
        for level in ["S", "0", "1", "2", "3", "4", "5", "6"] {
            let directory = format!("/etc/rc{level}.d");
            for name in file_names(draft, &directory)? {
                let starts = |script: &String| {
                    name.strip_prefix('S').and_then(|rest| rest.get(2..)) == Some(script)
                };
                if tool.scripts.iter().any(starts) {
                    draft.remove(&format!("{directory}/{name}"), &why)?;
                }
            }
        }
    }
    consoles(draft)?;
    for cache in [
        "/etc/blkid.tab",
        "/etc/blkid/blkid.tab",
        "/etc/lvm/cache/.cache",
        "/etc/lvm/devices/system.devices",
    ] {
        draft.remove(cache, "it remembers the old disks")?;
    }
    if facts.selinux == SeLinux::On {
        let path = GuestPath::of("/.autorelabel");
        let why = "new files need SELinux labels: the first start sets them";
        draft.write(&path, Vec::new(), crate::draft::PLAIN, why)?;
        draft.warn("slow-first-start", "the first start sets the labels of all files".to_owned());
    }
    Ok(())
}

/// The consoles of Xen become the serial console.
fn consoles(draft: &mut Draft<'_>) -> Result<()> {
    let why = "the console of Xen is a serial console on KVM";
    for path in ["/etc/inittab", "/etc/securetty"] {
        draft.edit(&GuestPath::of(path), why, |_, content| {
            let mut new = Vec::with_capacity(content.len());
            let is_comment = |line: &[u8]| line.trim_ascii_start().starts_with(b"#");
            let has_serial = content
                .split(|byte| *byte == b'\n')
                .any(|line| !is_comment(line) && line.windows(5).any(|word| word == b"ttyS0"));
            for line in content.split_inclusive(|byte| *byte == b'\n') {
                let console = [b"hvc0", b"xvc0"].into_iter().find_map(|name| {
                    line.windows(4).position(|word| word == name).map(|at| (at, name.len()))
                });
                match console {
                    Some((at, len)) if !is_comment(line) && !has_serial => {
                        new.extend_from_slice(line.get(..at).unwrap_or_default());
                        new.extend_from_slice(b"ttyS0");
                        new.extend_from_slice(
                            line.get(at.saturating_add(len)..).unwrap_or_default(),
                        );
                    }
                    _ => new.extend_from_slice(line),
                }
            }
            new
        })?;
    }
    Ok(())
}

fn file_names(draft: &Draft<'_>, directory: &str) -> Result<Vec<String>> {
    let path = GuestPath::of(directory);
    if draft.tree.stat(&path)?.is_none_or(|stat| stat.kind != FileKind::Directory) {
        return Ok(Vec::new());
    }
    let entries = draft.tree.read_dir(&path)?;
    Ok(entries.into_iter().filter_map(|entry| String::from_utf8(entry.name).ok()).collect())
}
