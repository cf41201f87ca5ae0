// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Converts a tree that looks like Debian 12 on VMware, from inspection to the last file.
// Outside of test functions a panic is how a test says that its set-up failed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod guest;

use guest::{BOOT_UUID, Guest, KERNEL, MAC, SWAP_UUID, unpacked};
use std::cell::RefCell;
use std::fs;
use tranship_inspect::{Facts, GuestTree, Ownership, Space, inspect_root};
use tranship_linux::{
    AgentPackage, Blocker, DeviceChange, Firmware, InitramfsMethod, MachineFacts, Options, Plan,
    Step, apply, plan,
};
use tranship_protocol::GuestPath;

fn facts(guest: &Guest) -> Facts {
    inspect_root(&guest.tree()).unwrap().expect("the tree is a root")
}

fn planned(guest: &Guest, machine: &MachineFacts, options: &Options) -> Plan {
    plan(&facts(guest), &guest.tree(), machine, options)
        .unwrap()
        .expect("nothing stands in the way")
}

fn blocked(guest: &Guest, options: &Options) -> Vec<Blocker> {
    plan(&facts(guest), &guest.tree(), &guest::machine(), options).unwrap().unwrap_err()
}

fn codes(blockers: &[Blocker]) -> Vec<&str> {
    blockers.iter().map(|blocker| blocker.code).collect()
}

fn content<'p>(plan: &'p Plan, wanted: &str) -> &'p str {
    plan.steps
        .iter()
        .find_map(|step| match step {
            Step::WriteFile { path, content, .. } if path.as_bytes() == wanted.as_bytes() => {
                Some(std::str::from_utf8(content).unwrap())
            }
            _ => None,
        })
        .unwrap_or_else(|| panic!("{wanted} is not written by:\n{plan}"))
}

#[test]
fn inspection_finds_what_the_plan_needs() {
    let facts = facts(&Guest::new());
    assert_eq!(facts.os.osinfo.as_deref(), Some("debian12"));
    assert_eq!(facts.os.hostname.as_deref(), Some("web01"));
    assert_eq!(facts.default_kernel.as_deref(), Some(KERNEL));
    assert_eq!(facts.kernels.len(), 1);
    assert_eq!(facts.tools.len(), 1);
    assert_eq!(facts.tools[0].packages, ["open-vm-tools"]);
    assert_eq!(facts.tools[0].units, ["open-vm-tools.service", "vgauth.service"]);
    let json = serde_json::to_value(&facts).unwrap();
    assert_eq!(json["kernels"][0]["initrd"], format!("/boot/initrd.img-{KERNEL}"));
    assert_eq!(json["os"]["init"]["systemd"]["version"], 252);
}

#[test]
fn the_plan_says_every_change_and_why() {
    let guest = Guest::new();
    let plan = planned(&guest, &guest::machine(), &Options::default());
    assert!(plan.warnings.is_empty(), "{plan}");
    let steps: Vec<String> = plan
        .steps
        .iter()
        .map(|step| match step {
            Step::AppendInitramfs(append) => format!("append to {}", append.initrd),
            step => step.to_string(),
        })
        .collect();
    assert_eq!(
        steps,
        [
            "write /etc/fstab",
            "write /etc/initramfs-tools/conf.d/resume",
            "write /boot/grub/grub.cfg",
            "write /etc/default/grub",
            "write /boot/grub/device.map",
            "write /etc/systemd/network/10-tranship-ens192.link",
            "write /usr/local/lib/tranship/firstboot",
            "write /etc/systemd/system/tranship-firstboot.service",
            "write /etc/initramfs-tools/modules",
            "link /etc/systemd/system/open-vm-tools.service to /dev/null",
            "link /etc/systemd/system/vgauth.service to /dev/null",
            "remove /etc/blkid.tab",
            "link /etc/systemd/system/multi-user.target.wants/tranship-firstboot.service to \
             /etc/systemd/system/tranship-firstboot.service",
            "append to /boot/initrd.img-6.1.0-21-amd64",
        ]
    );
    let text = plan.to_string();
    for line in [
        "disk sda becomes vda\n",
        "network card 00:50:56:aa:bb:01 becomes virtio and stays ens192\n",
        "   | -/dev/sda1 / ext4 errors=remount-ro 0 1\n",
        &format!("   | +UUID={BOOT_UUID} / ext4 errors=remount-ro 0 1\n"),
        "   modules: sd_mod, virtio, virtio_blk, virtio_pci, virtio_pci_legacy_dev, \
         virtio_pci_modern_dev, virtio_ring, virtio_scsi\n",
        "   the original stays as /boot/initrd.img-6.1.0-21-amd64.pre-tranship\n",
    ] {
        assert!(text.contains(line), "no {line:?} in:\n{text}");
    }
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["steps"][0]["step"], "write_file");
    assert_eq!(json["steps"][0]["path"], "/etc/fstab");
    assert_eq!(json["devices"][0]["device"], "disk");
}

