// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The virtual hardware section of an OVF: items of CIM resource types.

use crate::ovf::{attribute, child, child_text, children};
use crate::{
    Controller, CpuTopology, Error, Firmware, NetworkKind, Removable, RemovableKind, Result,
    SourceNic,
};
use roxmltree::Node;
use std::collections::{BTreeMap, HashMap};

const DEFAULT_MEMORY: u64 = 1024 << 20;
const MAX_ITEMS: usize = 4096;

/// The virtual hardware.
#[derive(Debug)]
pub(crate) struct Hardware {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
    pub(crate) cpu_topology: Option<CpuTopology>,
    pub(crate) firmware: Firmware,
    pub(crate) secure_boot: bool,
    pub(crate) disks: Vec<DiskItem>,
    pub(crate) nics: Vec<SourceNic>,
    pub(crate) removables: Vec<Removable>,
    pub(crate) sound: Option<String>,
    /// VMware's settings that have no place in OVF.
    pub(crate) extra: BTreeMap<String, String>,
    pub(crate) warnings: Vec<String>,
}

/// A disk of the hardware.
#[derive(Debug)]
pub(crate) struct DiskItem {
    /// Which disk it is: `ovf:/disk/ID`.
    pub(crate) host_resource: String,
    pub(crate) controller: Controller,
    pub(crate) unit: Option<u32>,
}

/// The parts of an item that matter, whatever the item's element is called.
struct Item {
    id: String,
    kind: u32,
    sub_type: Option<String>,
    quantity: Option<u64>,
    units: Option<String>,
    parent: Option<String>,
    unit: Option<u32>,
    host_resource: Option<String>,
    connection: Option<String>,
    address: Option<String>,
    cores_per_socket: Option<u32>,
    slot: Option<u32>,
}

/// VMware's `<vmw:Config vmw:key="slotInfo.pciSlotNumber" vmw:value="192"/>`.
fn pci_slot(node: Node<'_, '_>) -> Option<u32> {
    children(node, "Config")
        .find(|config| attribute(*config, "key") == Some("slotInfo.pciSlotNumber"))
        .and_then(|config| attribute(config, "value")?.parse().ok())
}

impl Item {
    fn parse(node: Node<'_, '_>) -> Option<Self> {
        let number = |name| child_text(node, name).and_then(|text| text.parse().ok());
        Some(Self {
            id: child_text(node, "InstanceID").or_else(|| child_text(node, "InstanceId"))?,
            kind: child_text(node, "ResourceType")?.parse().ok()?,
            sub_type: child_text(node, "ResourceSubType"),
            quantity: child_text(node, "VirtualQuantity").and_then(|text| text.parse().ok()),
            units: child_text(node, "AllocationUnits"),
            parent: child_text(node, "Parent"),
            unit: number("AddressOnParent"),
            host_resource: child_text(node, "HostResource"),
            connection: child_text(node, "Connection"),
            address: child_text(node, "Address"),
            cores_per_socket: number("CoresPerSocket"),
            slot: pci_slot(node),
        })
    }

    /// What this item is to the disks that hang on it, if it is a controller.
    fn controller(&self) -> Option<Controller> {
        let model = self.sub_type.clone();
        let is = |word: &str| {
            model.as_ref().is_some_and(|model| model.to_ascii_lowercase().contains(word))
        };
        match self.kind {
            5 => Some(Controller::Ide),
            6 => Some(Controller::Scsi(model)),
            20 if is("nvm") => Some(Controller::Nvme),
            20 if is("virtio") || is("scsi") => Some(Controller::Scsi(model)),
            20 => Some(Controller::Sata),
            _ => None,
        }
    }
}

