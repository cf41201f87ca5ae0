// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's command line for a domain: the buses, cards and firmware that libvirt would give
//! it, and nothing that reaches out of the machine.

use super::firmware::Uefi;
use crate::libvirt::{Bus, Clock, Domain, DriveKind, Firmware};
use crate::{Error, ErrorKind, Result};
use std::os::fd::RawFd;
use std::path::Path;

/// Slots from here to 0x1e with eight functions each are for virtio disks; QEMU gives the
/// ones below to all other devices.
const FIRST_DISK_SLOT: usize = 0x10;
const MOST_VIRTIO_DISKS: usize = (0x1f - FIRST_DISK_SLOT) * 8;
/// Ports of one AHCI controller.
const AHCI_PORTS: usize = 6;

/// The two machine types of libvirt's x86 guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chipset {
    Q35,
    I440fx,
}

/// Everything that is not in the domain.
#[derive(Debug)]
pub(crate) struct Surroundings<'a> {
    pub(crate) kvm: bool,
    pub(crate) memory_mib: u64,
    pub(crate) processors: u32,
    /// Socket of the server that has the disks as `disk0`, `disk1`, …
    pub(crate) disk_socket: &'a Path,
    /// Firmware with a private copy of the variables.
    pub(crate) uefi: Option<&'a Uefi>,
    pub(crate) ports: Ports,
}

/// QEMU's ends of the sockets to us.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    pub(crate) qmp: RawFd,
    pub(crate) serial: RawFd,
    pub(crate) firmware: RawFd,
    pub(crate) agent: RawFd,
}

/// Name of the export of disk number `index`.
pub(crate) fn export(index: usize) -> String {
    format!("disk{index}")
}

/// The command line without the program.
pub(crate) fn arguments(domain: &Domain, around: &Surroundings<'_>) -> Result<Vec<String>> {
    let chipset = chipset(domain)?;
    let mut line = Line::default();
    line.add("-accel", if around.kvm { "kvm" } else { "tcg,thread=multi" });
    line.add("-cpu", if around.kvm { "host" } else { "max" });
    line.add("-smp", around.processors.to_string());
    line.add("-m", around.memory_mib.to_string());
    line.words.extend(["-nodefaults", "-no-user-config"].map(Into::into));
    line.add("-display", "none");
    // The guest's end is a sign, and the screen is wanted even then.
    line.add("-action", "shutdown=pause,panic=pause");
    line.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    if domain.clock == Clock::Localtime {
        line.add("-rtc", "base=localtime");
    }
    machine_and_firmware(&mut line, domain, chipset, around)?;
    line.add("-device", "VGA");
    ports(&mut line, chipset, around.ports);
    disks(&mut line, domain, chipset, around.disk_socket)?;
    for (index, nic) in domain.nics.iter().enumerate() {
        let model = nic_model(&nic.model, chipset)?;
        let mac = nic.mac.as_ref().map(|mac| format!(",mac={mac}")).unwrap_or_default();
        // DHCP answers, so that nothing in the guest waits for it, but no packet leaves.
        line.add("-netdev", format!("user,id=net{index},restrict=on"));
        // Without its ROM it is not booted from, which could only delay the verdict.
        line.add("-device", format!("{model},netdev=net{index},romfile={mac}"));
    }
    if domain.rng {
        line.add("-device", chipset.virtio("virtio-rng-pci"));
    }
    if domain.balloon {
        line.add("-device", chipset.virtio("virtio-balloon-pci"));
    }
    if domain.panic {
        line.add("-device", "pvpanic,ioport=0x505");
    }
    Ok(line.words)
}

#[derive(Debug, Default)]
struct Line {
    words: Vec<String>,
}

impl Line {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.words.push(option.to_owned());
        self.words.push(value.into());
    }
}

impl Chipset {
    /// A virtio device as libvirt would attach it: on PCI Express without the old interface.
    fn virtio(self, device: &str) -> String {
        match self {
            Self::Q35 => format!("{device},disable-legacy=on"),
            Self::I440fx => device.to_owned(),
        }
    }
}

