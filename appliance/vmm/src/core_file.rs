// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's memory as an ELF core file, for `crash` and `gdb`.
//!
//! The file has the notes of a kernel's own dump (`/proc/vmcore`): the registers of each
//! processor, QEMU's note with the control registers, and what the kernel says about itself to
//! debuggers (vmcoreinfo). `crash vmlinux FILE` needs no more than physical addresses and the
//! last of them. For `gdb vmlinux FILE` the segments have virtual addresses as well, if the
//! kernel says where it lies: those of its own text and data, and those of its direct map, as
//! long as the kernel does not move its symbols (`nokaslr`, or `symbol-file -o OFFSET`, the
//! offset being KERNELOFFSET of the vmcoreinfo). If it says nothing, virtual addresses are the
//! physical ones.
//!
//! Everything in guest memory is the guest's word: it is looked at with bounds and can at worst
//! spoil the virtual addresses of the file.

mod registers;
mod vmcoreinfo;

use crate::memory::Ram;
use crate::{Error, Result};
use kvm_bindings::{kvm_regs, kvm_sregs};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmcoreinfo::{KERNEL_MAP, Placement};

/// Registers of a processor that stands still.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessorRegisters {
    /// General registers.
    pub general: kvm_regs,
    /// Segments, descriptor tables and control registers.
    pub special: kvm_sregs,
    /// The model-specific register KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
}

const PAGE: usize = 4096;
/// Bytes that are read from guest memory at once.
const PIECE: usize = 1 << 20;

const HEADER_SIZE: u64 = 64;
const SEGMENT_SIZE: u64 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// A program header (`Elf64_Phdr`).
#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_size: u64,
    memory_size: u64,
}

impl Segment {
    fn put(&self, into: &mut Vec<u8>) {
        into.extend_from_slice(&self.kind.to_le_bytes());
        into.extend_from_slice(&self.flags.to_le_bytes());
        for field in [
            self.offset,
            self.virtual_address,
            self.physical_address,
            self.file_size,
            self.memory_size,
            0,
        ] {
            into.extend_from_slice(&field.to_le_bytes());
        }
    }
}

/// Writes the memory into an empty file; pages that are zero become holes. `vmcoreinfo` is where
/// the kernel keeps its note for debuggers, address and size; if it is not there, the file goes
/// without. Returns the file's size.
///
/// Only the system calls `pwrite64` and `ftruncate` are made.
///
/// # Errors
///
/// Memory that cannot be read, and the operating system's: the file is then incomplete.
pub fn write(
    ram: &Ram,
    processors: &[ProcessorRegisters],
    vmcoreinfo: Option<(u64, u64)>,
    to: &File,
) -> Result<u64> {
    let text = vmcoreinfo.and_then(|range| vmcoreinfo::read(ram, range));
    let placement = text.as_deref().map(|text| Placement::of(text, ram)).unwrap_or_default();
    let notes = registers::notes(processors, text.as_deref());
    let head = head(ram, &placement, &notes);
    to.write_all_at(&head.bytes, 0).map_err(Error::system("writing the core file's headers"))?;
    let mut at = head.memory;
    for region in ram.iter() {
        copy(ram, region.start_addr(), region.len(), to, at)?;
        at = at.saturating_add(region.len());
    }
    to.set_len(at).map_err(Error::system("the size of the core file"))?;
    Ok(at)
}

struct Head {
    bytes: Vec<u8>,
    /// Where in the file memory begins.
    memory: u64,
}

