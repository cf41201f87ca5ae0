// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Device names in the tables of filesystems, encrypted volumes and swap.

use crate::devices::{Named, named, replaced};
use crate::draft::Draft;
use crate::machine::MachineFacts;
use std::ops::Range;
use tranship_inspect::{Result, parse_crypttab, parse_fstab};
use tranship_protocol::GuestPath;

/// Rewrites `/etc/fstab`, `/etc/crypttab` and the choice of a resume device.
pub(crate) fn plan(draft: &mut Draft<'_>, machine: &MachineFacts) -> Result<()> {
    let fstab = GuestPath::of("/etc/fstab");
    draft.edit(&fstab, "disks get new names: UUIDs hold on any machine", |draft, content| {
        let specs = parse_fstab(content).into_iter().map(|m| (m.line, m.spec, m.spec_at));
        renamed(draft, machine, "/etc/fstab", content, specs)
    })?;
    let crypttab = GuestPath::of("/etc/crypttab");
    draft.edit(&crypttab, "encrypted disks get new names", |draft, content| {
        let specs = parse_crypttab(content).into_iter().map(|v| (v.line, v.device, v.device_at));
        renamed(draft, machine, "/etc/crypttab", content, specs)
    })?;
    let resume = GuestPath::of("/etc/initramfs-tools/conf.d/resume");
    draft.edit(&resume, "the disk with the saved memory gets a new name", |_, content| {
        resume_device(content, machine)
    })?;
    warn_about_others(draft, machine)
}

fn renamed(
    draft: &mut Draft<'_>,
    machine: &MachineFacts,
    file: &str,
    content: &[u8],
    specs: impl Iterator<Item = (usize, String, Range<usize>)>,
) -> Vec<u8> {
    let mut edits = Vec::new();
    for (line, spec, at) in specs {
        match named(&spec, machine) {
            Named::Moves(moves) => edits.push((at, moves.stable_name())),
            Named::Lost => {
                let what = format!("line {line} of {file} names {spec}, which is no known disk");
                draft.warn("unknown-disk", what);
            }
            Named::Stays => {}
        }
    }
    replaced(content, &edits)
}

/// Replaces the devices of a `crypttab` without a word about unknown ones.
pub(crate) fn crypt_devices(content: &[u8], machine: &MachineFacts) -> Vec<u8> {
    let edits: Vec<_> = parse_crypttab(content)
        .into_iter()
        .filter_map(|volume| match named(&volume.device, machine) {
            Named::Moves(moves) => Some((volume.device_at, moves.stable_name())),
            Named::Lost | Named::Stays => None,
        })
        .collect();
    replaced(content, &edits)
}

/// Replaces the device in `RESUME=/dev/...` lines.
pub(crate) fn resume_device(content: &[u8], machine: &MachineFacts) -> Vec<u8> {
    let mut edits = Vec::new();
    let mut start = 0_usize;
    for line in content.split_inclusive(|byte| *byte == b'\n') {
        let next = start.saturating_add(line.len());
        if let Some(value) = line.trim_ascii_end().strip_prefix(b"RESUME=")
            && let Ok(name) = std::str::from_utf8(value)
            && let Named::Moves(moves) = named(name.trim_matches(['"', '\'']), machine)
        {
            let from = start.saturating_add(b"RESUME=".len());
            edits.push((from..from.saturating_add(value.len()), moves.stable_name()));
        }
        start = next;
    }
    replaced(content, &edits)
}