impl Hardware {
    /// Reads all items that apply in deployment configuration `configuration`.
    pub(crate) fn parse(section: Node<'_, '_>, configuration: Option<&str>) -> Result<Self> {
        let items = items(section, configuration)?;
        let controllers: HashMap<&str, Controller> =
            items.iter().filter_map(|item| Some((item.id.as_str(), item.controller()?))).collect();
        let mut hardware = Self {
            memory_bytes: 0,
            vcpus: 0,
            cpu_topology: None,
            firmware: Firmware::Unknown,
            secure_boot: false,
            disks: Vec::new(),
            nics: Vec::new(),
            removables: Vec::new(),
            sound: None,
            extra: BTreeMap::new(),
            warnings: Vec::new(),
        };
        for item in &items {
            let parent = item.parent.as_deref().and_then(|parent| controllers.get(parent));
            hardware.add(item, parent.cloned().unwrap_or(Controller::Unknown))?;
        }
        if hardware.memory_bytes == 0 {
            hardware.memory_bytes = DEFAULT_MEMORY;
            hardware.warnings.push("no memory size is given; 1024 MiB are assumed".into());
        }
        if hardware.vcpus == 0 {
            hardware.vcpus = 1;
            hardware.warnings.push("no number of CPUs is given; 1 is assumed".into());
        }
        hardware.read_settings(section)?;
        Ok(hardware)
    }

    fn add(&mut self, item: &Item, controller: Controller) -> Result<()> {
        match item.kind {
            3 => {
                let vcpus = item.quantity.unwrap_or(1);
                self.vcpus = u32::try_from(vcpus).ok().filter(|n| *n > 0).ok_or_else(|| {
                    Error::corrupt(format!("number of CPUs is {vcpus}, expected 1 to 2^32"))
                })?;
                let cores = item.cores_per_socket;
                self.cpu_topology = cores.and_then(|cores| CpuTopology::of(self.vcpus, cores));
            }
            4 => self.memory_bytes = memory(item)?,
            10 => {
                let number = self.nics.len();
                self.nics.push(SourceNic {
                    mac: item.address.as_deref().and_then(mac),
                    network: match &item.connection {
                        Some(name) => NetworkKind::Bridge(name.clone()),
                        None => NetworkKind::Network(format!("eth{number}")),
                    },
                    model: item.sub_type.clone(),
                    slot: item.slot,
                });
            }
            14 => self.add_removable(RemovableKind::Floppy, controller, item.unit),
            15 | 16 => self.add_removable(RemovableKind::Cdrom, controller, item.unit),
            17 | 31 => {
                let host_resource = item.host_resource.clone().ok_or_else(|| {
                    Error::corrupt(format!("disk item {:?} has no HostResource", item.id))
                })?;
                self.disks.push(DiskItem { host_resource, controller, unit: item.unit });
            }
            35 => self.sound.clone_from(&item.sub_type),
            _ => {}
        }
        Ok(())
    }

    fn add_removable(&mut self, kind: RemovableKind, controller: Controller, unit: Option<u32>) {
        self.removables.push(Removable { kind, controller, unit });
    }

