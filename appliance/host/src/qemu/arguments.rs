// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's command line.

use crate::backend::{MachineSpec, SpecDisk};
use crate::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;
use tranship_protocol::{BULK_PORT, CONTROL_PORT, TOOLS_SERIAL};

/// A firmware that does little more than start a kernel: some 0.2 s less than `SeaBIOS` under
/// emulation. QEMU finds it by its name; the places are where distributions have it.
const QUICK_FIRMWARE: &str = "qboot.rom";
const QUICK_FIRMWARE_PLACES: &[&str] =
    &["/usr/share/qemu/qboot.rom", "/usr/share/qemu-kvm/qboot.rom"];

/// First free slot of the root bus: the chipset has 0 and 1, the serial bus and the tools 2.
const FIRST_SLOT: usize = 3;
/// Slots from [`FIRST_SLOT`] to 0x1e.
pub(super) const SLOTS: usize = 0x1f - FIRST_SLOT;
/// The slot after them has another bus, if there are many disks.
const BRIDGE_SLOT: usize = 0x1f;
/// Slots of that bus, of which the first is the bridge's own.
const BRIDGE_SLOTS: usize = 0x1f;
/// Functions of a slot.
const FUNCTIONS: usize = 8;
/// Up to this many disks have interrupts of their own: a processor has some 200 to give, and
/// each of these takes two.
const MOST_WITH_VECTORS: usize = 64;
/// Disks on the root bus.
const ON_ROOT: usize = SLOTS * FUNCTIONS;

/// The kind of machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chipset {
    /// i440FX: devices can be plugged into its root bus.
    Pc,
    /// Q35, where plugging takes a port for each device. RHEL's QEMU has none else for long.
    Q35,
}

impl Chipset {
    fn machine(self) -> &'static str {
        match self {
            Self::Pc => "pc,usb=off,smm=off,i8042=off,vmport=off,hpet=off,dump-guest-core=off",
            Self::Q35 => "q35,sata=off,smbus=off,smm=off,vmport=off,hpet=off,dump-guest-core=off",
        }
    }

    /// How many disks it can have.
    fn most_disks(self) -> usize {
        match self {
            Self::Pc => ON_ROOT + BRIDGE_SLOTS * FUNCTIONS,
            Self::Q35 => ON_ROOT,
        }
    }
}

/// What differs from one start to the next and is no part of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Descriptors {
    pub(super) control: i32,
    pub(super) bulk: i32,
    pub(super) qmp: i32,
}

/// How the machine is started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine<'a> {
    pub(super) kvm: bool,
    pub(super) chipset: Chipset,
    /// Frequency of the time-stamp counter, for emulation.
    pub(super) tsc_khz: Option<u64>,
    pub(super) spec: &'a MachineSpec,
}

/// Where a disk is plugged in: bus, slot and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    bus: &'static str,
    slot: usize,
    function: usize,
}

impl Place {
    /// Where the disk number `index` is plugged in that is there from the beginning: each has
    /// a slot for itself as long as that goes, since only slots can be unplugged.
    fn of(index: usize, chipset: Chipset) -> Self {
        let root = if chipset == Chipset::Pc { "pci.0" } else { "pcie.0" };
        match index.checked_sub(ON_ROOT) {
            None => Self { bus: root, slot: FIRST_SLOT + index % SLOTS, function: index / SLOTS },
            Some(more) => {
                Self { bus: "more", slot: 1 + more % BRIDGE_SLOTS, function: more / BRIDGE_SLOTS }
            }
        }
    }

    /// The slot of the root bus with this number, counted from 0.
    pub(super) fn whole_slot(number: usize) -> Self {
        Self::of(number, Chipset::Pc)
    }
}