#[test]
fn files_change_by_word_and_keep_everything_else() {
    let guest = Guest::new();
    let plan = planned(&guest, &guest::machine(), &Options::default());
    assert_eq!(
        content(&plan, "/etc/fstab"),
        format!(
            "# /etc/fstab\n/dev/sr0  /media/cdrom0 udf,iso9660 user,noauto 0 0\n\
             UUID={BOOT_UUID} / ext4 errors=remount-ro 0 1\nUUID={SWAP_UUID}\tnone\tswap\tsw\t0\t0\n"
        )
    );
    let root = format!("root=UUID={BOOT_UUID} ro  quiet console=ttyS0,115200 console=tty0\n");
    assert!(content(&plan, "/boot/grub/grub.cfg").contains(&root));
    let defaults = content(&plan, "/etc/default/grub");
    assert!(defaults.contains("GRUB_CMDLINE_LINUX=\"console=ttyS0,115200 console=tty0\"\n"));
    assert!(defaults.contains("\n#GRUB_DISABLE_LINUX_UUID=true\n"));
    assert_eq!(content(&plan, "/boot/grub/device.map"), "(hd0)\t/dev/vda\n");
    assert_eq!(
        content(&plan, "/etc/initramfs-tools/conf.d/resume"),
        format!("RESUME=UUID={SWAP_UUID}\n")
    );
    assert_eq!(
        content(&plan, "/etc/initramfs-tools/modules"),
        "# comment\n# Disks on KVM need these.\nvirtio\nvirtio_ring\nvirtio_pci\nvirtio_blk\nvirtio_scsi\n"
    );
    let link = content(&plan, "/etc/systemd/network/10-tranship-ens192.link");
    assert!(
        link.ends_with(&format!("[Match]\nPermanentMACAddress={MAC}\n\n[Link]\nName=ens192\n"))
    );
    let script = content(&plan, "/usr/local/lib/tranship/firstboot");
    assert!(script.contains("apt-get $options remove open-vm-tools\n"));
    assert!(script.contains("install qemu-guest-agent\n"));
    assert!(script.contains("grub-pc/install_devices multiselect /dev/vda'"));
}

#[test]
fn the_script_of_the_first_start_is_valid_shell() {
    let guest = Guest::new();
    let plan = planned(&guest, &guest::machine(), &Options::default());
    let script = content(&plan, "/usr/local/lib/tranship/firstboot");
    let file = guest.dir.path().join("script");
    fs::write(&file, script).unwrap();
    let status = std::process::Command::new("/bin/sh").arg("-n").arg(&file).status().unwrap();
    assert!(status.success(), "{script}");
}

#[test]
fn a_second_conversion_finds_nothing_to_do() {
    let guest = Guest::new();
    for options in [Options::default(), Options { serial_console: false, ..Options::default() }] {
        let first = planned(&guest, &guest::machine(), &options);
        let seen = RefCell::new(Vec::new());
        apply(&first, &guest.tree(), &|number, _| seen.borrow_mut().push(number)).unwrap();
        assert_eq!(seen.into_inner(), (0..first.steps.len()).collect::<Vec<_>>());
        let second = planned(&guest, &guest::machine(), &options);
        assert!(second.is_empty(), "{second}");
    }
}

#[test]
fn carrying_a_plan_out_twice_is_the_same_as_once() {
    let guest = Guest::new();
    let plan = planned(&guest, &guest::machine(), &Options::default());
    apply(&plan, &guest.tree(), &|_, _| {}).unwrap();
    let once = guest.files();
    apply(&plan, &guest.tree(), &|_, _| {}).unwrap();
    assert_eq!(guest.files(), once);
}

