// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What starts the kernel, and which kernels it can start.

use crate::Result;
use crate::facts::path_list_text;
use crate::reader::{Reader, assignment};
use serde::Serialize;
use tranship_protocol::GuestPath;

/// Most entries that are looked at.
const MAX_ENTRIES: usize = 512;

/// What starts the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bootloader {
    /// Which program.
    pub kind: BootloaderKind,
    /// Its configuration files; for GRUB 2 the ones that hold entries come first.
    #[serde(serialize_with = "path_list_text")]
    pub configs: Vec<GuestPath>,
    /// Whether entries lie in files of their own (Boot Loader Specification).
    pub entry_files: bool,
    /// What it can start, the default first.
    pub entries: Vec<BootEntry>,
}

/// Which program starts the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootloaderKind {
    /// GRUB 2.
    Grub2,
    /// GRUB before version 1.
    GrubLegacy,
    /// systemd-boot.
    SystemdBoot,
    /// Extlinux or syslinux.
    Extlinux,
    /// None was found.
    None,
}

/// One thing that a bootloader can start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BootEntry {
    /// The kernel's image as the bootloader names it.
    pub kernel: String,
    /// Arguments of the kernel.
    pub arguments: Vec<String>,
    /// Initramfs files, as the bootloader names them.
    pub initrds: Vec<String>,
}

impl BootEntry {
    /// File name of the kernel's image.
    pub fn kernel_name(&self) -> &str {
        self.kernel.rsplit('/').next().unwrap_or_default()
    }
}

/// Finds the bootloader by its configuration.
pub(crate) fn bootloader(reader: &Reader<'_>) -> Result<Bootloader> {
    let mut grub2 =
        vec![GuestPath::of("/boot/grub/grub.cfg"), GuestPath::of("/boot/grub2/grub.cfg")];
    for name in reader.names("/boot/efi/EFI")? {
        grub2.push(GuestPath::of("/boot/efi/EFI").join(name).join("grub.cfg"));
    }
    let mut entries = entry_files(reader, "/boot/loader/entries")?;
    let has_entry_files = !entries.is_empty();
    let mut configs = Vec::new();
    for path in grub2 {
        let Some(text) = reader.text(path.clone())? else { continue };
        configs.push(path);
        if entries.is_empty() {
            entries = grub_entries(&text);
        }
    }
    if !configs.is_empty() {
        return Ok(found(BootloaderKind::Grub2, configs, has_entry_files, entries));
    }
    for path in ["/boot/grub/menu.lst", "/boot/grub/grub.conf"] {
        if let Some(text) = reader.text(path)? {
            let configs = vec![GuestPath::of(path)];
            return Ok(found(BootloaderKind::GrubLegacy, configs, false, legacy_entries(&text)));
        }
    }
    for directory in ["/boot", "/boot/efi", "/efi"] {
        let config = GuestPath::of(directory).join("loader/loader.conf");
        if reader.has_file(config.clone())? {
            let entries = entry_files(reader, &format!("{directory}/loader/entries"))?;
            return Ok(found(BootloaderKind::SystemdBoot, vec![config], true, entries));
        }
    }
    for path in
        ["/boot/extlinux/extlinux.conf", "/boot/syslinux/syslinux.cfg", "/boot/extlinux.conf"]
    {
        if let Some(text) = reader.text(path)? {
            let configs = vec![GuestPath::of(path)];
            return Ok(found(BootloaderKind::Extlinux, configs, false, extlinux_entries(&text)));
        }
    }
    Ok(found(BootloaderKind::None, Vec::new(), has_entry_files, entries))
}

fn found(
    kind: BootloaderKind,
    configs: Vec<GuestPath>,
    entry_files: bool,
    mut entries: Vec<BootEntry>,
) -> Bootloader {
    entries.truncate(MAX_ENTRIES);
    Bootloader { kind, configs, entry_files, entries }
}

/// Entries of a `grub.cfg`: each `linux` line and the `initrd` line that follows it.
pub(crate) fn grub_entries(text: &str) -> Vec<BootEntry> {
    let mut entries: Vec<BootEntry> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("linux" | "linux16" | "linuxefi") => {
                let Some(kernel) = words.next() else { continue };
                entries.push(BootEntry {
                    kernel: kernel.to_owned(),
                    arguments: words.map(str::to_owned).collect(),
                    initrds: Vec::new(),
                });
            }
            Some("initrd" | "initrd16" | "initrdefi") => {
                if let Some(entry) = entries.last_mut() {
                    entry.initrds.extend(words.map(str::to_owned));
                }
            }
            _ => {}
        }
    }
    entries
}

