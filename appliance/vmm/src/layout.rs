// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where everything lies in the guest's physical address space.
//!
//! ```text
//! 0x0000_0500  descriptor table          0xc000_0000  BAR windows of the two buses
//! 0x0000_7000  zero page                 0xe000_0000  configuration space (ECAM), two buses
//! 0x0000_9000  first page tables         0xfec0_0000  IOAPIC
//! 0x0002_0000  command line              0xfee0_0000  local APICs
//! 0x000e_0000  ACPI tables               0xfffb_d000  task state segment for Intel's KVM
//! 0x0010_0000  kernel, initramfs on top  0x1_0000_0000  memory above 3 GiB
//! ```

/// End of the memory below the hole for devices.
pub(crate) const LOW_END: u64 = 0xc000_0000;
/// Where memory goes on above the hole.
pub(crate) const HIGH_START: u64 = 1 << 32;

/// Global descriptor table of the boot processor.
pub(crate) const GDT: u64 = 0x500;
/// The zero page (`struct boot_params`).
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Page tables: one page each for the three levels that map the first gibibyte.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes of the command line that every kernel takes, its final zero included.
pub(crate) const COMMAND_LINE_SIZE: usize = 2048;
/// End of the conventional memory that the kernel may use.
pub(crate) const EBDA: u64 = 0x9_fc00;
/// The ACPI tables; kernels before boot protocol 2.14 search here.
pub(crate) const ACPI: u64 = 0xe_0000;
/// End of the area in which ACPI's root pointer is searched.
pub(crate) const ACPI_END: u64 = 0x10_0000;
/// The lowest address of the kernel.
pub(crate) const KERNEL: u64 = 0x10_0000;
/// Old kernels take an initramfs only below this address.
pub(crate) const INITRAMFS_END: u64 = 0x7fff_f000;

/// The segment of PCI's buses: not 0, which kernels reach through ports (`pci::HOST_BRIDGE`).
pub(crate) const PCI_SEGMENT: u16 = 1;
/// PCI buses, each a host bridge of its own: 32 slots with 8 functions each do not hold 256
/// disks and the rest.
pub(crate) const BUSES: u8 = 2;
/// Memory window of the first bus for BARs; the second bus' follows.
pub(crate) const BAR_WINDOW: u64 = 0xc000_0000;
/// Size of one bus' window: 256 functions with [`BAR_SIZE`] each.
pub(crate) const BAR_WINDOW_SIZE: u64 = 256 * BAR_SIZE;
/// Size of the one BAR of each function.
pub(crate) const BAR_SIZE: u64 = 0x1_0000;
/// The configuration space of all functions, mapped into memory.
pub(crate) const ECAM: u64 = 0xe000_0000;
/// Configuration space of one bus.
pub(crate) const ECAM_BUS: u64 = 1 << 20;

pub(crate) const IOAPIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel needs for real mode.
pub(crate) const TSS: usize = 0xfffb_d000;

/// First port of the serial console, and its interrupt.
pub(crate) const SERIAL: u16 = 0x3f8;
pub(crate) const SERIAL_INTERRUPT: u32 = 4;
/// The interrupts of PCI's pins: inputs of the IOAPIC that nothing else ever had.
pub(crate) const PIN_INTERRUPT: u32 = 16;
pub(crate) const PIN_INTERRUPTS: u32 = 8;
/// PCI configuration mechanism 1: address and data.
pub(crate) const PCI_ADDRESS: u16 = 0xcf8;
pub(crate) const PCI_DATA: u16 = 0xcfc;
/// Writing [`RESET_VALUE`] here ends the machine (FADT's reset register).
pub(crate) const RESET: u16 = 0x600;
pub(crate) const RESET_VALUE: u8 = 1;
/// FADT's sleep control and status registers.
pub(crate) const SLEEP_CONTROL: u16 = 0x604;
pub(crate) const SLEEP_STATUS: u16 = 0x605;
/// SLP_EN of the sleep control register (ACPI 6.5, section 4.8.3.7).
pub(crate) const SLEEP_ENABLE: u8 = 1 << 5;
