// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ACPI tables of a hardware-reduced machine (ACPI 6.5, chapter 5).
//!
//! They tell of processors, the interrupt controller, the PCI buses, and how to switch off.
//! And they tell what is missing: without the probes for a real-time clock, a keyboard
//! controller and VGA a kernel starts tens of thousands of exits earlier.

use crate::layout::{
    ACPI, ACPI_END, BAR_WINDOW, BAR_WINDOW_SIZE, BUSES, ECAM, ECAM_BUS, IOAPIC, LOCAL_APIC,
    PCI_SEGMENT, RESET, RESET_VALUE, SERIAL, SERIAL_INTERRUPT, SLEEP_CONTROL, SLEEP_STATUS,
};
use crate::memory::Ram;
use crate::pci::pin::interrupt_of;
use crate::{Error, Result};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::{Aml, aml, fadt, mcfg::MCFG, rsdp::Rsdp, sdt::Sdt, xsdt::XSDT};
use vm_memory::{Bytes, GuestAddress};

const OEM: [u8; 6] = *b"TRNSHP";
const TABLE: [u8; 8] = *b"APPLIANC";
const REVISION: u32 = 1;

/// Boot architecture flags (section 5.2.9.3): no VGA, no CMOS clock; the bit for a keyboard
/// controller is clear.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;

/// The window of a bus for BARs: first address and last.
fn window(bus: u8) -> (u32, u32) {
    let start = BAR_WINDOW + u64::from(bus) * BAR_WINDOW_SIZE;
    let last = start + BAR_WINDOW_SIZE - 1;
    (u32::try_from(start).unwrap_or(0), u32::try_from(last).unwrap_or(0))
}

/// A host bridge with its bus.
fn bridge(bus: u8) -> Vec<u8> {
    let name = if bus == 0 { "PCI0" } else { "PCI1" };
    let (first, last) = window(bus);
    let id = aml::EISAName::new("PNP0A08");
    let compatible = aml::EISAName::new("PNP0A03");
    let hid = aml::Name::new("_HID".into(), &id);
    let cid = aml::Name::new("_CID".into(), &compatible);
    let segment = aml::Name::new("_SEG".into(), &PCI_SEGMENT);
    let base = aml::Name::new("_BBN".into(), &bus);
    let uid = aml::Name::new("_UID".into(), &bus);
    let numbers = aml::AddressSpace::new_bus_number(u16::from(bus), u16::from(bus));
    let memory = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::NotCacheable,
        true,
        first,
        last,
        None,
    );
    let template = aml::ResourceTemplate::new(vec![&numbers, &memory]);
    let resources = aml::Name::new("_CRS".into(), &template);
    let routes = Done(routes());
    let routing = aml::Name::new("_PRT".into(), &routes);
    let parts: Vec<&dyn Aml> = vec![&hid, &cid, &segment, &base, &uid, &resources, &routing];
    let mut bytes = Vec::new();
    aml::Device::new(name.into(), parts).to_aml_bytes(&mut bytes);
    bytes
}

/// To which interrupt the pin of each slot leads (section 6.2.13): slot and all functions, INTA#,
/// no device in between, the number.
fn routes() -> Vec<u8> {
    let routes: Vec<Done> = (0..32_u8)
        .map(|slot| {
            let (functions, interrupt) = (u32::from(slot) << 16 | 0xffff, interrupt_of(slot));
            let parts: Vec<&dyn Aml> = vec![&functions, &aml::ZERO, &aml::ZERO, &interrupt];
            Done(bytes_of(&aml::Package::new(parts)))
        })
        .collect();
    bytes_of(&aml::Package::new(routes.iter().map(|route| route as &dyn Aml).collect()))
}

/// The configuration space as something that is taken: else Linux ignores MCFG.
fn reservation() -> Vec<u8> {
    let size = u32::try_from(ECAM_BUS * u64::from(BUSES)).unwrap_or(0);
    let range = aml::Memory32Fixed::new(true, u32::try_from(ECAM).unwrap_or(0), size);
    let template = aml::ResourceTemplate::new(vec![&range]);
    let id = aml::EISAName::new("PNP0C02");
    let hid = aml::Name::new("_HID".into(), &id);
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let resources = aml::Name::new("_CRS".into(), &template);
    let mut bytes = Vec::new();
    aml::Device::new("MBRD".into(), vec![&hid, &uid, &resources]).to_aml_bytes(&mut bytes);
    bytes
}

fn serial() -> Vec<u8> {
    let id = aml::EISAName::new("PNP0501");
    let hid = aml::Name::new("_HID".into(), &id);
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let interrupt = aml::Interrupt::new(true, true, false, false, SERIAL_INTERRUPT);
    let ports = aml::IO::new(SERIAL, SERIAL, 0, 8);
    let template = aml::ResourceTemplate::new(vec![&interrupt, &ports]);
    let resources = aml::Name::new("_CRS".into(), &template);
    let mut bytes = Vec::new();
    aml::Device::new("COM1".into(), vec![&hid, &uid, &resources]).to_aml_bytes(&mut bytes);
    bytes
}

