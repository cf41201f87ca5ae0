// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A processor before its first instruction: what it can do, and its registers.

use crate::layout::{GDT, PAGE_TABLES, ZERO_PAGE};
use crate::memory::Ram;
use crate::{Error, Result};
use kvm_bindings::{CpuId, KVMIO, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use tranship_kvm::flat_segment;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

/// Flat segments for 64-bit code and data; the boot protocol wants them at 0x10 and 0x18.
const SEGMENTS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Bits of CPUID leaf 1.
mod leaf1 {
    pub(super) const ECX_MONITOR: u32 = 1 << 3;
    pub(super) const ECX_VMX: u32 = 1 << 5;
    pub(super) const ECX_PDCM: u32 = 1 << 15;
    pub(super) const ECX_X2APIC: u32 = 1 << 21;
    pub(super) const ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const ECX_HYPERVISOR: u32 = 1 << 31;
    pub(super) const EDX_HTT: u32 = 1 << 28;
}

/// Bit of CPUID leaf 0x80000001, ECX: AMD's virtualization.
const SVM: u32 = 1 << 2;

/// Levels of the topology leaves: threads, then cores.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The answers of CPUID for processor `number` of `processors`, each a core of one package.
pub(crate) fn identification(supported: &CpuId, number: u8, processors: u8) -> Result<CpuId> {
    let (id, count) = (u32::from(number), u32::from(processors));
    // Bits of the APIC number that tell the cores of a package apart.
    let bits = count.next_power_of_two().trailing_zeros();
    let mut entries: Vec<_> = supported.as_slice().to_vec();
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    let has_topology = supported.as_slice().iter().any(|entry| entry.function == 0xb);
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | id << 24;
                // No virtualization inside: the appliance has no use for it, and a snapshot
                // would have to hold that machine's state, too.
                entry.ecx &= !(leaf1::ECX_MONITOR | leaf1::ECX_PDCM | leaf1::ECX_VMX);
                entry.ecx |= leaf1::ECX_X2APIC | leaf1::ECX_TSC_DEADLINE | leaf1::ECX_HYPERVISOR;
                entry.edx &= !leaf1::EDX_HTT;
                if count > 1 {
                    entry.edx |= leaf1::EDX_HTT;
                }
            }
            // Cores of the package and threads that share a cache (Intel).
            4 if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | (count - 1) << 26;
            }
            // No performance counters: the kernel would program what is not there. The other is
            // AMD's virtualization.
            0xa | 0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 => entry.ecx &= !SVM,
            // Cores of the package (AMD), and which one this is.
            0x8000_0008 => entry.ecx = bits << 12 | (count - 1),
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    if has_topology {
        for (index, level, shift, number) in
            [(0, LEVEL_THREAD, 0, 1), (1, LEVEL_CORE, bits, count), (2, 0, 0, 0)]
        {
            entries.push(kvm_bindings::kvm_cpuid_entry2 {
                function: 0xb,
                index,
                flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: number,
                ecx: index | level << 8,
                edx: id,
                ..Default::default()
            });
        }
    }
    CpuId::from_entries(&entries).map_err(|error| Error::Config(format!("CPUID: {error:?}")))
}

fn long_mode(reset: &kvm_sregs) -> kvm_sregs {
    let data = flat_segment(0x18, 3, false);
    let task = kvm_segment { limit: 0x67, type_: 11, present: 1, ..kvm_segment::default() };
    let limit = u16::try_from(SEGMENTS.len() * 8 - 1).unwrap_or(0);
    kvm_sregs {
        cs: flat_segment(0x10, 11, true),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task,
        gdt: kvm_dtable { base: GDT, limit, ..kvm_dtable::default() },
        cr0: 0x8000_0031, // PG NE ET PE
        cr3: PAGE_TABLES,
        cr4: 0x20,   // PAE
        efer: 0x500, // LME LMA
        ..*reset
    }
}

