// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Arguments of the kernel and device names in the bootloader's files.
//!
//! Nothing is generated anew: only words change that name a disk that gets another name,
//! or a console of Xen, and the serial console is added where there is none.

use crate::devices::{Named, named, replaced};
use crate::draft::Draft;
use crate::machine::MachineFacts;
use std::ops::Range;
use tranship_inspect::{BootloaderKind, Facts, FileKind, Result};
use tranship_protocol::GuestPath;

/// The screen comes last because the last console is the one that `/dev/console` means:
/// messages of the boot stay where they were, and the serial line gets a login as well.
pub(crate) const SERIAL: &str = "console=ttyS0,115200 console=tty0";

/// Rewrites the bootloader's files.
pub(crate) fn plan(
    draft: &mut Draft<'_>,
    facts: &Facts,
    machine: &MachineFacts,
    serial: bool,
) -> Result<()> {
    let why = "the kernel's arguments name disks and consoles that change";
    if facts.bootloader.kind == BootloaderKind::Grub2 {
        for path in &facts.bootloader.configs {
            draft.edit(path, why, |draft, content| {
                boot_lines(draft, content, machine, path, serial)
            })?;
        }
        for path in default_files(draft)? {
            let add = serial && path.as_bytes() == b"/etc/default/grub";
            draft.edit(
                &path,
                "the guest's own update-grub must write the same",
                |draft, content| defaults(draft, content, machine, &path, add),
            )?;
        }
    }
    for directory in ["/boot/grub", "/boot/grub2"] {
        let path = GuestPath::of(directory).join("device.map");
        draft.edit(&path, "the disk that GRUB starts from gets a new name", |_, content| {
            words_renamed(content, machine)
        })?;
    }
    Ok(())
}

fn default_files(draft: &Draft<'_>) -> Result<Vec<GuestPath>> {
    let mut files = vec![GuestPath::of("/etc/default/grub")];
    let directory = GuestPath::of("/etc/default/grub.d");
    if draft.tree.stat(&directory)?.is_some_and(|stat| stat.kind == FileKind::Directory) {
        let names = draft.tree.read_dir(&directory)?.into_iter().map(|entry| entry.name);
        files.extend(names.filter(|n| n.ends_with(b".cfg")).map(|n| directory.join(n)));
    }
    Ok(files)
}

/// Edits the lines of a `grub.cfg` that start a kernel.
fn boot_lines(
    draft: &mut Draft<'_>,
    content: &[u8],
    machine: &MachineFacts,
    path: &GuestPath,
    serial: bool,
) -> Vec<u8> {
    let mut edits = Vec::new();
    let lines = lines(content);
    for (number, at) in lines.iter().enumerate() {
        let line = content.get(at.clone()).unwrap_or_default();
        let words = words(line, at.start);
        let command = words.first().and_then(|at| content.get(at.clone())).unwrap_or_default();
        let starts: &[&[u8]] = &[b"linux", b"linux16", b"linuxefi", b"module", b"module2"];
        if !starts.contains(&command) {
            continue;
        }
        // Xen's entries load the initramfs as a module too.
        let has_initrd = command.starts_with(b"module")
            || initrd_follows(content, lines.get(number.saturating_add(1)..).unwrap_or_default());
        let place = format!("line {} of {path}", number.saturating_add(1));
        let arguments = words.get(2..).unwrap_or_default();
        edits.extend(arguments_renamed(draft, content, arguments, machine, has_initrd, &place));
        let texts: Vec<&[u8]> = arguments.iter().filter_map(|at| content.get(at.clone())).collect();
        let named = texts.iter().any(|word| word.starts_with(b"console="));
        let is_linux = texts.iter().any(|word| word.starts_with(b"root="));
        if serial && is_linux && !named && !command.starts_with(b"module") {
            let end = words.last().map_or(at.end, |word| word.end);
            edits.push((end..end, format!(" {SERIAL}")));
        }
    }
    replaced(content, &edits)
}

