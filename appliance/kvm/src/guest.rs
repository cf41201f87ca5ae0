// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The micro-guest: a few hundred bytes of ring-0 code that do once what every Linux
//! kernel does early, and say so after each step through one port.

use std::ops::Range;

/// The port that the guest reports to.
pub(crate) const PORT: u16 = 0xe9;
/// Reported when a step's result is wrong.
pub(crate) const WRONG_RESULT: u8 = 0xfe;
/// Reported when an exception comes that no step asks for.
pub(crate) const UNEXPECTED: u8 = 0xfd;
/// The step that is timed; the guest reports it up to [`TIMED_RUNS`] times.
pub(crate) const TIMED_STEP: u8 = 10;
pub(crate) const TIMED_RUNS: u32 = 12;
/// Turns of the loop in one timed run.
pub(crate) const TURNS: u32 = 10_000;

/// What the guest has done when it reports number n, at index n - 1.
pub(crate) const STEPS: [&str; 10] = [
    "long mode",
    "cmpxchg16b",
    "int3",
    "invalid opcode",
    "page fault",
    "xsave and xrstor",
    "cr3, invlpg and swapgs",
    "x2APIC interrupt to itself",
    "local APIC timer",
    "ring-0 loop",
];

/// Guest-physical addresses. Everything lies in the first 2 MiB, which are mapped to
/// themselves by one large page; the page fault step uses an address behind them.
pub(crate) const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
pub(crate) const IDT: u64 = 0x4000;
pub(crate) const GDT: u64 = 0x5000;
pub(crate) const TSS: u64 = 0x6000;
pub(crate) const STACK: u64 = 0x9000;
pub(crate) const CODE: u64 = 0x10000;
/// Bytes of memory; the steps use 0x20000 to 0x22fff as scratch.
pub(crate) const MEMORY: usize = 0x30000;

/// Vectors with a gate: all exceptions and those that the steps use.
pub(crate) const VECTORS: u64 = 64;
const PAGE: usize = 4096;

/// A page of guest memory; the alignment is what KVM asks for.
#[derive(Clone, Debug)]
#[repr(C, align(4096))]
pub(crate) struct Page([u8; PAGE]);

// The code starts with the offsets of its entry points. Registers: r12 counts what the
// handlers have seen, so that a handler which did not run, or ran twice, is noticed.
core::arch::global_asm!(
    r#"
    .pushsection .rodata.tranship_kvm_guest, "a"
    .balign 16
    .globl tranship_kvm_guest_begin
    .globl tranship_kvm_guest_end
tranship_kvm_guest_begin:
    .quad .Ltranship_entry - tranship_kvm_guest_begin
    .quad .Ltranship_breakpoint - tranship_kvm_guest_begin
    .quad .Ltranship_invalid - tranship_kvm_guest_begin
    .quad .Ltranship_fault - tranship_kvm_guest_begin
    .quad .Ltranship_interrupt - tranship_kvm_guest_begin
    .quad .Ltranship_unexpected - tranship_kvm_guest_begin

.Ltranship_entry:
    mov al, 1
    out 0xe9, al

    mov ebx, 0x20000
    xor eax, eax
    xor edx, edx
    mov ecx, 7
    lock cmpxchg16b [rbx]
    jnz .Ltranship_wrong
    cmp qword ptr [rbx + 8], 7
    jne .Ltranship_wrong
    mov al, 2
    out 0xe9, al

    xor r12d, r12d
    int3
    cmp r12d, 1
    jne .Ltranship_wrong
    mov al, 3
    out 0xe9, al

    ud2
    cmp r12d, 3
    jne .Ltranship_wrong
    mov al, 4
    out 0xe9, al

    mov ebx, 0x40000000
    mov rax, [rbx]
    cmp r12d, 7
    jne .Ltranship_wrong
    mov al, 5
    out 0xe9, al

    mov eax, 1
    xor ecx, ecx
    cpuid
    mov ebx, 0x21000
    bt ecx, 26                # without xsave its predecessor has to do
    jc 1f
    fxsave [rbx]
    fxrstor [rbx]
    jmp 2f
1:  mov rax, cr4
    or eax, 0x40000           # OSXSAVE
    mov cr4, rax
    xor ecx, ecx
    xgetbv
    or eax, 3                 # x87 and SSE
    xsetbv
    mov eax, 3
    xor edx, edx
    xsave [rbx]
    xrstor [rbx]
2:  mov al, 6
    out 0xe9, al

    mov rax, cr3
    mov cr3, rax
    invlpg [rbx]
    mov ecx, 0xc0000102       # KERNEL_GS_BASE
    mov eax, 0x1234
    xor edx, edx
    wrmsr
    swapgs
    mov ecx, 0xc0000101       # GS_BASE
    rdmsr
    cmp eax, 0x1234
    jne .Ltranship_wrong
    swapgs
    rdtsc
    mov al, 7
    out 0xe9, al

    mov ecx, 0x1b             # APIC_BASE: enable, x2APIC
    rdmsr
    or eax, 0xc00
    wrmsr
    mov ecx, 0x80f            # spurious vector: enable
    mov eax, 0x1ff
    xor edx, edx
    wrmsr
    mov ecx, 0x83f            # self-IPI
    mov eax, 0x30
    wrmsr
    sti
    hlt
    cli
    cmp r12d, 15
    jne .Ltranship_wrong
    mov al, 8
    out 0xe9, al

    mov ecx, 0x83e            # timer: divide by 1
    mov eax, 0xb
    xor edx, edx
    wrmsr
    mov ecx, 0x832            # one shot
    mov eax, 0x30
    wrmsr
    mov ecx, 0x838
    mov eax, 50000
    wrmsr
    sti
    hlt
    cli
    cmp r12d, 23
    jne .Ltranship_wrong
    mov al, 9
    out 0xe9, al

    mov esi, {runs}
    mov ebx, 0x22000
3:  mov ecx, {turns}
4:  add qword ptr [rbx], 1
    dec ecx
    jnz 4b
    mov al, {timed}
    out 0xe9, al
    dec esi
    jnz 3b
    cli
    hlt

.Ltranship_wrong:
    mov al, {wrong}
    out 0xe9, al
    cli
    hlt
.Ltranship_unexpected:
    mov al, {unexpected}
    out 0xe9, al
    cli
    hlt
.Ltranship_breakpoint:
    add r12d, 1
    iretq
.Ltranship_invalid:
    add r12d, 2
    add qword ptr [rsp], 2    # behind ud2
    iretq
.Ltranship_fault:
    push rax
    mov rax, cr2
    cmp eax, 0x40000000
    pop rax
    jne .Ltranship_unexpected
    add r12d, 4
    add rsp, 8                # the error code
    add qword ptr [rsp], 3    # behind mov rax, [rbx]
    iretq
.Ltranship_interrupt:
    push rax
    push rcx
    push rdx
    add r12d, 8
    mov ecx, 0x80b            # end of interrupt
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    pop rax
    iretq
tranship_kvm_guest_end:
    .popsection
"#,
    runs = const TIMED_RUNS,
    turns = const TURNS,
    timed = const TIMED_STEP,
    wrong = const WRONG_RESULT,
    unexpected = const UNEXPECTED,
);

