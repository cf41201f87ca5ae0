// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Works out the whole conversion and everything that stands in its way.

use crate::draft::Draft;
use crate::drivers::{self, WANTED, Wanted};
use crate::machine::{InitramfsMethod, MachineFacts, Options};
use crate::plan::{AppendInitramfs, Blocker, DeviceChange, Plan, Step};
use crate::{firmware, firstboot, grub, network, space, tables, tools};
use std::collections::BTreeMap;
use tranship_inspect::{
    BootloaderKind, ErrorKind, Facts, Family, GuestTree, Kernel, Result, Support,
};
use tranship_protocol::GuestPath;

/// Works out every change; nothing is touched.
///
/// The plan of a guest that is converted already is empty.
///
/// # Errors
///
/// The outer one: the guest's files or the appliance failed. The inner one: everything
/// that stands in the way, not only the first thing.
pub fn plan(
    facts: &Facts,
    tree: &dyn GuestTree,
    machine: &MachineFacts,
    options: &Options,
) -> Result<std::result::Result<Plan, Vec<Blocker>>> {
    let mut draft = Draft::new(tree);
    supported(&mut draft, facts);
    for disk in machine.disks.iter().filter(|disk| disk.source_name != disk.target_name) {
        let (from, to) = (disk.source_name.clone(), disk.target_name.clone());
        draft.plan.devices.push(DeviceChange::Disk { from, to });
    }
    let started = started_kernels(&mut draft, facts);
    tables::plan(&mut draft, machine)?;
    grub::plan(&mut draft, facts, machine, options.serial_console)?;
    let links = network::plan(&mut draft, facts, machine)?;
    tools::plan(&mut draft, facts)?;
    firmware::plan(&mut draft, facts, machine.firmware)?;
    firstboot::plan(&mut draft, facts, machine, options)?;
    let appended = match options.initramfs {
        InitramfsMethod::Append => {
            let appended = append(&mut draft, &started, machine, &links)?;
            keep_in_rebuilds(&mut draft, &started)?;
            appended
        }
        InitramfsMethod::Guest => {
            keep_in_rebuilds(&mut draft, &started)?;
            rebuild(&mut draft, &started)?;
            Vec::new()
        }
    };
    // The files come first, so that an initramfs made by the guest's own tool has them.
    let programs = draft.take_programs();
    draft.finish();
    space::check(&mut draft, appended, &programs)?;
    draft.plan.steps.extend(programs);
    if draft.blockers.is_empty() { Ok(Ok(draft.plan)) } else { Ok(Err(draft.blockers)) }
}

/// What kinds of guests are not converted at all.
fn supported(draft: &mut Draft<'_>, facts: &Facts) {
    if facts.os.family != Family::Debian {
        let name = facts.os.product_name.as_deref().unwrap_or(&facts.os.distro);
        let what = format!("{name} is not of the Debian family");
        draft.block(
            "unsupported-distribution",
            what,
            "copy its disks without a conversion and keep the SATA bus",
        );
    }
    match facts.bootloader.kind {
        BootloaderKind::Grub2 => {}
        BootloaderKind::None => draft.block(
            "no-bootloader",
            "no configuration of a bootloader was found in /boot".to_owned(),
            "check that the partition of /boot is among the guest's disks and in its fstab",
        ),
        kind => {
            let what = format!("the guest starts by {kind:?}, whose files are not edited");
            draft.block(
                "unsupported-bootloader",
                what,
                "install GRUB 2 in the guest before the move",
            );
        }
    }
}

/// Kernels that the bootloader can start, the default one first; only these matter.
fn started_kernels<'f>(draft: &mut Draft<'_>, facts: &'f Facts) -> Vec<&'f Kernel> {
    if facts.kernels.is_empty() {
        draft.block(
            "no-kernel",
            "no kernel was found: no /boot/vmlinuz-* and no /lib/modules/*/vmlinuz".to_owned(),
            "check that the partition of /boot is among the guest's disks and in its fstab",
        );
        return Vec::new();
    }
    let entries = &facts.bootloader.entries;
    let can_start = |kernel: &&Kernel| {
        let name = kernel.image.file_name();
        entries.is_empty() || entries.iter().any(|entry| entry.kernel_name().as_bytes() == name)
    };
    let mut started: Vec<&Kernel> = facts.kernels.iter().filter(can_start).collect();
    if started.is_empty() {
        // Entries may name links such as /vmlinuz.
        started = facts.kernels.iter().collect();
    }
    let default = facts.default_kernel.as_ref();
    started.sort_by_key(|kernel| Some(&kernel.version) != default);
    let (able, unable): (Vec<&Kernel>, Vec<&Kernel>) = started.into_iter().partition(|kernel| {
        kernel.virtio.block != Support::Absent && kernel.virtio.pci != Support::Absent
    });
    for kernel in unable {
        let version = &kernel.version;
        let what = format!("kernel {version} has no driver for virtio disks");
        if able.is_empty() || Some(version) == default {
            draft.block(
                "no-virtio-driver",
                what,
                "install a kernel with virtio_blk and make it the default, or keep the SATA bus",
            );
        } else {
            draft.warn("no-virtio-driver", what);
        }
    }
    able
}