/// Names the files whose device names are not rewritten.
fn warn_about_others(draft: &mut Draft<'_>, machine: &MachineFacts) -> Result<()> {
    let mut files: Vec<GuestPath> = [
        "/etc/mdadm/mdadm.conf",
        "/etc/smartd.conf",
        "/etc/hdparm.conf",
        "/etc/default/grub-installer",
    ]
    .map(GuestPath::of)
    .to_vec();
    let units = GuestPath::of("/etc/systemd/system");
    if draft.tree.stat(&units)?.is_some_and(|s| s.kind == tranship_inspect::FileKind::Directory) {
        let names = draft.tree.read_dir(&units)?.into_iter().map(|entry| entry.name);
        files.extend(
            names
                .filter(|name| name.ends_with(b".mount") || name.ends_with(b".swap"))
                .map(|name| units.join(name)),
        );
    }
    for path in files {
        let Some(content) = draft.content(&path)? else { continue };
        let text = String::from_utf8_lossy(&content).into_owned();
        for (line, text) in text.lines().enumerate() {
            if text.trim_start().starts_with(['#', ';']) {
                continue;
            }
            let words = text.split(|c: char| c.is_whitespace() || matches!(c, '=' | '"' | ','));
            for word in words {
                if matches!(named(word, machine), Named::Moves(_)) {
                    let line = line.saturating_add(1);
                    let what = format!("line {line} of {path} names {word}, which gets a new name");
                    draft.warn("device-name", what);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::tests::disk;
    use proptest::prelude::*;
    use tranship_inspect::folder::FolderTree;

    fn machine() -> MachineFacts {
        MachineFacts {
            disks: vec![disk("sda", "vda", &[(1, "u1"), (5, "swap")]), disk("sdb", "vdb", &[])],
            ..MachineFacts::default()
        }
    }

    fn fstab(content: &[u8]) -> (Vec<u8>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let tree = FolderTree::new(dir.path());
        let mut draft = Draft::new(&tree);
        let specs = parse_fstab(content).into_iter().map(|m| (m.line, m.spec, m.spec_at));
        let new = renamed(&mut draft, &machine(), "/etc/fstab", content, specs);
        (new, draft.plan.warnings.into_iter().map(|w| w.what).collect())
    }

    #[test]
    fn only_the_device_of_a_line_changes() {
        for (old, new) in [
            ("/dev/sda1 / ext4 errors=remount-ro 0 1\n", "UUID=u1 / ext4 errors=remount-ro 0 1\n"),
            ("  /dev/sda5\tnone\tswap sw 0 0\r\n", "  UUID=swap\tnone\tswap sw 0 0\r\n"),
            ("/dev/sdb1 /data xfs", "/dev/vdb1 /data xfs"),
            ("# /dev/sda1 / ext4\n", "# /dev/sda1 / ext4\n"),
            ("#ä\n/dev/sda1 /\\040x auto", "#ä\nUUID=u1 /\\040x auto"),
            (
                "UUID=u1 / ext4\n/dev/sr0 /media/cdrom0 udf\n",
                "UUID=u1 / ext4\n/dev/sr0 /media/cdrom0 udf\n",
            ),
            ("/dev/sda1\n", "/dev/sda1\n"),
            ("", ""),
        ] {
            let (found, warnings) = fstab(old.as_bytes());
            assert_eq!(String::from_utf8_lossy(&found), new);
            assert!(warnings.is_empty());
        }
    }

    #[test]
    fn names_without_a_disk_are_warned_about_with_their_line() {
        let (new, warnings) = fstab(b"\n/dev/sdz1 /x ext4\n");
        assert_eq!(new, b"\n/dev/sdz1 /x ext4\n");
        assert_eq!(warnings, ["line 2 of /etc/fstab names /dev/sdz1, which is no known disk"]);
    }

    #[test]
    fn resume_lines_are_followed() {
        for (old, new) in [
            ("RESUME=/dev/sda5\n", "RESUME=UUID=swap\n"),
            ("RESUME=\"/dev/sda5\"", "RESUME=UUID=swap"),
            ("RESUME=UUID=swap\n", "RESUME=UUID=swap\n"),
            ("RESUME=none\n#RESUME=/dev/sda5\n", "RESUME=none\n#RESUME=/dev/sda5\n"),
        ] {
            assert_eq!(resume_device(old.as_bytes(), &machine()), new.as_bytes());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn unrelated_lines_never_change(lines in prop::collection::vec("[ -~\t]{0,40}", 0..8), at in 0_usize..8) {
            let lines: Vec<String> = lines.into_iter().filter(|line| !line.contains("/dev/")).collect();
            let at = at.min(lines.len());
            let mut old = lines.clone();
            old.insert(at, "/dev/sda1 / ext4 defaults 0 1".to_owned());
            let mut want = lines;
            want.insert(at, "UUID=u1 / ext4 defaults 0 1".to_owned());
            let (new, _) = fstab(old.join("\n").as_bytes());
            prop_assert_eq!(String::from_utf8(new).unwrap(), want.join("\n"));
        }
    }
}