unsafe extern "C" {
    static tranship_kvm_guest_begin: u8;
    static tranship_kvm_guest_end: u8;
}

/// The code with its table of entry points.
fn code() -> &'static [u8] {
    // SAFETY: both symbols are in one section of read-only data that is never unmapped,
    // the end behind the beginning, and every byte between them is initialised.
    unsafe {
        let Range { start, end } =
            &raw const tranship_kvm_guest_begin..&raw const tranship_kvm_guest_end;
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

/// The address of entry point `number`: 0 the start, then the handlers in their order.
fn entry_point(number: usize) -> u64 {
    let table = code().as_chunks::<8>().0;
    CODE + table.get(number).map_or(0, |offset| u64::from_le_bytes(*offset))
}

/// Where the guest starts.
pub(crate) fn start() -> u64 {
    entry_point(0)
}

/// The guest's memory: page tables, descriptor tables and code.
pub(crate) fn memory() -> Vec<Page> {
    let mut bytes = vec![0; MEMORY];
    let mut put = |at: u64, data: &[u8]| {
        let place = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at..at + data.len()));
        place.expect("all addresses are constants within the memory").copy_from_slice(data);
    };
    put(PML4, &(PDPT | 3).to_le_bytes());
    put(PDPT, &(PD | 3).to_le_bytes());
    put(PD, &0x83u64.to_le_bytes());
    put(GDT + 8, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    put(GDT + 16, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    for vector in 0..VECTORS {
        let handler = entry_point(match vector {
            3 => 1,
            6 => 2,
            14 => 3,
            0x30 => 4,
            _ => 5,
        });
        // An interrupt gate for the code segment at selector 8, present.
        let low =
            (handler & 0xffff) | (8 << 16) | (0x8e00 << 32) | ((handler >> 16 & 0xffff) << 48);
        put(IDT + vector * 16, &low.to_le_bytes());
        put(IDT + vector * 16 + 8, &(handler >> 32).to_le_bytes());
    }
    put(CODE, code());
    bytes.as_chunks::<PAGE>().0.iter().map(|page| Page(*page)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_starts_with_entry_points_inside_itself() {
        let len = u64::try_from(code().len()).unwrap();
        let mut points: Vec<_> = (0..6).map(|number| entry_point(number) - CODE).collect();
        assert_eq!(points[0], 48);
        points.sort_unstable();
        points.dedup();
        assert_eq!(points.len(), 6);
        assert!(points.iter().all(|point| *point < len) && len < 1024, "{points:?} of {len}");
    }

    #[test]
    fn memory_is_aligned_and_whole() {
        let memory = memory();
        assert_eq!(size_of_val(memory.as_slice()), MEMORY);
        assert_eq!(memory.as_ptr().addr() % PAGE, 0);
        assert_eq!(memory[16].0[..48], code()[..48]);
    }
}