impl Machine<'_> {
    /// The kernel's command line.
    fn kernel_words(&self) -> String {
        // No mitigations: one guest runs nothing but the agent and what it is asked for, and
        // the machine is the border. The rest leaves out probes for what is not there.
        let mut words = String::from(
            "console=ttyS0 quiet panic=-1 reboot=t mitigations=off cryptomgr.notests audit=0 \
             8250.nr_uarts=1 i8042.noaux i8042.nokbd random.trust_cpu=on selinux=0 \
             no_timer_check net.ifnames=0",
        );
        if !self.kvm {
            words.push_str(" tsc=reliable");
        }
        if let Some(khz) = self.tsc_khz {
            let _ = write!(words, " tsc_early_khz={khz}");
        }
        if !self.spec.append.is_empty() {
            let _ = write!(words, " {}", self.spec.append);
        }
        words
    }

    /// All words but the program's name.
    pub(super) fn arguments(&self, descriptors: Descriptors) -> Result<Vec<String>> {
        let spec = self.spec;
        let most = self.chipset.most_disks();
        if spec.disks.len() > most {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{} disks, at most {most} are possible", spec.disks.len()),
            ));
        }
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(ToString::to_string));
        let accelerator = if self.kvm { "kvm" } else { "tcg,thread=multi" };
        add(&["-accel", accelerator, "-machine", self.chipset.machine()]);
        add(&["-cpu", if self.kvm { "host" } else { "max" }]);
        if spec.huge_pages {
            let memory =
                format!("memory-backend-memfd,id=ram,size={}M,hugetlb=on", spec.memory_mib);
            add(&["-object", &memory, "-machine", "memory-backend=ram"]);
        }
        add(&["-smp", &spec.processors.to_string(), "-m", &spec.memory_mib.to_string()]);
        add(&["-nodefaults", "-no-user-config", "-display", "none"]);
        // A machine that came to its end by itself keeps its memory for whoever asks why.
        add(&["-action", "reboot=shutdown,shutdown=pause"]);
        add(&[
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]);
        if quick_firmware().is_some() {
            add(&["-bios", QUICK_FIRMWARE]);
        }
        add(&["-serial", "stdio", "-name", "tranship-appliance"]);
        add(&["-chardev", &format!("socket,id=qmp,fd={}", descriptors.qmp)]);
        add(&["-mon", "chardev=qmp,mode=control"]);
        add(&["-kernel", path_text(&spec.kernel)?, "-initrd", path_text(&spec.initramfs)?]);
        add(&["-append", &self.kernel_words()]);
        add(&["-device", "virtio-serial-pci,id=serial,addr=0x2.0,multifunction=on"]);
        for (number, (port, descriptor)) in
            [(CONTROL_PORT, descriptors.control), (BULK_PORT, descriptors.bulk)]
                .into_iter()
                .enumerate()
        {
            add(&["-chardev", &format!("socket,id=port{number},fd={descriptor}")]);
            add(&["-device", &format!("virtserialport,chardev=port{number},name={port}")]);
        }
        let tools = comma_escaped(path_text(&spec.tools)?);
        add(&[
            "-blockdev",
            &format!(
                "driver=raw,node-name=tools,read-only=on,file.driver=file,file.locking=off,\
                 file.filename={tools}"
            ),
            "-device",
            &format!("virtio-blk-pci,addr=0x2.1,drive=tools,serial={TOOLS_SERIAL}"),
        ]);
        if spec.disks.len() > ON_ROOT {
            add(&["-device", &format!("pci-bridge,id=more,chassis_nr=1,addr={BRIDGE_SLOT:#x}")]);
        }
        for (index, disk) in spec.disks.iter().enumerate() {
            let place = Place::of(index, self.chipset);
            let node = node(disk, path_text(&spec.disk_socket)?);
            let mut device = device(disk, place);
            if spec.disks.len() > MOST_WITH_VECTORS {
                device["vectors"] = 0.into();
            }
            // QEMU takes JSON here as well: no path and no name has to be escaped.
            add(&["-blockdev", &node.to_string(), "-device", &device.to_string()]);
        }
        Ok(arguments)
    }
}

