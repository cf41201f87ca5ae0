// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backend that runs the machine in QEMU, with KVM or with emulation.

use crate::backend::{Backend, Machine, MachineSpec, SnapshotFiles, SpecDisk};
use crate::process::{MachineProcess, Process};
use crate::{Error, ErrorKind, Result, clock};
use rustix::fd::{AsRawFd, OwnedFd};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use tranship_protocol::{BULK_PORT, CONTROL_PORT, TOOLS_SERIAL};

/// Where distributions put the program, in the order of preference.
const PLACES: &[&str] = &[
    "/usr/bin/qemu-system-x86_64",
    "/usr/local/bin/qemu-system-x86_64",
    "/usr/bin/qemu-kvm",
    "/usr/libexec/qemu-kvm",
];

/// A firmware that does little more than start a kernel: some 0.2 s less than `SeaBIOS` under
/// emulation. QEMU finds it by its name; the places are where distributions have it.
const QUICK_FIRMWARE: &str = "qboot.rom";
const QUICK_FIRMWARE_PLACES: &[&str] =
    &["/usr/share/qemu/qboot.rom", "/usr/share/qemu-kvm/qboot.rom"];

/// First free slot of the root bus; 0 to 2 are the bridge, the serial bus and the tools.
const FIRST_DISK_SLOT: usize = 3;
/// Slots from [`FIRST_DISK_SLOT`] to 0x1e with eight functions each; 0x1f is the chipset's.
const MOST_DISKS: usize = (0x1f - FIRST_DISK_SLOT) * 8;

/// QEMU, with or without KVM.
#[derive(Clone, Debug)]
pub(crate) struct Qemu {
    program: PathBuf,
    kvm: bool,
}

impl Qemu {
    pub(crate) fn new(program: PathBuf, kvm: bool) -> Self {
        Self { program, kvm }
    }

    /// The installed QEMU, if there is one.
    pub(crate) fn find() -> Option<PathBuf> {
        PLACES.iter().map(PathBuf::from).find(|place| place.is_file())
    }

    /// The kernel's command line.
    fn kernel_words(&self, spec: &MachineSpec) -> String {
        // No mitigations: one guest runs nothing but the agent and what it is asked for, and
        // the machine is the border. The rest leaves out probes for what is not there.
        let mut words = String::from(
            "console=ttyS0 quiet panic=-1 reboot=t mitigations=off cryptomgr.notests audit=0 \
             8250.nr_uarts=1 i8042.noaux i8042.nokbd random.trust_cpu=on selinux=0 \
             no_timer_check net.ifnames=0",
        );
        if !self.kvm
            && let Some(khz) = clock::tsc_khz()
        {
            let _ = write!(words, " tsc_early_khz={khz} tsc=reliable");
        }
        if !spec.append.is_empty() {
            let _ = write!(words, " {}", spec.append);
        }
        words
    }

    fn arguments(&self, spec: &MachineSpec) -> Result<Vec<String>> {
        if spec.disks.len() > MOST_DISKS {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{} disks, at most {MOST_DISKS} are possible", spec.disks.len()),
            ));
        }
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(ToString::to_string));
        let accelerator = if self.kvm { "kvm" } else { "tcg,thread=multi" };
        add(&["-accel", accelerator, "-machine", "q35,sata=off,smbus=off,vmport=off,hpet=off"]);
        add(&["-cpu", if self.kvm { "host" } else { "max" }]);
        add(&["-smp", &spec.processors.to_string(), "-m", &spec.memory_mib.to_string()]);
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        add(&[
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]);
        if QUICK_FIRMWARE_PLACES.iter().any(|place| Path::new(place).is_file()) {
            add(&["-bios", QUICK_FIRMWARE]);
        }
        add(&["-serial", "stdio", "-name", "tranship-appliance"]);
        add(&["-kernel", path_text(&spec.kernel)?, "-initrd", path_text(&spec.initramfs)?]);
        add(&["-append", &self.kernel_words(spec)]);
        add(&["-device", "virtio-serial-pci,id=serial,addr=0x1"]);
        for (number, (port, stream)) in
            [(CONTROL_PORT, &spec.control), (BULK_PORT, &spec.bulk)].into_iter().enumerate()
        {
            add(&["-chardev", &format!("socket,id=port{number},fd={}", stream.as_raw_fd())]);
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
            &format!("virtio-blk-pci,addr=0x2,drive=tools,serial={TOOLS_SERIAL}"),
        ]);
        let socket = comma_escaped(path_text(&spec.disk_socket)?);
        for (index, disk) in spec.disks.iter().enumerate() {
            let [node, device] = disk_arguments(index, disk, &socket);
            add(&["-blockdev", &node, "-device", &device]);
        }
        Ok(arguments)
    }
}

