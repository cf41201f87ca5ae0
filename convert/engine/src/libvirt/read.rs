// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reading what a boot needs out of any domain of libvirt.

use super::{Bus, Clock, Connection, Disk, Domain, Drive, DriveKind, Firmware, Nic, Topology};
use crate::{Error, ErrorKind, Result};
use roxmltree::{Document, Node, ParsingOptions};
use std::path::PathBuf;

/// Bytes of XML that are read; a domain with a hundred disks has 50 KiB.
pub(crate) const LONGEST: usize = 1 << 20;
/// Elements, attributes and texts.
const MOST_NODES: u32 = 50_000;
/// Disks, drives and network cards, each.
const MOST_DEVICES: usize = 256;
const MOST_VCPUS: u32 = 4096;

impl Domain {
    /// Reads a domain: one that we wrote, virt-v2v's, or `virsh dumpxml`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Input`] for text that is not XML or no domain, for sizes that no machine
    /// has, and for disks that are neither files nor block devices.
    pub fn parse(xml: &str) -> Result<Self> {
        if xml.len() > LONGEST {
            let len = xml.len();
            return Err(bad(format!("domain XML has {len} bytes, expected at most {LONGEST}")));
        }
        let options = ParsingOptions { nodes_limit: MOST_NODES, ..ParsingOptions::default() };
        let document = Document::parse_with_options(xml, options)
            .map_err(|error| bad("domain XML is not well-formed").because(error))?;
        let root = document.root_element();
        if root.tag_name().name() != "domain" {
            let name = root.tag_name().name();
            return Err(bad(format!("domain XML begins with <{name}>, expected <domain>")));
        }
        let name = text(root, "name").ok_or_else(|| bad("domain has no <name>"))?;
        let vcpus = match text(root, "vcpu") {
            Some(count) => number(&count, "vcpu", 1, MOST_VCPUS)?,
            None => 1,
        };
        let mut domain = Self {
            genid: text(root, "genid").filter(|genid| !genid.is_empty()),
            osinfo: osinfo(root),
            topology: topology(root)?,
            rng: false,
            balloon: false,
            panic: false,
            ..Self::new(name, memory_kib(root)?, vcpus)
        };
        if let Some(system) = child(root, "os") {
            domain.read_system(system);
        }
        if child(root, "clock").and_then(|clock| clock.attribute("offset")) == Some("localtime") {
            domain.clock = Clock::Localtime;
        }
        if let Some(devices) = child(root, "devices") {
            domain.read_devices(devices)?;
        }
        Ok(domain)
    }

    fn read_system(&mut self, system: Node<'_, '_>) {
        if let Some(kind) = child(system, "type") {
            self.arch = kind.attribute("arch").unwrap_or("x86_64").into();
            // libvirt's own choice for x86 where nothing is said.
            self.machine = kind.attribute("machine").unwrap_or("pc").into();
        }
        let loader = child(system, "loader");
        let is_uefi = system.attribute("firmware") == Some("efi")
            || loader.is_some_and(|loader| loader.attribute("type") == Some("pflash"));
        if is_uefi {
            let has_feature = child(system, "firmware").is_some_and(|firmware| {
                firmware.children().any(|feature| {
                    feature.has_tag_name("feature")
                        && feature.attribute("name") == Some("secure-boot")
                        && feature.attribute("enabled") == Some("yes")
                })
            });
            let is_secure = loader.is_some_and(|loader| loader.attribute("secure") == Some("yes"));
            self.firmware = Firmware::Uefi { secure_boot: has_feature || is_secure };
        }
    }

    fn read_devices(&mut self, devices: Node<'_, '_>) -> Result<()> {
        for device in devices.children().filter(Node::is_element) {
            match device.tag_name().name() {
                "disk" => self.read_disk(device)?,
                "interface" => self.nics.push(nic(device)?),
                "controller" if device.attribute("type") == Some("scsi") => {
                    self.scsi_model = device.attribute("model").map(ToOwned::to_owned);
                }
                "sound" => self.sound = device.attribute("model").map(ToOwned::to_owned),
                "rng" => self.rng = true,
                "memballoon" => self.balloon = device.attribute("model") != Some("none"),
                "panic" => self.panic = true,
                _ => {}
            }
            for (what, count) in [
                ("disks", self.disks.len()),
                ("drives", self.drives.len()),
                ("network cards", self.nics.len()),
            ] {
                if count > MOST_DEVICES {
                    return Err(bad(format!("domain has more than {MOST_DEVICES} {what}")));
                }
            }
        }
        Ok(())
    }