#[test]
fn a_changed_initramfs_stops_the_plan() {
    let guest = Guest::new();
    let plan = planned(&guest, &guest::machine(), &Options::default());
    guest.write(&format!("boot/initrd.img-{KERNEL}"), b"something else");
    let error = apply(&plan, &guest.tree(), &|_, _| {}).unwrap_err().to_string();
    assert!(error.contains("has changed since the plan was made"), "{error}");
}

#[test]
fn real_cpio_unpacks_the_drivers_from_old_and_new_layouts() {
    for (linked, microcode) in [(true, true), (true, false), (false, true), (false, false)] {
        let guest = Guest::new();
        let name = format!("boot/initrd.img-{KERNEL}");
        guest.write(&name, &guest::initramfs(linked, microcode, &[]));
        let plan = planned(&guest, &guest::machine(), &Options::default());
        apply(&plan, &guest.tree(), &|_, _| {}).unwrap();
        let Some(unpacked) = unpacked(&guest.read(&name), guest::early_parts(microcode)) else {
            return;
        };
        let lib = if linked { "usr/lib" } else { "lib" };
        let modules = unpacked.path().join(lib).join("modules").join(KERNEL);
        for file in ["kernel/virtio-blk.ko", "modules.dep", "modules.alias.bin"] {
            let packed = fs::read(modules.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
            assert_eq!(packed, guest.read(&format!("usr/lib/modules/{KERNEL}/{file}")));
        }
        assert!(!modules.join("kernel/virtio_net.ko").exists());
        // What was inside is still there, through the link as before.
        let own = unpacked.path().join("lib/modules").join(KERNEL).join("kernel/vmw_pvscsi.ko");
        assert_eq!(fs::read(own).unwrap(), b"pvscsi");
        assert_eq!(fs::symlink_metadata(unpacked.path().join("lib")).unwrap().is_symlink(), linked);
        let resume = fs::read_to_string(unpacked.path().join("conf/conf.d/resume")).unwrap();
        assert_eq!(resume, format!("RESUME=UUID={SWAP_UUID}\n"));
        let old = guest::initramfs(linked, microcode, &[]);
        assert_eq!(guest.read(&format!("{name}.pre-tranship")), old);
    }
}

#[test]
fn a_network_driver_inside_brings_the_name_rule_along() {
    let guest = Guest::new();
    let all = ["virtio", "virtio_ring", "virtio_pci", "virtio_pci_modern_dev"];
    let rest = ["virtio_pci_legacy_dev", "virtio-blk", "virtio_scsi", "sd_mod", "virtio_net"];
    let inside: Vec<&str> = all.into_iter().chain(rest).collect();
    guest.write(&format!("boot/initrd.img-{KERNEL}"), &guest::initramfs(true, false, &inside));
    let plan = planned(&guest, &guest::machine(), &Options::default());
    let append = plan
        .steps
        .iter()
        .find_map(|step| match step {
            Step::AppendInitramfs(append) => Some(append),
            _ => None,
        })
        .unwrap();
    assert!(append.modules.is_empty());
    assert_eq!(append.files, ["conf/conf.d/resume", "etc/systemd/network/10-tranship-ens192.link"]);
}

#[test]
fn network_cards_are_matched_by_slot_and_guesses_are_said() {
    let interfaces = b"auto ens224 ens192\niface ens224 inet dhcp\niface ens192 inet dhcp\n";
    let nic = |mac: &str, slot| tranship_linux::Nic { mac: mac.to_owned(), slot };
    for (slots, warnings) in [((Some(224), Some(192)), 0), ((None, None), 2)] {
        let guest = Guest::new();
        guest.write("etc/network/interfaces", interfaces);
        let mut machine = guest::machine();
        machine.nics = vec![nic("00:50:56:00:00:01", slots.0), nic("00:50:56:00:00:02", slots.1)];
        let plan = planned(&guest, &machine, &Options::default());
        let names: Vec<_> = plan
            .devices
            .iter()
            .filter_map(|device| match device {
                DeviceChange::Nic { name, .. } => name.as_deref(),
                DeviceChange::Disk { .. } => None,
            })
            .collect();
        let by_slot = slots.0.is_some();
        assert_eq!(names, if by_slot { ["ens224", "ens192"] } else { ["ens192", "ens224"] });
        assert_eq!(plan.warnings.len(), warnings, "{plan}");
    }
}

#[test]
fn everything_in_the_way_is_reported_at_once() {
    let guest = Guest::new();
    guest.write("etc/os-release", b"ID=alpine\nVERSION_ID=3.18\n");
    guest.remove("boot/grub/grub.cfg");
    guest.write(&format!("usr/lib/modules/{KERNEL}/modules.dep"), b"");
    let blockers = blocked(&guest, &Options::default());
    assert_eq!(codes(&blockers), ["unsupported-distribution", "no-bootloader", "no-virtio-driver"]);
    assert_eq!(
        blockers[2].to_string(),
        "kernel 6.1.0-21-amd64 has no driver for virtio disks [no-virtio-driver]; install a kernel \
         with virtio_blk and make it the default, or keep the SATA bus"
    );
}

#[test]
fn each_obstacle_has_its_code() {
    type Break = fn(&Guest);
    let initrd = format!("boot/initrd.img-{KERNEL}");
    let cases: [(&str, Break); 7] = [
        ("no-kernel", |guest| guest.remove(&format!("boot/vmlinuz-{KERNEL}"))),
        ("no-initramfs", |guest| guest.remove(&format!("boot/initrd.img-{KERNEL}"))),
        ("missing-modules", |guest| {
            guest.remove(&format!("usr/lib/modules/{KERNEL}/kernel/virtio-blk.ko"));
        }),
        ("damaged-initramfs", |guest| {
            let mut bytes = guest::initramfs(true, false, &[]);
            bytes.truncate(bytes.len() / 2);
            guest.write(&format!("boot/initrd.img-{KERNEL}"), &bytes);
        }),
        ("unsupported-initramfs", |guest| {
            guest.write(&format!("boot/initrd.img-{KERNEL}"), b"MZ unified kernel image");
        }),
        ("unsupported-initramfs", |guest| {
            guest.write(&format!("boot/initrd.img-{KERNEL}"), b"\x89LZO\0\r\n\x1a\n");
        }),
        ("unsupported-distribution", |guest| {
            guest.write("etc/os-release", b"ID=fedora\nVERSION_ID=40\n");
        }),
    ];
    for (code, break_it) in cases {
        let guest = Guest::new();
        break_it(&guest);
        assert_eq!(codes(&blocked(&guest, &Options::default())), [code], "{initrd}");
    }
}

#[test]
fn space_is_asked_for_to_the_byte() {
    let guest = Guest::new();
    let facts = facts(&guest);
    let with = |space: Space| {
        let tree = guest.tree().with_space(space);
        plan(&facts, &tree, &guest::machine(), &Options::default()).unwrap()
    };
    let roomy = Space { free_bytes: 1 << 30, free_inodes: Some(1000), read_only: false };
    assert!(with(roomy).is_ok());
    let blockers = with(Space { free_bytes: 10_000, free_inodes: Some(99), read_only: false });
    assert_eq!(codes(&blockers.unwrap_err()), ["no-space", "no-inodes"]);
    let blockers = with(Space { read_only: true, ..roomy }).unwrap_err();
    assert_eq!(codes(&blockers), ["read-only"]);
    // Room for the new initramfs, but not for a copy of the old one as well.
    let tight = with(Space { free_bytes: 1 << 20, ..roomy }).unwrap();
    assert!(tight.to_string().contains("no copy is kept"), "{tight}");
}

#[test]
fn the_guests_own_tool_runs_last_if_asked_for() {
    let guest = Guest::new();
    let options = Options { initramfs: InitramfsMethod::Guest, ..Options::default() };
    assert_eq!(codes(&blocked(&guest, &options)), ["no-initramfs-tool"]);
    guest.write("usr/sbin/update-initramfs", b"#!/bin/sh\n");
    let plan = planned(&guest, &guest::machine(), &options);
    assert_eq!(
        plan.steps.last().unwrap().to_string(),
        format!("run /usr/sbin/update-initramfs -u -k {KERNEL} in the guest")
    );
    let error = apply(&plan, &guest.tree(), &|_, _| {}).unwrap_err();
    assert_eq!(error.kind(), tranship_inspect::ErrorKind::Unsupported);
}

#[test]
fn the_uefi_fallback_is_copied_once() {
    let guest = Guest::new();
    for name in ["shimx64.efi", "grubx64.efi", "grub.cfg"] {
        guest.write(&format!("boot/efi/EFI/debian/{name}"), name.as_bytes());
    }
    let machine = MachineFacts { firmware: Firmware::Uefi, ..guest::machine() };
    let plan = planned(&guest, &machine, &Options::default());
    apply(&plan, &guest.tree(), &|_, _| {}).unwrap();
    assert_eq!(guest.read("boot/efi/EFI/BOOT/BOOTX64.EFI"), b"shimx64.efi");
    assert_eq!(guest.read("boot/efi/EFI/BOOT/grubx64.efi"), b"grubx64.efi");
    let second = planned(&guest, &machine, &Options::default());
    assert!(second.is_empty(), "{second}");
}

#[test]
fn given_packages_are_copied_in_and_strange_names_are_not() {
    let guest = Guest::new();
    let package = |name: &str| AgentPackage { name: name.to_owned(), content: vec![0xff] };
    let agent_packages =
        vec![package("qemu-guest-agent_7.2_amd64.deb"), package("../evil; rm.deb")];
    let plan =
        planned(&guest, &guest::machine(), &Options { agent_packages, ..Options::default() });
    apply(&plan, &guest.tree(), &|_, _| {}).unwrap();
    let directory = GuestPath::of("/usr/local/lib/tranship/packages");
    let names: Vec<_> =
        guest.tree().read_dir(&directory).unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(names, [b"qemu-guest-agent_7.2_amd64.deb"]);
    assert!(plan.steps.iter().all(|step| match step {
        Step::WriteFile { new: Ownership { uid, .. }, .. } => *uid == 0,
        _ => true,
    }));
}

#[test]
fn guests_without_systemd_get_rules_and_rc_links_instead() {
    let guest = Guest::new();
    for path in ["usr/sbin/init", "usr/lib/systemd/systemd"] {
        guest.remove(path);
    }
    guest.write("usr/sbin/init", b"sysvinit");
    guest.write("etc/inittab", b"# hvc0 is Xen's\nco:2345:respawn:/sbin/getty hvc0 9600 linux\n");
    guest.write("etc/init.d/open-vm-tools", b"#!/bin/sh\n");
    guest.write("etc/rc2.d/S02open-vm-tools", b"#!/bin/sh\n");
    guest.write("etc/rc2.d/S02ssh", b"#!/bin/sh\n");
    let plan = planned(&guest, &guest::machine(), &Options::default());
    assert_eq!(
        content(&plan, "/etc/inittab"),
        "# hvc0 is Xen's\nco:2345:respawn:/sbin/getty ttyS0 9600 linux\n"
    );
    let rules = content(&plan, "/etc/udev/rules.d/70-persistent-net.rules");
    assert!(rules.contains(&format!("ATTR{{address}}==\"{MAC}\"")), "{rules}");
    assert!(rules.contains("NAME=\"ens192\"\n"), "{rules}");
    let text = plan.to_string();
    assert!(text.contains("remove /etc/rc2.d/S02open-vm-tools\n"), "{text}");
    assert!(!text.contains("S02ssh"), "{text}");
    assert!(
        text.contains("link /etc/rc2.d/S99tranship-firstboot to ../init.d/tranship-firstboot\n")
    );
    apply(&plan, &guest.tree(), &|_, _| {}).unwrap();
    let second = planned(&guest, &guest::machine(), &Options::default());
    assert!(second.is_empty(), "{second}");
}

#[test]
fn names_of_the_kernel_are_left_alone_for_a_single_card() {
    let guest = Guest::new();
    guest.write("etc/network/interfaces", b"iface eth0 inet dhcp\n");
    let linked = |guest: &Guest| {
        let plan = planned(guest, &guest::machine(), &Options::default());
        plan.to_string().contains("10-tranship-eth0.link")
    };
    // With predictable names the card would be called otherwise on KVM.
    assert!(linked(&guest));
    let grub = String::from_utf8(guest.read("boot/grub/grub.cfg")).unwrap();
    guest.write("boot/grub/grub.cfg", grub.replace("quiet", "net.ifnames=0").as_bytes());
    assert!(!linked(&guest));
}

#[test]
fn old_udev_goes_by_the_current_address_and_the_driver() {
    let guest = Guest::new();
    guest.remove("usr/lib/systemd/libsystemd-shared-252.so");
    guest.write("usr/lib/systemd/libsystemd-shared-241.so", b"");
    let plan = planned(&guest, &guest::machine(), &Options::default());
    let link = content(&plan, "/etc/systemd/network/10-tranship-ens192.link");
    assert!(link.contains(&format!("[Match]\nMACAddress={MAC}\nDriver=virtio_net\n")), "{link}");
}