fn chipset(domain: &Domain) -> Result<Chipset> {
    if !matches!(domain.arch.as_str(), "x86_64" | "i686" | "i386") {
        return Err(unsupported(format!(
            "the guest's architecture is {:?}, expected x86_64 or i686",
            domain.arch
        )));
    }
    // A version that another host has may not exist here; the chipset is what counts.
    match domain.machine.as_str() {
        machine if machine == "q35" || machine.starts_with("pc-q35-") => Ok(Chipset::Q35),
        machine if machine == "pc" || machine.starts_with("pc-") => Ok(Chipset::I440fx),
        other => Err(unsupported(format!("machine type is {other:?}, expected q35 or pc"))),
    }
}

fn machine_and_firmware(
    line: &mut Line,
    domain: &Domain,
    chipset: Chipset,
    around: &Surroundings<'_>,
) -> Result<()> {
    let mut machine = match chipset {
        Chipset::Q35 => "q35,vmport=off".to_owned(),
        Chipset::I440fx => "pc,vmport=off".to_owned(),
    };
    if let Some(uefi) = around.uefi {
        let is_secure = domain.firmware == Firmware::Uefi { secure_boot: true };
        if is_secure && chipset != Chipset::Q35 {
            return Err(unsupported("secure boot needs the machine type q35".to_owned()));
        }
        machine.push_str(",pflash0=uefi-code,pflash1=uefi-vars");
        machine.push_str(if is_secure { ",smm=on" } else { ",smm=off" });
        if is_secure {
            line.add("-global", "driver=cfi.pflash01,property=secure,value=on");
        }
        for (node, path, read_only) in
            [("uefi-code", &uefi.code, "on"), ("uefi-vars", &uefi.vars, "off")]
        {
            let path = escaped(path)?;
            line.add(
                "-blockdev",
                format!("driver=file,node-name={node},filename={path},read-only={read_only}"),
            );
        }
    }
    line.add("-machine", machine);
    Ok(())
}

fn ports(line: &mut Line, chipset: Chipset, ports: Ports) {
    for (name, fd) in [
        ("qmp", ports.qmp),
        ("serial", ports.serial),
        ("firmware", ports.firmware),
        ("agent", ports.agent),
    ] {
        line.add("-chardev", format!("socket,id={name},fd={fd}"));
    }
    line.add("-mon", "chardev=qmp,mode=control");
    line.add("-serial", "chardev:serial");
    // SeaBIOS tells here what it puts on the screen.
    line.add("-device", "isa-debugcon,iobase=0x402,chardev=firmware");
    line.add("-device", chipset.virtio("virtio-serial-pci"));
    line.add("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0");
}

fn disks(line: &mut Line, domain: &Domain, chipset: Chipset, socket: &Path) -> Result<()> {
    let socket = escaped(socket)?;
    let mut used = Used::default();
    // Without any order libvirt boots from the first disk.
    let has_order = domain.disks.iter().any(|disk| disk.boot_order.is_some());
    for (index, disk) in domain.disks.iter().enumerate() {
        line.add(
            "-blockdev",
            format!(
                "driver=nbd,node-name=disk{index},server.type=unix,server.path={socket},\
                 export={},discard=unmap,cache.no-flush=on",
                export(index)
            ),
        );
        let order = if has_order { disk.boot_order } else { u32::try_from(index + 1).ok() };
        let bootindex = order.map(|order| format!(",bootindex={order}")).unwrap_or_default();
        let device = used.attach(line, disk.bus, "hd", chipset, domain)?;
        line.add("-device", format!("{device},drive=disk{index}{bootindex}"));
    }
    for drive in &domain.drives {
        // Floppy drives are never waited for, and CD drives only where they exist.
        if drive.kind == DriveKind::Cdrom && matches!(drive.bus, Bus::Sata | Bus::Ide | Bus::Scsi) {
            let device = used.attach(line, drive.bus, "cd", chipset, domain)?;
            line.add("-device", device);
        }
    }
    Ok(())
}

/// Places on the buses that are taken.
#[derive(Debug, Default)]
struct Used {
    virtio: usize,
    sata: usize,
    ide: usize,
    scsi: usize,
    usb: usize,
}

