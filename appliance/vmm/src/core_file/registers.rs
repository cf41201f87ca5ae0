// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The notes of a core file: registers as the kernel and QEMU lay them out.

use super::ProcessorRegisters;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

/// Type of the kernel's note about a thread (<linux/elf.h>).
const NT_PRSTATUS: u32 = 1;
/// Size of `struct elf_prstatus` and of the part before the registers (<linux/elfcore.h>).
const PRSTATUS_SIZE: usize = 336;
const BEFORE_REGISTERS: usize = 112;
const PID_OFFSET: usize = 32;
/// Version of QEMU's `QEMUCPUState`, and its size.
const STATE_VERSION: u32 = 1;
const STATE_SIZE: usize = 440;

/// All notes, one after the other.
pub(super) fn notes(processors: &[ProcessorRegisters], vmcoreinfo: Option<&[u8]>) -> Vec<u8> {
    let mut notes = Vec::new();
    // Debuggers take the notes of one kind in a row as those of the processors in order.
    for (number, processor) in (1..).zip(processors) {
        note(&mut notes, b"CORE\0", NT_PRSTATUS, &thread(number, processor));
    }
    for processor in processors {
        note(&mut notes, b"QEMU\0", 0, &control(processor));
    }
    if let Some(text) = vmcoreinfo {
        note(&mut notes, b"VMCOREINFO\0", 0, text);
    }
    notes
}

/// A note: sizes, type, name and contents, each padded to 4 bytes.
fn note(into: &mut Vec<u8>, name: &[u8], kind: u32, contents: &[u8]) {
    let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(0);
    for word in [size(name), size(contents), kind] {
        into.extend_from_slice(&word.to_le_bytes());
    }
    for part in [name, contents] {
        into.extend_from_slice(part);
        into.resize(into.len().next_multiple_of(4), 0);
    }
}

/// `struct elf_prstatus`: only the thread's number and its registers mean something.
fn thread(number: u32, processor: &ProcessorRegisters) -> Vec<u8> {
    let mut status = vec![0; PID_OFFSET];
    status.extend_from_slice(&number.to_le_bytes());
    status.resize(BEFORE_REGISTERS, 0);
    let kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = processor.general;
    let kvm_sregs { cs, ds, es, fs, gs, ss, .. } = processor.special;
    let selector = |segment: kvm_segment| u64::from(segment.selector);
    // No system call is under way.
    let original_rax = u64::MAX;
    for register in [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        original_rax,
        rip,
        selector(cs),
        rflags,
        rsp,
        selector(ss),
        fs.base,
        gs.base,
        selector(ds),
        selector(es),
        selector(fs),
        selector(gs),
    ] {
        status.extend_from_slice(&register.to_le_bytes());
    }
    status.resize(PRSTATUS_SIZE, 0);
    status
}

/// QEMU's `QEMUCPUState`, in which `crash` finds control registers and descriptor tables.
fn control(processor: &ProcessorRegisters) -> Vec<u8> {
    let (general, special) = (&processor.general, &processor.special);
    let mut state = STATE_VERSION.to_le_bytes().to_vec();
    state.extend_from_slice(&u32::try_from(STATE_SIZE).unwrap_or(0).to_le_bytes());
    for register in [
        general.rax,
        general.rbx,
        general.rcx,
        general.rdx,
        general.rsi,
        general.rdi,
        general.rsp,
        general.rbp,
        general.r8,
        general.r9,
        general.r10,
        general.r11,
        general.r12,
        general.r13,
        general.r14,
        general.r15,
        general.rip,
        general.rflags,
    ] {
        state.extend_from_slice(&register.to_le_bytes());
    }
    for segment in [
        special.cs,
        special.ds,
        special.es,
        special.fs,
        special.gs,
        special.ss,
        special.ldt,
        special.tr,
    ] {
        put_segment(
            &mut state,
            segment.selector.into(),
            segment.limit,
            flags(&segment),
            segment.base,
        );
    }
    for kvm_dtable { base, limit, .. } in [special.gdt, special.idt] {
        put_segment(&mut state, 0, limit.into(), 0, base);
    }
    // There is no control register 1.
    for register in [special.cr0, 0, special.cr2, special.cr3, special.cr4] {
        state.extend_from_slice(&register.to_le_bytes());
    }
    state.extend_from_slice(&processor.kernel_gs_base.to_le_bytes());
    state
}

fn put_segment(into: &mut Vec<u8>, selector: u32, limit: u32, flags: u32, base: u64) {
    for word in [selector, limit, flags, 0] {
        into.extend_from_slice(&word.to_le_bytes());
    }
    into.extend_from_slice(&base.to_le_bytes());
}

/// The attributes where the second word of a segment's descriptor has them.
fn flags(segment: &kvm_segment) -> u32 {
    [
        (segment.type_, 8),
        (segment.s, 12),
        (segment.dpl, 13),
        (segment.present, 15),
        (segment.avl, 20),
        (segment.l, 21),
        (segment.db, 22),
        (segment.g, 23),
    ]
    .into_iter()
    .fold(0, |flags, (field, at)| flags | u32::from(field) << at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_have_the_sizes_that_debuggers_expect() {
        let processor = ProcessorRegisters::default();
        assert_eq!(thread(1, &processor).len(), PRSTATUS_SIZE);
        assert_eq!(control(&processor).len(), STATE_SIZE);
        let mut notes = Vec::new();
        note(&mut notes, b"QEMU\0", 0, &[1; 5]);
        assert_eq!(notes.len(), 12 + 8 + 8);
    }

    #[test]
    fn attributes_lie_where_a_descriptor_has_them() {
        let code = tranship_kvm::flat_segment(0x10, 11, true);
        assert_eq!(flags(&code), 0x00a0_9b00);
    }
}