/// Bytes that are AML already.
struct Done(Vec<u8>);

impl Aml for Done {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn dsdt() -> Sdt {
    let mut devices: Vec<Done> = (0..BUSES).map(bridge).map(Done).collect();
    devices.push(Done(reservation()));
    devices.push(Done(serial()));
    let parts = devices.iter().map(|device| device as &dyn Aml).collect();
    let mut body = Vec::new();
    aml::Scope::new("_SB_".into(), parts).to_aml_bytes(&mut body);
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&5_u8])).to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    table.append_slice(&body);
    table
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut table = fadt::FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(fadt::Flags::HwReducedAcpi)
        .flag(fadt::Flags::ResetRegSup)
        .flag(fadt::Flags::PwrButton)
        .flag(fadt::Flags::SlpButton);
    table.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    table.reset_reg = port(RESET);
    table.reset_value = RESET_VALUE;
    table.sleep_control_reg = port(SLEEP_CONTROL);
    table.sleep_status_reg = port(SLEEP_STATUS);
    bytes_of(&table.finalize())
}

fn madt(processors: u8) -> Vec<u8> {
    let mut table = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for number in 0..processors {
        table.add_structure(ProcessorLocalApic::new(number, number, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, IOAPIC, 0));
    bytes_of(&table)
}

fn mcfg() -> Vec<u8> {
    let mut table = MCFG::new(OEM, TABLE, REVISION);
    table.add_ecam(ECAM, PCI_SEGMENT, 0, BUSES.saturating_sub(1));
    bytes_of(&table)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Writes all tables; returns where the root pointer is.
pub(crate) fn write(ram: &Ram, processors: u8) -> Result<u64> {
    // The root pointer comes first, where old kernels search for it.
    let mut at = ACPI + 0x40;
    let mut put = |table: &[u8]| {
        let here = at;
        at = (at + table.len() as u64).next_multiple_of(16);
        if at > ACPI_END {
            return Err(Error::Memory("the ACPI tables are too long".into()));
        }
        ram.write_slice(table, GuestAddress(here))
            .map_err(|error| Error::Memory(format!("ACPI tables: {error}")))?;
        Ok(here)
    };
    let dsdt = put(dsdt().as_slice())?;
    let mut root = XSDT::new(OEM, TABLE, REVISION);
    for table in [fadt(dsdt), madt(processors), mcfg()] {
        root.add_entry(put(&table)?);
    }
    let root = put(&bytes_of(&root))?;
    ram.write_slice(&bytes_of(&Rsdp::new(OEM, root)), GuestAddress(ACPI))
        .map_err(|error| Error::Memory(format!("ACPI root pointer: {error}")))?;
    Ok(ACPI)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, Memory};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_slot_has_a_route_for_its_pin() {
        let routes = routes();
        // The first slot's address fits into fewer bytes.
        assert!(routes.windows(7).any(|bytes| bytes == [0x0b, 0xff, 0xff, 0, 0, 0x0a, 16]));
        let interrupts: Vec<u8> = (1..32)
            .map(|slot| {
                // DWordPrefix, slot and any function; pin and source; BytePrefix, interrupt.
                let start = [0x0c, 0xff, 0xff, slot, 0, 0, 0, 0x0a];
                let at = routes.windows(8).position(|window| window == start).unwrap();
                routes[at + 8]
            })
            .collect();
        assert_eq!(interrupts[..9], [17, 18, 19, 20, 21, 22, 23, 16, 17]);
        assert_eq!(interrupts[30], 23);
    }

    #[test]
    fn all_tables_are_found_and_their_sums_are_right() {
        let memory = Memory::new(64, &Backing::Anonymous).unwrap();
        let at = write(&memory.ram, 8).unwrap();
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            memory.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let pointer = read(at, 36);
        assert_eq!(&pointer[..8], b"RSD PTR ");
        assert_eq!(sum(&pointer), 0);
        let table = |at: u64| {
            let head = read(at, 8);
            let len = u32::from_le_bytes(head[4..8].try_into().unwrap());
            let table = read(at, usize::try_from(len).unwrap());
            assert_eq!(sum(&table), 0, "{:?}", &table[..4]);
            table
        };
        let root = table(u64::from_le_bytes(pointer[24..32].try_into().unwrap()));
        assert_eq!(&root[..4], b"XSDT");
        let names: Vec<_> = root[36..]
            .chunks_exact(8)
            .map(|at| table(u64::from_le_bytes(at.try_into().unwrap())))
            .map(|table| String::from_utf8_lossy(&table[..4]).into_owned())
            .collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }

    #[test]
    fn both_buses_are_in_the_segment_that_memory_leads_to() {
        let table = mcfg();
        // After head and reserved bytes: address, segment, first and last bus.
        assert_eq!(table[44..52], ECAM.to_le_bytes());
        assert_eq!(table[52..56], [1, 0, 0, 1]);
        let dsdt = dsdt();
        // Name, OneOp.
        let found = dsdt.as_slice().windows(5).filter(|bytes| bytes == b"_SEG\x01");
        assert_eq!(found.count(), 2);
    }
}