impl Used {
    /// The device for a disk (`hd`) or CD drive (`cd`) at the next free place; adds the
    /// controller where it is the first one there.
    fn attach(
        &mut self,
        line: &mut Line,
        bus: Bus,
        kind: &str,
        chipset: Chipset,
        domain: &Domain,
    ) -> Result<String> {
        match bus {
            Bus::Virtio => {
                let index = self.virtio;
                self.virtio += 1;
                if index >= MOST_VIRTIO_DISKS {
                    return Err(unsupported(format!(
                        "the guest has more than {MOST_VIRTIO_DISKS} virtio disks"
                    )));
                }
                let (slot, function) = (FIRST_DISK_SLOT + index / 8, index % 8);
                let device = chipset.virtio("virtio-blk-pci");
                Ok(format!("{device},addr={slot:#x}.{function},multifunction=on"))
            }
            Bus::Sata => {
                let (controller, port) = (self.sata / AHCI_PORTS, self.sata % AHCI_PORTS);
                self.sata += 1;
                if port == 0 {
                    line.add("-device", format!("ich9-ahci,id=sata{controller}"));
                }
                Ok(format!("ide-{kind},bus=sata{controller}.{port}"))
            }
            Bus::Ide => {
                let (channel, unit) = (self.ide / 2, self.ide % 2);
                self.ide += 1;
                if chipset == Chipset::Q35 || channel > 1 {
                    return Err(unsupported(
                        "there are four places for IDE disks on a machine of type pc, and none \
                         on q35"
                            .to_owned(),
                    ));
                }
                Ok(format!("ide-{kind},bus=ide.{channel},unit={unit}"))
            }
            Bus::Scsi => {
                let target = self.scsi;
                self.scsi += 1;
                if target == 0 {
                    let controller = match domain.scsi_model.as_deref() {
                        None | Some("virtio-scsi" | "virtio-non-transitional" | "auto") => {
                            chipset.virtio("virtio-scsi-pci")
                        }
                        Some("virtio-transitional") => "virtio-scsi-pci".to_owned(),
                        Some("lsilogic") => "lsi53c895a".to_owned(),
                        Some("lsisas1068") => "mptsas1068".to_owned(),
                        Some("vmpvscsi") => "pvscsi".to_owned(),
                        Some(other) => {
                            return Err(unsupported(format!(
                                "model of the SCSI controller is {other:?}, expected virtio-scsi, \
                                 lsilogic, lsisas1068 or vmpvscsi"
                            )));
                        }
                    };
                    line.add("-device", format!("{controller},id=scsi"));
                }
                Ok(format!("scsi-{kind},bus=scsi.0,scsi-id={target}"))
            }
            Bus::Usb => {
                self.usb += 1;
                if self.usb == 1 {
                    line.add("-device", "qemu-xhci,id=usb");
                }
                Ok("usb-storage,bus=usb.0".to_owned())
            }
            Bus::Fdc => Err(unsupported("a fixed disk is on a floppy controller".to_owned())),
        }
    }
}

fn nic_model(model: &str, chipset: Chipset) -> Result<String> {
    match model {
        "virtio" | "virtio-net" | "virtio-non-transitional" => Ok(chipset.virtio("virtio-net-pci")),
        "virtio-transitional" => Ok("virtio-net-pci".to_owned()),
        "e1000" | "e1000e" | "rtl8139" | "vmxnet3" | "pcnet" => Ok(model.to_owned()),
        "ne2k_pci" => Ok("ne2k_pci".to_owned()),
        other => Err(unsupported(format!(
            "model of a network card is {other:?}, expected virtio, e1000, e1000e, rtl8139, \
             vmxnet3, pcnet or ne2k_pci"
        ))),
    }
}

/// A path as a value: QEMU takes a comma for its end unless it is doubled.
fn escaped(path: &Path) -> Result<String> {
    let text = path.to_str().ok_or_else(|| {
        unsupported(format!("{}: the path is not UTF-8, as QEMU needs it", path.display()))
    })?;
    Ok(text.replace(',', ",,"))
}

