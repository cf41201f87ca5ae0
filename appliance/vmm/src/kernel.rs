// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Puts a kernel, its initramfs and the zero page into memory: the 64-bit boot protocol of
//! Linux (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use crate::layout::{
    ACPI_END, BUSES, COMMAND_LINE, COMMAND_LINE_SIZE, EBDA, ECAM, ECAM_BUS, HIGH_START,
    INITRAMFS_END, KERNEL, LOW_END, PAGE_TABLES, ZERO_PAGE,
};
use crate::memory::Ram;
use crate::{Error, Result};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{Elf, KernelLoader};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

/// Types of memory ranges (section "e820").
const USABLE: u32 = 1;
const RESERVED: u32 = 2;

/// The zero page's header: a boot loader without a number of its own, the header's magic.
const LOADER_UNKNOWN: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Kernels are linked for this alignment.
const ALIGNMENT: u32 = 0x100_0000;

const PAGE: u64 = 4096;
/// Present and writable; and a page of 2 MiB.
const TABLE: u64 = 0x03;
const LARGE_PAGE: u64 = 0x83;

/// Loads everything; returns the kernel's entry point.
pub(crate) fn load(
    ram: &Ram,
    kernel: &mut File,
    initramfs: &mut File,
    command_line: &str,
    acpi: u64,
) -> Result<u64> {
    kernel.rewind().map_err(Error::system("the kernel file"))?;
    let loaded = Elf::load(ram, None, kernel, Some(GuestAddress(KERNEL)))
        .map_err(|error| Error::Kernel(format!("{error}; an uncompressed ELF file is expected")))?;
    let end = loaded.kernel_end;
    let (start, size) = place_initramfs(ram, initramfs, end)?;
    let line = command_line.as_bytes();
    if line.len() >= COMMAND_LINE_SIZE || line.contains(&0) {
        return Err(Error::Config(format!(
            "the kernel's command line has {} bytes, at most {} without zeroes are possible",
            line.len(),
            COMMAND_LINE_SIZE - 1
        )));
    }
    let put = |bytes: &[u8], at: u64| {
        ram.write_slice(bytes, GuestAddress(at))
            .map_err(|error| Error::Memory(format!("at {at:#x}: {error}")))
    };
    put(line, COMMAND_LINE)?;
    put(&[0], COMMAND_LINE.saturating_add(line.len() as u64))?;
    let mut page = boot_params {
        hdr: setup_header {
            type_of_loader: LOADER_UNKNOWN,
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: ALIGNMENT,
            cmd_line_ptr: low(COMMAND_LINE),
            cmdline_size: u32::try_from(line.len()).unwrap_or(0),
            ramdisk_image: low(start),
            ramdisk_size: low(size),
            ..setup_header::default()
        },
        acpi_rsdp_addr: acpi,
        ..boot_params::default()
    };
    let map = memory_map(ram);
    for (entry, (addr, size, kind)) in page.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: *kind };
    }
    page.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&page, GuestAddress(ZERO_PAGE)), ram)
        .map_err(|error| Error::Memory(format!("the zero page: {error}")))?;
    // The first gibibyte at its own addresses.
    put(&((PAGE_TABLES + PAGE) | TABLE).to_le_bytes(), PAGE_TABLES)?;
    put(&((PAGE_TABLES + 2 * PAGE) | TABLE).to_le_bytes(), PAGE_TABLES + PAGE)?;
    let directory: Vec<u8> =
        (0..512_u64).flat_map(|index| (index << 21 | LARGE_PAGE).to_le_bytes()).collect();
    put(&directory, PAGE_TABLES + 2 * PAGE)?;
    Ok(loaded.kernel_load.raw_value())
}

fn low(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// End of the memory below the hole.
fn low_end(ram: &Ram) -> u64 {
    ram.last_addr().raw_value().saturating_add(1).min(LOW_END)
}

/// The initramfs goes to the top of low memory, clear of the kernel.
fn place_initramfs(ram: &Ram, file: &mut File, kernel_end: u64) -> Result<(u64, u64)> {
    let size = file.seek(SeekFrom::End(0)).map_err(Error::system("the initramfs"))?;
    file.rewind().map_err(Error::system("the initramfs"))?;
    let top = low_end(ram).min(INITRAMFS_END);
    let start = top
        .checked_sub(size)
        .map(|start| start & !(PAGE - 1))
        .filter(|start| *start >= kernel_end)
        .ok_or_else(|| {
            Error::Memory(format!(
                "an initramfs of {size} bytes does not fit between the kernel's end at \
                 {kernel_end:#x} and {top:#x}"
            ))
        })?;
    let count = usize::try_from(size)
        .map_err(|_| Error::Memory(format!("an initramfs of {size} bytes is too large")))?;
    ram.read_exact_volatile_from(GuestAddress(start), file, count)
        .map_err(|error| Error::Memory(format!("the initramfs: {error}")))?;
    Ok((start, size))
}

/// What the kernel may use and what not.
fn memory_map(ram: &Ram) -> Vec<(u64, u64, u32)> {
    let low_end = low_end(ram);
    let mut map = vec![
        (0, EBDA, USABLE),
        (crate::layout::ACPI, ACPI_END - crate::layout::ACPI, RESERVED),
        (KERNEL, low_end.saturating_sub(KERNEL), USABLE),
        (ECAM, ECAM_BUS * u64::from(BUSES), RESERVED),
    ];
    let end = ram.last_addr().raw_value().saturating_add(1);
    if end > HIGH_START {
        map.push((HIGH_START, end - HIGH_START, USABLE));
    }
    map
}