/// The boot processor at the kernel's entry: long mode, the zero page in RSI.
pub(crate) fn enter_kernel(vcpu: &VcpuFd, ram: &Ram, entry: u64) -> Result<()> {
    for (index, descriptor) in (0_u64..).zip(SEGMENTS) {
        ram.write_obj(descriptor, GuestAddress(GDT + index * 8))
            .map_err(|error| Error::Memory(format!("the descriptor table: {error}")))?;
    }
    let reset = vcpu.get_sregs().map_err(Error::kvm("reading registers"))?;
    vcpu.set_sregs(&long_mode(&reset)).map_err(Error::kvm("entering long mode"))?;
    let registers = kvm_regs {
        rip: entry,
        rsp: PAGE_TABLES - 16,
        rbp: PAGE_TABLES - 16,
        rsi: ZERO_PAGE,
        rflags: 2,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&registers).map_err(Error::kvm("setting registers"))
}

/// Registers of the local APIC: virtual wire mode, as firmware leaves it.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;

ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);

/// Leaves the processor one bank of machine-check registers. KVM gives it 32, to each of which a
/// kernel writes three times, and a kernel that finds none, or is told not to look, complains.
fn allow_one_bank(vcpu: &VcpuFd) {
    let capability = 1_u64;
    // SAFETY: the descriptor is a processor's, and the number is only read.
    if unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &capability) } != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "banks for machine checks");
    }
}

/// What every processor gets: its identification, floating point and interrupt wiring.
pub(crate) fn prepare(vcpu: &VcpuFd, identification: &CpuId) -> Result<()> {
    vcpu.set_cpuid2(identification).map_err(Error::kvm("setting processor features"))?;
    allow_one_bank(vcpu);
    let mut fpu = vcpu.get_fpu().map_err(Error::kvm("reading the floating-point unit"))?;
    fpu.fcw = 0x37f;
    fpu.mxcsr = 0x1f80;
    vcpu.set_fpu(&fpu).map_err(Error::kvm("setting the floating-point unit"))?;
    let mut apic = vcpu.get_lapic().map_err(Error::kvm("reading the local APIC"))?;
    for (register, value) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        for (place, byte) in apic.regs.iter_mut().skip(register).zip(value.to_le_bytes()) {
            *place = byte.cast_signed() as _;
        }
    }
    vcpu.set_lapic(&apic).map_err(Error::kvm("setting the local APIC"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn supported() -> CpuId {
        let leaf = |function, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(1, 0xff10_0800, leaf1::ECX_MONITOR | leaf1::ECX_VMX, leaf1::EDX_HTT),
            leaf(0xa, 7, 7, 7),
            leaf(0xb, 9, 9, 9),
            leaf(0x8000_0001, 0, SVM | 1, 0),
            leaf(0x8000_0008, 0, 0, 0),
        ])
        .unwrap()
    }

    #[test]
    fn each_processor_is_a_core_with_its_own_number() {
        let answers = identification(&supported(), 2, 3).unwrap();
        let find = |function, index| {
            *answers
                .as_slice()
                .iter()
                .find(|entry| entry.function == function && entry.index == index)
                .unwrap()
        };
        let first = find(1, 0);
        assert_eq!(first.ebx, 0x0203_0800);
        assert_eq!(first.ecx & (leaf1::ECX_MONITOR | leaf1::ECX_VMX), 0);
        assert_eq!(find(0x8000_0001, 0).ecx, 1);
        assert_ne!(first.edx & leaf1::EDX_HTT, 0);
        assert_eq!(find(0xa, 0).ebx, 0);
        assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx, find(0xb, 1).edx), (2, 3, 2));
        assert_eq!(find(0x8000_0008, 0).ecx, 2 << 12 | 2);
        let alone = identification(&supported(), 0, 1).unwrap();
        assert_eq!(alone.as_slice()[0].edx & leaf1::EDX_HTT, 0);
    }
}