fn legacy_entries(text: &str) -> Vec<BootEntry> {
    let mut entries: Vec<BootEntry> = Vec::new();
    for line in text.lines() {
        let mut words =
            line.split(|c: char| c.is_whitespace() || c == '=').filter(|w| !w.is_empty());
        match words.next() {
            Some("kernel") => {
                let mut words = line.split_whitespace().skip(1);
                let Some(kernel) = words.next() else { continue };
                entries.push(BootEntry {
                    kernel: kernel.to_owned(),
                    arguments: words.map(str::to_owned).collect(),
                    initrds: Vec::new(),
                });
            }
            Some("initrd") => {
                if let Some(entry) = entries.last_mut() {
                    entry.initrds.extend(words.map(str::to_owned));
                }
            }
            _ => {}
        }
    }
    entries
}

fn extlinux_entries(text: &str) -> Vec<BootEntry> {
    let mut entries: Vec<BootEntry> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default().to_ascii_lowercase();
        match (key.as_str(), entries.last_mut()) {
            ("linux" | "kernel", _) => entries.extend(words.next().map(|kernel| BootEntry {
                kernel: kernel.to_owned(),
                arguments: Vec::new(),
                initrds: Vec::new(),
            })),
            ("initrd", Some(entry)) => {
                entry.initrds.extend(words.flat_map(|word| word.split(',')).map(str::to_owned));
            }
            ("append", Some(entry)) => entry.arguments.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    entries
}

/// Entries of the Boot Loader Specification, the newest name first as the menu shows them.
fn entry_files(reader: &Reader<'_>, directory: &str) -> Result<Vec<BootEntry>> {
    let mut names = reader.names(directory)?;
    names.retain(|name| name.ends_with(".conf"));
    names.sort_by(|a, b| crate::kernels::compare_versions(b, a));
    let mut entries = Vec::new();
    for name in names.iter().take(MAX_ENTRIES) {
        let Some(text) = reader.text(GuestPath::of(directory).join(name))? else { continue };
        let values = |key: &'static str| {
            text.lines().filter_map(move |line| {
                line.trim().strip_prefix(key)?.strip_prefix(char::is_whitespace).map(str::trim)
            })
        };
        let Some(kernel) = values("linux").next() else { continue };
        entries.push(BootEntry {
            kernel: kernel.to_owned(),
            arguments: values("options")
                .flat_map(str::split_whitespace)
                .map(str::to_owned)
                .collect(),
            initrds: values("initrd").flat_map(str::split_whitespace).map(str::to_owned).collect(),
        });
    }
    Ok(entries)
}

/// The kernel image that starts by itself, as far as the configuration says.
///
/// A saved choice is looked up by the kernel version in its name; otherwise it is the
/// first entry, which is what `default=0` means.
pub(crate) fn default_image(
    reader: &Reader<'_>,
    bootloader: &Bootloader,
) -> Result<Option<String>> {
    let first = bootloader.entries.first().map(|entry| entry.kernel_name().to_owned());
    let defaults = reader.text("/etc/default/grub")?.unwrap_or_default();
    let mut wanted = assignment(&defaults, "GRUB_DEFAULT").unwrap_or("0").to_owned();
    if wanted == "saved" || bootloader.entry_files {
        for path in ["/boot/grub/grubenv", "/boot/grub2/grubenv"] {
            if let Some(text) = reader.text(path)?
                && let Some(saved) = assignment(&text, "saved_entry")
            {
                saved.clone_into(&mut wanted);
            }
        }
    }
    let mut by_name: Vec<&str> = bootloader
        .entries
        .iter()
        .map(BootEntry::kernel_name)
        .filter(|name| name.split_once('-').is_some_and(|(_, version)| wanted.contains(version)))
        .collect();
    by_name.sort_by_key(|name| std::cmp::Reverse(name.len()));
    Ok(by_name.first().map(|name| (*name).to_owned()).or(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grub_entries_pair_kernels_with_their_initramfs() {
        let text = "menuentry 'Debian' {\n\tlinux\t/vmlinuz-6.1 root=/dev/sda1 ro quiet\n\tinitrd\t/initrd.img-6.1\n}\n\
                    menuentry 'x' {\n linuxefi /vmlinuz-5 ro\n}\nlinux\n";
        let entries = grub_entries(text);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].kernel_name(), "vmlinuz-6.1");
        assert_eq!(entries[0].arguments, ["root=/dev/sda1", "ro", "quiet"]);
        assert_eq!(entries[0].initrds, ["/initrd.img-6.1"]);
        assert!(entries[1].initrds.is_empty());
    }

    #[test]
    fn extlinux_and_grub_legacy_are_read_too() {
        let ext =
            extlinux_entries("LABEL l\n  LINUX ../v-1\n  INITRD ../i-1\n  APPEND root=/dev/sda1\n");
        assert_eq!((ext[0].kernel_name(), ext[0].arguments.len()), ("v-1", 1));
        let legacy = legacy_entries("title x\nkernel /vmlinuz-2.6 root=/dev/sda1\ninitrd=/i\n");
        assert_eq!(legacy[0].initrds, ["/i"]);
    }
}