/// Works out what to append to the initramfs of each kernel.
fn append(
    draft: &mut Draft<'_>,
    kernels: &[&Kernel],
    machine: &MachineFacts,
    links: &BTreeMap<String, Vec<u8>>,
) -> Result<Vec<AppendInitramfs>> {
    let wanted = Wanted { machine, links };
    let mut appended = Vec::new();
    for kernel in kernels {
        let version = &kernel.version;
        let built_in =
            kernel.virtio.block == Support::Builtin && kernel.virtio.pci == Support::Builtin;
        let Some(initrd) = &kernel.initrd else {
            if !built_in {
                let what = format!(
                    "kernel {version} has no initramfs, and its virtio drivers are modules"
                );
                draft.block(
                    "no-initramfs",
                    what,
                    "make an initramfs for it in the guest before the move",
                );
            }
            continue;
        };
        match drivers::addition(draft, kernel, initrd, &wanted) {
            Ok(Some(addition)) => appended.push(addition),
            Ok(None) => draft.note(format!("{initrd} has all drivers already")),
            Err(error) => {
                let (code, remedy) = match error.kind() {
                    ErrorKind::Unsupported => (
                        "unsupported-initramfs",
                        "let the guest's own tool make it: --rebuild-initramfs=guest",
                    ),
                    ErrorKind::NotFound => (
                        "missing-modules",
                        "reinstall the kernel's package in the guest before the move",
                    ),
                    ErrorKind::Corrupt => (
                        "damaged-initramfs",
                        "make it anew in the guest before the move: update-initramfs -u",
                    ),
                    _ => return Err(error),
                };
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                draft.block(code, format!("{error}{}", cause.unwrap_or_default()), remedy);
            }
        }
    }
    Ok(appended)
}

/// The guest's next initramfs must hold the drivers as well.
fn keep_in_rebuilds(draft: &mut Draft<'_>, kernels: &[&Kernel]) -> Result<()> {
    let directory = GuestPath::of("/etc/initramfs-tools");
    if draft.tree.stat(&directory)?.is_none() || kernels.is_empty() {
        return Ok(());
    }
    let path = directory.join("modules");
    let mut content = draft.content(&path)?.unwrap_or_default();
    let text = String::from_utf8_lossy(&content).into_owned();
    let listed = |name: &str| text.lines().any(|line| line.split_whitespace().next() == Some(name));
    // Names that some kernel does not have only make update-initramfs silent.
    let needed = |name: &&&str| {
        !matches!(**name, "virtio_pci_modern_dev" | "virtio_pci_legacy_dev" | "sd_mod")
            && !listed(name)
    };
    let missing: Vec<&&str> = WANTED.iter().filter(needed).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if content.last().is_some_and(|byte| *byte != b'\n') {
        content.push(b'\n');
    }
    content.extend_from_slice(b"# Disks on KVM need these.\n");
    for name in missing {
        content.extend_from_slice(name.as_bytes());
        content.push(b'\n');
    }
    let why = "every initramfs that the guest makes from now on must hold the drivers";
    draft.write(&path, content, crate::draft::PLAIN, why)
}

/// Lets the guest's own tool make each initramfs anew.
fn rebuild(draft: &mut Draft<'_>, kernels: &[&Kernel]) -> Result<()> {
    let program = "/usr/sbin/update-initramfs";
    if draft.tree.stat(&GuestPath::of(program))?.is_none() {
        draft.block(
            "no-initramfs-tool",
            format!("{program} is not in the guest"),
            "use the default way, which runs no program of the guest",
        );
        return Ok(());
    }
    for kernel in kernels {
        draft.run(Step::RunProgram {
            program: program.to_owned(),
            arguments: vec!["-u".to_owned(), "-k".to_owned(), kernel.version.clone()],
            why: "makes the initramfs anew with the drivers for KVM".to_owned(),
        });
    }
    Ok(())
}