    fn read_disk(&mut self, node: Node<'_, '_>) -> Result<()> {
        let target = child(node, "target").ok_or_else(|| bad("a disk has no <target>"))?;
        let name = target.attribute("dev").ok_or_else(|| bad("a disk's <target> has no dev"))?;
        let bus = match target.attribute("bus") {
            Some(bus) => Bus::from_name(bus),
            None => Bus::from_target(name),
        };
        let bus = bus.ok_or_else(|| {
            let bus = target.attribute("bus").unwrap_or("not given");
            bad(format!("bus of disk {name:?} is {bus:?}, expected virtio, sata, ide, scsi or usb"))
        })?;
        let target = name.to_owned();
        match node.attribute("device").unwrap_or("disk") {
            "disk" => {}
            "cdrom" => {
                self.drives.push(Drive { kind: DriveKind::Cdrom, target, bus });
                return Ok(());
            }
            "floppy" => {
                self.drives.push(Drive { kind: DriveKind::Floppy, target, bus });
                return Ok(());
            }
            other => return Err(bad(format!("disk {name:?} is a {other:?}, expected a disk"))),
        }
        let source = child(node, "source");
        let path = match node.attribute("type") {
            Some("file") => source.and_then(|source| source.attribute("file")),
            Some("block") => source.and_then(|source| source.attribute("dev")),
            other => {
                let other = other.unwrap_or_default();
                return Err(bad(format!(
                    "disk {name:?} has the type {other:?}, expected file or block"
                )));
            }
        };
        let path = path.ok_or_else(|| bad(format!("disk {name:?} has no source")))?;
        if !path.starts_with('/') {
            return Err(bad(format!(
                "path of disk {name:?} is {path:?}, expected an absolute one"
            )));
        }
        let boot_order = child(node, "boot")
            .and_then(|boot| boot.attribute("order"))
            .map(|order| number(order, "boot order", 1, u32::from(u16::MAX)))
            .transpose()?;
        let format = child(node, "driver").and_then(|driver| driver.attribute("type"));
        let format = format.unwrap_or("raw").to_owned();
        self.disks.push(Disk { path: PathBuf::from(path), format, target, bus, boot_order });
        Ok(())
    }
}

fn osinfo(root: Node<'_, '_>) -> Option<String> {
    let metadata = child(root, "metadata")?;
    let os = metadata.descendants().find(|node| {
        node.tag_name().name() == "os"
            && node.tag_name().namespace().is_some_and(|space| space.contains("libosinfo.org"))
    })?;
    os.attribute("id").map(ToOwned::to_owned)
}

fn topology(root: Node<'_, '_>) -> Result<Option<Topology>> {
    let Some(node) = child(root, "cpu").and_then(|cpu| child(cpu, "topology")) else {
        return Ok(None);
    };
    let count = |name| match node.attribute(name) {
        Some(count) => number(count, name, 1, MOST_VCPUS),
        None => Ok(1),
    };
    Ok(Some(Topology {
        sockets: count("sockets")?,
        cores: count("cores")?,
        threads: count("threads")?,
    }))
}

fn memory_kib(root: Node<'_, '_>) -> Result<u64> {
    let node = child(root, "memory").ok_or_else(|| bad("domain has no <memory>"))?;
    let unit = node.attribute("unit").unwrap_or("KiB");
    let factor: u64 = match unit {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        other => return Err(bad(format!("unit of memory is {other:?}, expected one as KiB"))),
    };
    let amount = node.text().unwrap_or_default().trim();
    amount
        .parse::<u64>()
        .ok()
        .and_then(|amount| amount.checked_mul(factor))
        // libvirt rounds up as well.
        .map(|bytes| bytes.div_ceil(1 << 10))
        .filter(|kib| *kib > 0)
        .ok_or_else(|| bad(format!("memory is {amount:?} {unit}, expected a size above zero")))
}

fn nic(node: Node<'_, '_>) -> Result<Nic> {
    let source = |attribute| {
        let source = child(node, "source")?;
        source.attribute(attribute).map(ToOwned::to_owned)
    };
    let connection = match node.attribute("type") {
        Some("network") => source("network").map(Connection::Network),
        Some("bridge") => source("bridge").map(Connection::Bridge),
        _ => None,
    };
    let mac = child(node, "mac").and_then(|mac| mac.attribute("address"));
    if let Some(mac) = mac {
        let is_byte = |part: &str| part.len() == 2 && u8::from_str_radix(part, 16).is_ok();
        let parts: Vec<&str> = mac.split(':').collect();
        if parts.len() != 6 || !parts.into_iter().all(is_byte) {
            return Err(bad(format!("MAC address is {mac:?}, expected six bytes in hexadecimal")));
        }
    }
    Ok(Nic {
        mac: mac.map(str::to_ascii_lowercase),
        connection: connection.unwrap_or(Connection::User),
        model: child(node, "model")
            .and_then(|model| model.attribute("type"))
            // libvirt's own choice for x86 where nothing is said.
            .unwrap_or("rtl8139")
            .to_owned(),
    })
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn text(node: Node<'_, '_>, name: &str) -> Option<String> {
    child(node, name).map(|node| node.text().unwrap_or_default().trim().to_owned())
}

fn number(text: &str, name: &str, least: u32, most: u32) -> Result<u32> {
    let value = text.trim().parse().ok().filter(|value| (least..=most).contains(value));
    value.ok_or_else(|| bad(format!("{name} is {text:?}, expected {least} to {most}")))
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Input, message)
}