/// Whether an `initrd` command comes before the end of the menu entry.
fn initrd_follows(content: &[u8], lines: &[Range<usize>]) -> bool {
    lines
        .iter()
        .map(|at| content.get(at.clone()).unwrap_or_default().trim_ascii())
        .take_while(|line| *line != b"}")
        .any(|line| line.starts_with(b"initrd"))
}

/// Edits `/etc/default/grub`: the arguments, and the setting that forbids UUIDs.
fn defaults(
    draft: &mut Draft<'_>,
    content: &[u8],
    machine: &MachineFacts,
    path: &GuestPath,
    serial: bool,
) -> Vec<u8> {
    let mut edits = Vec::new();
    let mut place_for_console = None;
    let mut has_console = false;
    for (number, at) in lines(content).into_iter().enumerate() {
        let line = content.get(at.clone()).unwrap_or_default();
        let indent = line.len().saturating_sub(line.trim_ascii_start().len());
        let start = at.start.saturating_add(indent);
        let body = line.trim_ascii();
        let Some(equals) = body.iter().position(|byte| *byte == b'=') else { continue };
        let (key, value) = body.split_at(equals);
        let value_start = start.saturating_add(equals).saturating_add(1);
        let value = value.get(1..).unwrap_or_default();
        if key == b"GRUB_DISABLE_LINUX_UUID" && says_true(value) {
            edits.push((start..start, "#".to_owned()));
            continue;
        }
        if !key.starts_with(b"GRUB_CMDLINE_LINUX") {
            continue;
        }
        let quoted = value.first().is_some_and(|byte| matches!(byte, b'"' | b'\''))
            && value.len() >= 2
            && value.first() == value.last();
        let inner = if quoted {
            value_start.saturating_add(1)..value_start.saturating_add(value.len()).saturating_sub(1)
        } else {
            value_start..value_start.saturating_add(value.len())
        };
        let text = content.get(inner.clone()).unwrap_or_default();
        let words = words(text, inner.start);
        has_console |= words
            .iter()
            .any(|at| content.get(at.clone()).is_some_and(|word| word.starts_with(b"console=")));
        let place = format!("line {} of {path}", number.saturating_add(1));
        edits.extend(arguments_renamed(draft, content, &words, machine, true, &place));
        if key == b"GRUB_CMDLINE_LINUX" {
            place_for_console = Some((inner, quoted));
        }
    }
    if serial && !has_console {
        match place_for_console {
            Some((inner, true)) => {
                let space = if inner.is_empty() { "" } else { " " };
                edits.push((inner.end..inner.end, format!("{space}{SERIAL}")));
            }
            // Without quotes the value may hold no space: it gets them.
            Some((inner, false)) => {
                let space = if inner.is_empty() { "" } else { " " };
                edits.insert(0, (inner.start..inner.start, "\"".to_owned()));
                edits.push((inner.end..inner.end, format!("{space}{SERIAL}\"")));
            }
            None => {
                let end = content.len();
                let newline =
                    if content.last().is_none_or(|byte| *byte == b'\n') { "" } else { "\n" };
                edits.push((end..end, format!("{newline}GRUB_CMDLINE_LINUX=\"{SERIAL}\"\n")));
            }
        }
    }
    edits.sort_by_key(|(range, _)| range.start);
    replaced(content, &edits)
}

fn says_true(value: &[u8]) -> bool {
    value.iter().filter(|byte| byte.is_ascii_alphabetic()).eq(b"true")
}