fn disk_arguments(index: usize, disk: &SpecDisk, socket: &str) -> [String; 2] {
    let on = |yes| if yes { "on" } else { "off" };
    let SpecDisk { export, serial, read_only, sector_size, durable, .. } = disk;
    let (slot, function) = (FIRST_DISK_SLOT + index / 8, index % 8);
    [
        format!(
            "driver=nbd,node-name=disk{index},server.type=unix,server.path={socket},\
             export={export},discard=unmap,read-only={},cache.no-flush={}",
            on(*read_only),
            on(!durable)
        ),
        // QEMU's default is to stop the machine on a full disk and wait for somebody to make
        // room. Nobody would: the agent has to see the error.
        format!(
            "virtio-blk-pci,addr={slot:#x}.{function},multifunction=on,drive=disk{index},\
             serial={serial},logical_block_size={sector_size},physical_block_size=4096,\
             werror=report,rerror=report"
        ),
    ]
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

impl Backend for Qemu {
    fn name(&self) -> &'static str {
        if self.kvm { "qemu-kvm" } else { "qemu-tcg" }
    }

    fn most_plugged(&self) -> usize {
        0
    }

    fn identity(&self, _: &MachineSpec) -> Option<String> {
        None
    }

    fn start(&self, spec: MachineSpec, _: Option<SnapshotFiles>) -> Result<Box<dyn Machine>> {
        let mut command = Command::new(&self.program);
        command.args(self.arguments(&spec)?);
        tracing::debug!(?command, "starting QEMU");
        let inherited = vec![OwnedFd::from(spec.control), OwnedFd::from(spec.bulk)];
        Ok(Box::new(MachineProcess::new("QEMU", Process::start(command, inherited)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn spec(disks: usize) -> MachineSpec {
        let (control, _) = UnixStream::pair().unwrap();
        let (bulk, _) = UnixStream::pair().unwrap();
        let disk = SpecDisk {
            export: "disk0".into(),
            image: None,
            serial: "tranship-0".into(),
            read_only: false,
            sector_size: 512,
            durable: false,
        };
        MachineSpec {
            kernel: "/c/vmlinux".into(),
            initramfs: "/c/initramfs".into(),
            tools: "/c/to,ols".into(),
            memory_mib: 512,
            processors: 1,
            append: String::new(),
            disk_socket: "/s/nbd".into(),
            disks: vec![disk; disks],
            control,
            bulk,
        }
    }

    #[test]
    fn a_full_disk_does_not_stop_the_machine() {
        let arguments = Qemu::new("q".into(), false).arguments(&spec(2)).unwrap();
        let reported = arguments.iter().filter(|word| word.contains("werror=report")).count();
        assert_eq!(reported, 2);
    }

    #[test]
    fn commas_in_paths_do_not_end_a_value() {
        let arguments = Qemu::new("q".into(), false).arguments(&spec(0)).unwrap();
        assert!(arguments.iter().any(|word| word.ends_with("file.filename=/c/to,,ols")));
    }

    #[test]
    fn every_disk_has_a_slot_of_its_own_until_there_are_too_many() {
        let qemu = Qemu::new("q".into(), true);
        let arguments = qemu.arguments(&spec(MOST_DISKS)).unwrap();
        let slots: std::collections::HashSet<&str> = arguments
            .iter()
            .filter_map(|word| word.strip_prefix("virtio-blk-pci,addr="))
            .filter_map(|rest| rest.split(',').next())
            .collect();
        assert_eq!(slots.len(), MOST_DISKS + 1);
        assert_eq!(qemu.arguments(&spec(MOST_DISKS + 1)).unwrap_err().kind(), ErrorKind::Usage);
    }
}
