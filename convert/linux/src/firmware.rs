// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The fallback loader of UEFI: boot entries lie in the machine, not on the disk, and do
//! not move along. `\EFI\BOOT\BOOTX64.EFI` is what a machine without entries starts.

use crate::draft::Draft;
use crate::machine::Firmware;
use crate::plan::Step;
use tranship_inspect::{Facts, FileKind, Result};
use tranship_protocol::GuestPath;

/// Puts the fallback loader in place where it is missing.
pub(crate) fn plan(draft: &mut Draft<'_>, facts: &Facts, firmware: Firmware) -> Result<()> {
    if firmware == Firmware::Bios {
        return Ok(());
    }
    let suffix = match facts.os.arch.as_deref() {
        None | Some("x86_64") => "x64",
        Some("aarch64") => "aa64",
        Some("i686") => "ia32",
        Some(arch) => {
            let what = format!("no UEFI fallback loader is known for {arch}");
            draft.warn("no-fallback-loader", what);
            return Ok(());
        }
    };
    let efi = GuestPath::of("/boot/efi/EFI");
    let fallback = format!("BOOT{}.EFI", suffix.to_uppercase());
    // The filesystem takes upper and lower case for the same.
    let boot = facts.efi_directories.iter().find(|name| name.eq_ignore_ascii_case("BOOT"));
    let boot = efi.join(boot.map_or("BOOT", String::as_str));
    if names(draft, &boot)?.iter().any(|name| name.eq_ignore_ascii_case(&fallback)) {
        return Ok(());
    }
    let (shim, grub) = (format!("shim{suffix}.efi"), format!("grub{suffix}.efi"));
    for directory in &facts.efi_directories {
        let from = efi.join(directory);
        let present = names(draft, &from)?;
        let find = |wanted: &str| present.iter().find(|name| name.eq_ignore_ascii_case(wanted));
        let Some(loader) = find(&shim).or_else(|| find(&grub)) else { continue };
        let why = "boot entries of the old firmware do not move along";
        let mut copy = |name: &str, to: &str| {
            draft.later(Step::Copy {
                from: from.join(name),
                to: boot.join(to),
                why: why.to_owned(),
            });
        };
        copy(loader, &fallback);
        for beside in [grub.as_str(), "grub.cfg"] {
            if let Some(name) = find(beside) {
                copy(name, beside);
            }
        }
        return Ok(());
    }
    let what = "no shim or GRUB was found on the EFI system partition: without a boot entry the guest does not start".to_owned();
    draft.warn("no-fallback-loader", what);
    Ok(())
}

fn names(draft: &Draft<'_>, directory: &GuestPath) -> Result<Vec<String>> {
    if draft.tree.stat(directory)?.is_none_or(|stat| stat.kind != FileKind::Directory) {
        return Ok(Vec::new());
    }
    let entries = draft.tree.read_dir(directory)?;
    Ok(entries.into_iter().filter_map(|entry| String::from_utf8(entry.name).ok()).collect())
}