/// The firmware that is used, if it is not QEMU's own.
pub(super) fn quick_firmware() -> Option<&'static Path> {
    QUICK_FIRMWARE_PLACES.iter().map(Path::new).find(|place| place.is_file())
}

/// A disk as QEMU's block layer gets it.
pub(super) fn node(disk: &SpecDisk, socket: &str) -> Value {
    json!({
        "driver": "nbd",
        "node-name": disk.export,
        "server": { "type": "unix", "path": socket },
        "export": disk.export,
        "discard": "unmap",
        "read-only": disk.read_only,
        "cache": { "no-flush": !disk.durable },
    })
}

/// A disk as the machine gets it.
pub(super) fn device(disk: &SpecDisk, place: Place) -> Value {
    let Place { bus, slot, function } = place;
    // QEMU's default is to stop the machine on a full disk and wait for somebody to make
    // room. Nobody would: the agent has to see the error.
    json!({
        "driver": "virtio-blk-pci",
        "id": disk.serial,
        "drive": disk.export,
        "serial": disk.serial,
        "bus": bus,
        "addr": format!("{slot:#x}.{function}"),
        "multifunction": true,
        "logical_block_size": disk.sector_size,
        "physical_block_size": 4096,
        "werror": "report",
        "rerror": "report",
    })
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(ErrorKind::Usage, format!("{}: the path is not UTF-8", path.display()))
    })
}

/// QEMU takes a comma for the end of a value unless it is doubled.
fn comma_escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::os::unix::net::UnixStream;

    pub(in super::super) fn spec(disks: usize) -> MachineSpec {
        let (control, _) = UnixStream::pair().unwrap();
        let (bulk, _) = UnixStream::pair().unwrap();
        let disk = |index| SpecDisk {
            image: None,
            export: format!("disk{index}"),
            serial: format!("tranship-{index}"),
            read_only: false,
            sector_size: 512,
            durable: false,
        };
        MachineSpec {
            kernel: "/c/vmlinux".into(),
            initramfs: "/c/initramfs".into(),
            tools: "/c/to,ols".into(),
            memory_mib: 512,
            huge_pages: false,
            processors: 1,
            append: String::new(),
            disk_socket: "/s/nbd".into(),
            disks: (0..disks).map(disk).collect(),
            control,
            bulk,
        }
    }

    fn arguments(chipset: Chipset, disks: usize) -> Result<Vec<String>> {
        let spec = spec(disks);
        let machine = Machine { kvm: false, chipset, tsc_khz: Some(1000), spec: &spec };
        machine.arguments(Descriptors::default())
    }

    #[test]
    fn a_full_disk_does_not_stop_the_machine() {
        let arguments = arguments(Chipset::Pc, 2).unwrap();
        let reported =
            arguments.iter().filter(|word| word.contains(r#""werror":"report""#)).count();
        assert_eq!(reported, 2);
    }

    #[test]
    fn commas_in_paths_do_not_end_a_value() {
        let arguments = arguments(Chipset::Pc, 0).unwrap();
        assert!(arguments.iter().any(|word| word.ends_with("file.filename=/c/to,,ols")));
    }

    #[test]
    fn every_disk_has_a_place_of_its_own_until_there_are_too_many() {
        for (chipset, most) in [(Chipset::Pc, 472), (Chipset::Q35, 224)] {
            let places: HashSet<String> = arguments(chipset, most)
                .unwrap()
                .iter()
                .filter_map(|word| serde_json::from_str::<Value>(word).ok())
                .filter(|word| word["driver"] == "virtio-blk-pci")
                .map(|word| format!("{} {}", word["bus"], word["addr"]))
                .collect();
            assert_eq!(places.len(), most);
            let error = arguments(chipset, most + 1).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn few_disks_have_a_slot_each() {
        let slots: HashSet<usize> =
            (0..SLOTS).map(|index| Place::of(index, Chipset::Pc).slot).collect();
        assert_eq!(slots.len(), SLOTS);
        assert!(!slots.contains(&BRIDGE_SLOT) && !slots.contains(&2));
    }
}