fn head(ram: &Ram, placement: &Placement, notes: &[u8]) -> Head {
    let loads = ram.num_regions().saturating_add(usize::from(placement.text(ram).is_some()));
    let count = u16::try_from(loads.saturating_add(1)).unwrap_or(u16::MAX);
    let notes_at = HEADER_SIZE.saturating_add(SEGMENT_SIZE.saturating_mul(count.into()));
    let notes_size = notes.len() as u64;
    let memory = notes_at.saturating_add(notes_size).next_multiple_of(PAGE as u64);

    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec(); // 64 bits, little-endian, version 1
    bytes.resize(16, 0);
    for half in [4_u16, 62] {
        bytes.extend_from_slice(&half.to_le_bytes()); // ET_CORE, EM_X86_64
    }
    bytes.extend_from_slice(&1_u32.to_le_bytes());
    for offset in [0, HEADER_SIZE, 0] {
        bytes.extend_from_slice(&offset.to_le_bytes()); // entry, segments, sections
    }
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64, 56, count, 0, 0, 0] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }

    Segment {
        kind: PT_NOTE,
        flags: 0,
        offset: notes_at,
        virtual_address: 0,
        physical_address: 0,
        file_size: notes_size,
        memory_size: notes_size,
    }
    .put(&mut bytes);
    let load = |virtual_address, physical_address, offset: u64, size| Segment {
        kind: PT_LOAD,
        flags: 7,
        offset: memory.saturating_add(offset),
        virtual_address,
        physical_address,
        file_size: size,
        memory_size: size,
    };
    // The kernel's text is a second view of the same bytes, and comes first as in a kernel's
    // own dump.
    if let Some(text) = placement.text(ram) {
        load(text.virtual_address, text.physical_address, text.offset, text.size).put(&mut bytes);
    }
    let mut offset: u64 = 0;
    for region in ram.iter() {
        let start = region.start_addr().0;
        load(placement.direct(start), start, offset, region.len()).put(&mut bytes);
        offset = offset.saturating_add(region.len());
    }
    bytes.extend_from_slice(notes);
    Head { bytes, memory }
}

/// Copies memory into the file, without the pages that are zero.
fn copy(ram: &Ram, start: GuestAddress, len: u64, to: &File, at: u64) -> Result<()> {
    let mut piece = vec![0; PIECE];
    let mut done = 0;
    while done < len {
        let left = usize::try_from(len.saturating_sub(done)).unwrap_or(PIECE);
        let now = piece.get_mut(..left.min(PIECE)).unwrap_or_default();
        ram.read_slice(now, GuestAddress(start.0.saturating_add(done))).map_err(|error| {
            Error::Memory(format!("at {:#x}: {error}", start.0.saturating_add(done)))
        })?;
        for (offset, run) in runs(now) {
            let at = at.saturating_add(done).saturating_add(offset as u64);
            to.write_all_at(run, at).map_err(Error::system("writing the core file"))?;
        }
        done = done.saturating_add(now.len() as u64);
    }
    Ok(())
}

/// The stretches of pages that are not zero, with their offsets.
fn runs(bytes: &[u8]) -> Vec<(usize, &[u8])> {
    let mut runs = Vec::new();
    let mut begun: Option<usize> = None;
    let mut at: usize = 0;
    for page in bytes.chunks(PAGE) {
        match (is_zero(page), begun) {
            (false, None) => begun = Some(at),
            (true, Some(start)) => {
                runs.extend(bytes.get(start..at).map(|run| (start, run)));
                begun = None;
            }
            _ => {}
        }
        at = at.saturating_add(page.len());
    }
    runs.extend(begun.and_then(|start| bytes.get(start..).map(|run| (start, run))));
    runs
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// A view of memory at a virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct View {
    virtual_address: u64,
    physical_address: u64,
    /// Offset into the first range of memory.
    offset: u64,
    size: u64,
}

impl Placement {
    /// The mapping of the kernel's own text and data, as far as there is memory behind it.
    fn text(&self, ram: &Ram) -> Option<View> {
        let (start, size) = self.image?;
        let first = ram.iter().next()?;
        let offset = start.checked_sub(first.start_addr().0)?;
        let size = first.len().checked_sub(offset)?.min(size) & !(PAGE as u64 - 1);
        let virtual_address = start.wrapping_sub(self.base?).checked_add(KERNEL_MAP)?;
        virtual_address.checked_add(size)?;
        (size > 0).then_some(View { virtual_address, physical_address: start, offset, size })
    }

    /// Where the kernel sees the memory at this physical address.
    fn direct(&self, physical: u64) -> u64 {
        self.direct_map.and_then(|start| start.checked_add(physical)).unwrap_or(physical)
    }
}

#[cfg(test)]
mod tests;