/// New values for `root=`, `resume=` and the consoles of Xen among some words.
fn arguments_renamed(
    draft: &mut Draft<'_>,
    content: &[u8],
    words: &[Range<usize>],
    machine: &MachineFacts,
    has_initrd: bool,
    place: &str,
) -> Vec<(Range<usize>, String)> {
    let mut edits = Vec::new();
    for at in words {
        let Some(word) = content.get(at.clone()).and_then(|word| std::str::from_utf8(word).ok())
        else {
            continue;
        };
        let Some((key, value)) = word.split_once('=') else { continue };
        if key == "console" {
            if let Some(rest) = value.strip_prefix("hvc0").or_else(|| value.strip_prefix("xvc0")) {
                edits.push((at.clone(), format!("console=ttyS0{rest}")));
            }
            continue;
        }
        let (device, rest) = match value.split_once(':') {
            Some((device, _)) if !value.starts_with("/dev/disk/") => {
                (device, value.strip_prefix(device).unwrap_or_default())
            }
            _ => (value, ""),
        };
        match (key, named(device, machine)) {
            ("root" | "resume" | "cryptdevice", Named::Moves(moves)) => {
                let new = if has_initrd { moves.stable_name() } else { moves.kernel_known_name() };
                edits.push((at.clone(), format!("{key}={new}{rest}")));
            }
            (_, Named::Moves(_)) => {
                draft.warn("device-name", format!("{place} has {word}, which gets a new name"));
            }
            ("root" | "resume", Named::Lost) => {
                draft.warn("unknown-disk", format!("{place} has {word}, which is no known disk"));
            }
            _ => {}
        }
    }
    edits
}

/// Gives every word that names a disk the kernel's new name.
fn words_renamed(content: &[u8], machine: &MachineFacts) -> Vec<u8> {
    let edits: Vec<_> = words(content, 0)
        .into_iter()
        .filter_map(|at| {
            let word = std::str::from_utf8(content.get(at.clone())?).ok()?;
            match named(word, machine) {
                Named::Moves(moves) => Some((at, moves.new_name())),
                Named::Lost | Named::Stays => None,
            }
        })
        .collect();
    replaced(content, &edits)
}

/// Where the lines lie, without their ends.
fn lines(content: &[u8]) -> Vec<Range<usize>> {
    let mut start = 0_usize;
    content
        .split_inclusive(|byte| *byte == b'\n')
        .map(|line| {
            let begin = start;
            start = start.saturating_add(line.len());
            let text = line.strip_suffix(b"\n").unwrap_or(line);
            let text = text.strip_suffix(b"\r").unwrap_or(text);
            begin..begin.saturating_add(text.len())
        })
        .collect()
}