    /// VMware's `Config` and `ExtraConfig` elements.
    fn read_settings(&mut self, section: Node<'_, '_>) -> Result<()> {
        for node in section.children().filter(Node::is_element) {
            let (Some(key), Some(value)) = (attribute(node, "key"), attribute(node, "value"))
            else {
                continue;
            };
            match (node.tag_name().name(), key) {
                ("Config", "firmware") => {
                    self.firmware = match value {
                        "efi" => Firmware::Uefi,
                        "bios" => Firmware::Bios,
                        _ => {
                            return Err(Error::corrupt(format!(
                                "firmware is {value:?}, expected \"efi\" or \"bios\""
                            )));
                        }
                    }
                }
                ("Config", "bootOptions.efiSecureBootEnabled")
                | ("ExtraConfig", "uefi.secureBoot.enabled") => {
                    self.secure_boot = value.eq_ignore_ascii_case("true");
                }
                ("ExtraConfig", _) => {
                    self.extra.insert(key.to_owned(), value.to_owned());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// VirtualBox keeps what OVF has no words for in an element of its own.
    pub(crate) fn read_virtualbox(&mut self, machine: Node<'_, '_>) {
        let firmware = child(machine, "Hardware").and_then(|node| child(node, "Firmware"));
        if let Some(kind) = firmware.and_then(|node| attribute(node, "type")) {
            let uefi = kind.to_ascii_uppercase().starts_with("EFI");
            self.firmware = if uefi { Firmware::Uefi } else { Firmware::Bios };
        }
    }
}

/// The items that apply, later ones replacing earlier ones of the same id.
fn items(section: Node<'_, '_>, configuration: Option<&str>) -> Result<Vec<Item>> {
    let mut items: Vec<Item> = Vec::new();
    let mut places = HashMap::new();
    let nodes = ["Item", "StorageItem", "EthernetPortItem"];
    for node in section.children().filter(|node| nodes.contains(&node.tag_name().name())) {
        // Bounds say what would be possible, not what is.
        if attribute(node, "bound").is_some_and(|bound| bound != "normal") {
            continue;
        }
        if let Some(wanted) = attribute(node, "configuration") {
            let mut ids = wanted.split_ascii_whitespace();
            if !configuration.is_some_and(|default| ids.any(|id| id == default)) {
                continue;
            }
        }
        let Some(item) = Item::parse(node) else { continue };
        if items.len() >= MAX_ITEMS {
            return Err(Error::corrupt(format!("more than {MAX_ITEMS} hardware items")));
        }
        match places.get(&item.id).and_then(|place: &usize| items.get_mut(*place)) {
            Some(earlier) if attribute(node, "configuration").is_some() => *earlier = item,
            _ => {
                places.insert(item.id.clone(), items.len());
                items.push(item);
            }
        }
    }
    Ok(items)
}

/// Memory in bytes: MiB unless the item says otherwise.
fn memory(item: &Item) -> Result<u64> {
    let units = item.units.as_deref().unwrap_or("MegaBytes").to_ascii_lowercase();
    let compact: String = units.chars().filter(|c| !c.is_whitespace()).collect();
    let unit = match compact.as_str() {
        "byte" | "bytes" => Some(1),
        "kilobytes" | "kb" | "byte*2^10" => Some(1 << 10),
        "megabytes" | "mb" | "mib" | "byte*2^20" => Some(1 << 20),
        "gigabytes" | "gb" | "gib" | "byte*2^30" => Some(1_u64 << 30),
        _ => None,
    };
    unit.zip(item.quantity)
        .and_then(|(unit, quantity)| quantity.checked_mul(unit))
        .filter(|bytes| *bytes > 0 && i64::try_from(*bytes).is_ok())
        .ok_or_else(|| {
            Error::corrupt(format!(
                "memory is {:?} times {:?}, expected a positive number of MegaBytes",
                item.quantity, item.units
            ))
        })
}

/// A MAC address with colons in lower case, from the forms that products write.
pub(crate) fn mac(text: &str) -> Option<String> {
    let digits: String =
        text.chars().filter(|c| !matches!(c, ':' | '-')).collect::<String>().to_ascii_lowercase();
    let whole = digits.len() == 12 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !whole || digits == "000000000000" {
        return None;
    }
    let pairs = digits.as_bytes().chunks(2).map(String::from_utf8_lossy);
    Some(pairs.collect::<Vec<_>>().join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_in_all_forms() {
        let expected = Some("08:00:27:f6:cd:ef".to_owned());
        for text in ["080027F6CDEF", "08:00:27:f6:cd:ef", "08-00-27-F6-CD-EF"] {
            assert_eq!(mac(text), expected);
        }
        for text in ["", "1", "00:00:00:00:00:00", "08:00:27:f6:cd:eg", "080027F6CDEF00"] {
            assert_eq!(mac(text), None);
        }
    }
}