fn unsupported(message: String) -> Error {
    Error::new(ErrorKind::Input, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libvirt::{Connection, Disk, Drive, Nic};

    fn words(domain: &Domain) -> Result<String> {
        let around = Surroundings {
            kvm: false,
            memory_mib: 1024,
            processors: 1,
            disk_socket: Path::new("/t/a,b"),
            uefi: None,
            ports: Ports { qmp: 10, serial: 11, firmware: 12, agent: 13 },
        };
        arguments(domain, &around).map(|words| words.join(" "))
    }

    fn with(machine: &str, buses: &[Bus]) -> Domain {
        let mut domain = Domain::new("g", 1 << 20, 1);
        domain.machine = machine.into();
        domain.disks = (0..)
            .zip(buses)
            .map(|(index, bus)| Disk {
                path: "/d".into(),
                format: "raw".into(),
                target: bus.target(index),
                bus: *bus,
                boot_order: None,
            })
            .collect();
        domain
    }

    #[test]
    fn every_bus_has_its_device() {
        let table: [(&str, Bus, &[&str]); 6] = [
            (
                "q35",
                Bus::Virtio,
                &[
                    "virtio-blk-pci,disable-legacy=on,addr=0x10.0,multifunction=on,drive=disk0,bootindex=1",
                ],
            ),
            ("pc-i440fx-7.2", Bus::Virtio, &["-machine pc,", "virtio-blk-pci,addr=0x10.0"]),
            (
                "pc-q35-9.2",
                Bus::Sata,
                &["-machine q35,", "ich9-ahci,id=sata0", "ide-hd,bus=sata0.0,"],
            ),
            ("pc", Bus::Ide, &["ide-hd,bus=ide.0,unit=0,drive=disk0"]),
            (
                "q35",
                Bus::Scsi,
                &["virtio-scsi-pci,disable-legacy=on,id=scsi", "scsi-hd,bus=scsi.0,scsi-id=0,"],
            ),
            ("q35", Bus::Usb, &["qemu-xhci,id=usb", "usb-storage,bus=usb.0,drive=disk0"]),
        ];
        for (machine, bus, expected) in table {
            let line = words(&with(machine, &[bus])).unwrap();
            for part in expected {
                assert!(line.contains(part), "{machine} {bus}: {part} in {line}");
            }
            assert!(line.contains("server.path=/t/a,,b,export=disk0,"), "{line}");
        }
    }

    #[test]
    fn what_the_machine_cannot_have_is_an_error() {
        let bad_nic = Domain {
            nics: vec![Nic { mac: None, connection: Connection::User, model: "a,b".into() }],
            ..with("q35", &[])
        };
        let table = [
            (with("virt", &[]), "machine type is \"virt\""),
            (Domain { arch: "aarch64".into(), ..with("q35", &[]) }, "architecture is \"aarch64\""),
            (with("q35", &[Bus::Ide]), "none on q35"),
            (with("pc", &[Bus::Ide; 5]), "four places"),
            (with("q35", &[Bus::Virtio; MOST_VIRTIO_DISKS + 1]), "more than 120 virtio disks"),
            (Domain { scsi_model: Some("x".into()), ..with("q35", &[Bus::Scsi]) }, "is \"x\""),
            (bad_nic, "network card is \"a,b\""),
        ];
        for (domain, expected) in table {
            let error = words(&domain).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn places_are_not_given_twice() {
        let mut domain = with("q35", &[Bus::Sata; 7]);
        domain.disks[3].boot_order = Some(2);
        domain.drives =
            vec![Drive { kind: DriveKind::Cdrom, target: "sdz".into(), bus: Bus::Sata }];
        let line = words(&domain).unwrap();
        assert!(line.contains("ide-hd,bus=sata1.0,drive=disk6"), "{line}");
        assert!(line.contains("ide-cd,bus=sata1.1"), "{line}");
        assert_eq!(line.matches("bootindex").count(), 1, "{line}");
        assert!(line.contains("ide-hd,bus=sata0.3,drive=disk3,bootindex=2"), "{line}");
    }

    #[test]
    fn nothing_leaves_the_machine() {
        let mac = Some("00:50:56:01:02:03".to_owned());
        let domain = Domain {
            nics: vec![Nic {
                mac,
                connection: Connection::Bridge("br0".into()),
                model: "virtio".into(),
            }],
            ..with("pc", &[])
        };
        let line = words(&domain).unwrap();
        assert!(line.contains("-netdev user,id=net0,restrict=on "), "{line}");
        assert!(
            line.contains("virtio-net-pci,netdev=net0,romfile=,mac=00:50:56:01:02:03"),
            "{line}"
        );
    }
}