/// Where the words of a text that begins at `start` lie.
fn words(text: &[u8], start: usize) -> Vec<Range<usize>> {
    let mut at = start;
    text.split(u8::is_ascii_whitespace)
        .map(|word| {
            let begin = at;
            at = at.saturating_add(word.len()).saturating_add(1);
            begin..begin.saturating_add(word.len())
        })
        .filter(|range| !range.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::tests::disk;
    use tranship_inspect::folder::FolderTree;

    fn with_draft(
        change: impl FnOnce(&mut Draft<'_>, &MachineFacts) -> Vec<u8>,
    ) -> (String, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let tree = FolderTree::new(dir.path());
        let mut draft = Draft::new(&tree);
        let machine = MachineFacts {
            disks: vec![disk("sda", "vda", &[(1, "u1"), (5, "swap")])],
            ..MachineFacts::default()
        };
        let new = change(&mut draft, &machine);
        let warnings = draft.plan.warnings.into_iter().map(|w| w.what).collect();
        (String::from_utf8(new).unwrap(), warnings)
    }

    #[test]
    fn boot_lines_change_by_word() {
        let path = GuestPath::of("/boot/grub/grub.cfg");
        for (serial, old, new) in [
            (
                false,
                "\tlinux\t/vmlinuz root=/dev/sda1 ro  quiet\r\n\tinitrd\t/i\n}\n",
                "\tlinux\t/vmlinuz root=UUID=u1 ro  quiet\r\n\tinitrd\t/i\n}\n",
            ),
            (
                false,
                "linux /v root=/dev/sda1\n}\ninitrd /i\n",
                "linux /v root=PARTUUID=part-u1\n}\ninitrd /i\n",
            ),
            (
                true,
                "linuxefi /v root=UUID=u1 ro \ninitrdefi /i\n",
                "linuxefi /v root=UUID=u1 ro console=ttyS0,115200 console=tty0 \ninitrdefi /i\n",
            ),
            (true, "linux /v root=UUID=u1 console=tty1", "linux /v root=UUID=u1 console=tty1"),
            (
                true,
                "linux /v resume=/dev/sda5 root=LABEL=x console=hvc0,9600\ninitrd /i",
                "linux /v resume=UUID=swap root=LABEL=x console=ttyS0,9600\ninitrd /i",
            ),
            (true, "linux16 /memtest86+.bin\n", "linux16 /memtest86+.bin\n"),
            (
                true,
                "# linux /v root=/dev/sda1\nset root='hd0,msdos1'\n",
                "# linux /v root=/dev/sda1\nset root='hd0,msdos1'\n",
            ),
        ] {
            let (found, warnings) = with_draft(|draft, machine| {
                boot_lines(draft, old.as_bytes(), machine, &path, serial)
            });
            assert_eq!(found, new);
            assert!(warnings.is_empty());
        }
    }

    #[test]
    fn default_settings_keep_their_form() {
        let path = GuestPath::of("/etc/default/grub");
        for (serial, old, new) in [
            (
                true,
                "A=1\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX=\"\"\n",
                "A=1\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX=\"console=ttyS0,115200 console=tty0\"\n",
            ),
            (
                true,
                "GRUB_CMDLINE_LINUX=resume=/dev/sda5\n",
                "GRUB_CMDLINE_LINUX=\"resume=UUID=swap console=ttyS0,115200 console=tty0\"\n",
            ),
            (
                true,
                "GRUB_CMDLINE_LINUX=quiet",
                "GRUB_CMDLINE_LINUX=\"quiet console=ttyS0,115200 console=tty0\"",
            ),
            (true, "X=1", "X=1\nGRUB_CMDLINE_LINUX=\"console=ttyS0,115200 console=tty0\"\n"),
            (
                true,
                "GRUB_CMDLINE_LINUX='resume=/dev/sda5 console=tty1'\n",
                "GRUB_CMDLINE_LINUX='resume=UUID=swap console=tty1'\n",
            ),
            (false, "GRUB_DISABLE_LINUX_UUID=true\n", "#GRUB_DISABLE_LINUX_UUID=true\n"),
            (false, "#GRUB_DISABLE_LINUX_UUID=true\n", "#GRUB_DISABLE_LINUX_UUID=true\n"),
            (false, "GRUB_CMDLINE_LINUX=\"\nunfinished", "GRUB_CMDLINE_LINUX=\"\nunfinished"),
        ] {
            let (found, _) = with_draft(|draft, machine| {
                defaults(draft, old.as_bytes(), machine, &path, serial)
            });
            assert_eq!(found, new);
        }
    }

    #[test]
    fn unknown_arguments_with_a_disk_are_warned_about() {
        let path = GuestPath::of("/g");
        let old = b"\nlinux /v root=UUID=u1 crashdisk=/dev/sda5 resume=/dev/sdq1\ninitrd /i\n";
        let (_, warnings) =
            with_draft(|draft, machine| boot_lines(draft, old, machine, &path, false));
        assert_eq!(
            warnings,
            [
                "line 2 of /g has crashdisk=/dev/sda5, which gets a new name",
                "line 2 of /g has resume=/dev/sdq1, which is no known disk",
            ]
        );
    }

    #[test]
    fn the_device_map_gets_kernel_names() {
        let (found, _) =
            with_draft(|_, machine| words_renamed(b"(hd0)\t/dev/sda\n(fd0)\t/dev/fd0\n", machine));
        assert_eq!(found, "(hd0)\t/dev/vda\n(fd0)\t/dev/fd0\n");
    }
}
