// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A processor's state, and the orders in which KVM wants it.

use crate::{Error, Result};
use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// The time-stamp counter, and the time in its terms at which the local APIC's timer rings.
const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;

/// Registers that KVM has but does not list: memory types (SDM volume 3, section 12.11) and
/// the control of machine checks, four for each of KVM's 32 banks.
const UNLISTED: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];
const MACHINE_CHECK: std::ops::RangeInclusive<u32> = 0x400..=0x47f;
/// Hyper-V's registers, listed whether or not the guest has them: it has not.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// Registers read or set by one call; KVM takes 256.
const AT_ONCE: usize = 128;

/// Bytes of the floating-point state before processors with more were made.
const XSAVE: usize = 4096;

/// What this host can save of a processor.
#[derive(Debug)]
pub(crate) struct Savable {
    msrs: Vec<u32>,
    /// Words of the floating-point state.
    xsave: usize,
}

impl Savable {
    pub(crate) fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self> {
        let listed = kvm.get_msr_index_list().map_err(Error::kvm("listing registers"))?;
        let mut msrs: Vec<u32> = listed.as_slice().to_vec();
        msrs.extend(UNLISTED.into_iter().flatten().chain(MACHINE_CHECK));
        msrs.retain(|msr| !matches!(*msr, TSC | TSC_DEADLINE) && !HYPER_V.contains(msr));
        msrs.sort_unstable();
        msrs.dedup();
        let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE);
        Ok(Self { msrs, xsave: bytes.div_ceil(4) })
    }
}

/// For a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ProcessorState {
    /// Function, index, flags, EAX to EDX.
    identification: Vec<[u32; 7]>,
    tsc_khz: Option<u32>,
    mp_state: kvm_mp_state,
    registers: kvm_regs,
    system: kvm_sregs,
    floating_point: Vec<u32>,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    apic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<(u32, u64)>,
    tsc: u64,
    tsc_deadline: u64,
}

fn words(identification: &CpuId) -> Vec<[u32; 7]> {
    let word = |leaf: &kvm_bindings::kvm_cpuid_entry2| {
        [leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    };
    identification.as_slice().iter().map(word).collect()
}

/// Reads the processors, which stand still.
pub(crate) fn save(
    vcpus: &[VcpuFd],
    identifications: &[CpuId],
    savable: &Savable,
) -> Result<Vec<ProcessorState>> {
    let mut states = Vec::with_capacity(vcpus.len());
    for (vcpu, identification) in vcpus.iter().zip(identifications) {
        states.push(save_one(vcpu, identification, savable)?);
    }
    // All counters together: their distances are what makes them one clock.
    for (vcpu, state) in vcpus.iter().zip(&mut states) {
        state.tsc = get_msr(vcpu, TSC)?;
    }
    Ok(states)
}

fn save_one(vcpu: &VcpuFd, identification: &CpuId, savable: &Savable) -> Result<ProcessorState> {
    // Asking for this state makes KVM take up a start-up message that waits, which changes
    // others.
    let mp_state = vcpu.get_mp_state().map_err(Error::kvm("reading a processor's state"))?;
    // Before the APIC: should the timer ring in between, the guest hears it twice and not
    // never.
    let tsc_deadline = get_msr(vcpu, TSC_DEADLINE)?;
    Ok(ProcessorState {
        identification: words(identification),
        tsc_khz: vcpu.get_tsc_khz().ok(),
        mp_state,
        registers: vcpu.get_regs().map_err(Error::kvm("reading registers"))?,
        system: vcpu.get_sregs().map_err(Error::kvm("reading system registers"))?,
        floating_point: get_xsave(vcpu, savable.xsave)?,
        extended_control: vcpu.get_xcrs().map_err(Error::kvm("reading extended control"))?,
        debug: vcpu.get_debug_regs().map_err(Error::kvm("reading debug registers"))?,
        apic: vcpu.get_lapic().map_err(Error::kvm("reading a local APIC"))?,
        msrs: get_msrs(vcpu, &savable.msrs)?,
        events: vcpu.get_vcpu_events().map_err(Error::kvm("reading pending events"))?,
        tsc: 0,
        tsc_deadline,
    })
}

fn get_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u32>> {
    let failed = || Error::kvm("reading the floating-point unit");
    let plain = XSAVE / 4;
    let Some(more @ 1..) = size.checked_sub(plain) else {
        return Ok(vcpu.get_xsave().map_err(failed())?.region.to_vec());
    };
    let mut xsave = Xsave::new(more).map_err(|error| Error::Config(format!("{error:?}")))?;
    // SAFETY: there is room for as much as KVM said that it writes, and this process enables
    // no feature of the processor that would make it more.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(failed())?;
    let mut all = xsave.as_fam_struct_ref().xsave.region.to_vec();
    all.extend_from_slice(xsave.as_slice());
    Ok(all)
}

fn set_xsave(vcpu: &VcpuFd, size: usize, saved: &[u32]) -> Result<()> {
    let failed = || Error::kvm("restoring the floating-point unit");
    let Some((region, more)) = saved.split_first_chunk().filter(|_| saved.len() == size) else {
        return Err(Error::Snapshot(format!(
            "{} words of floating-point state, expected {size}",
            saved.len()
        )));
    };
    if more.is_empty() {
        let xsave = kvm_xsave { region: *region, ..kvm_xsave::default() };
        // SAFETY: KVM has said that it reads no more than these 4096 bytes.
        return unsafe { vcpu.set_xsave(&xsave) }.map_err(failed());
    }
    let mut xsave = Xsave::new(more.len()).map_err(|error| Error::Config(format!("{error:?}")))?;
    xsave.as_mut_slice().copy_from_slice(more);
    // SAFETY: the length, which is what must not be changed, stays.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region = *region;
    // SAFETY: it has the size that KVM has said it reads.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(failed())
}

fn entries(msrs: &[(u32, u64)]) -> Result<Msrs> {
    let entry = |(index, data): &(u32, u64)| kvm_msr_entry {
        index: *index,
        data: *data,
        ..kvm_msr_entry::default()
    };
    let entries: Vec<_> = msrs.iter().map(entry).collect();
    Msrs::from_entries(&entries).map_err(|error| Error::Config(format!("registers: {error:?}")))
}

/// Those of the registers that this processor has.
fn get_msrs(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut found = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let batch: Vec<_> = rest.iter().take(AT_ONCE).map(|index| (*index, 0)).collect();
        let mut msrs = entries(&batch)?;
        // KVM stops at the first that does not exist.
        let count = vcpu.get_msrs(&mut msrs).map_err(Error::kvm("reading model registers"))?;
        let read = msrs.as_slice().iter().take(count);
        found.extend(read.map(|entry| (entry.index, entry.data)));
        let done = if count < batch.len() { count.saturating_add(1) } else { count };
        rest = rest.get(done..).unwrap_or(&[]);
    }
    Ok(found)
}

fn get_msr(vcpu: &VcpuFd, index: u32) -> Result<u64> {
    // A processor without it has none that could be set.
    Ok(get_msrs(vcpu, &[index])?.first().map_or(0, |(_, value)| *value))
}

/// Sets registers. One that cannot be set, but has the value already, is no reason to fail.
fn set_msrs(vcpu: &VcpuFd, saved: &[(u32, u64)]) -> Result<()> {
    let mut rest = saved;
    while !rest.is_empty() {
        let batch = rest.get(..AT_ONCE.min(rest.len())).unwrap_or(rest);
        let count =
            vcpu.set_msrs(&entries(batch)?).map_err(Error::kvm("restoring model registers"))?;
        let mut done = count;
        if let Some((index, value)) = batch.get(count) {
            if get_msrs(vcpu, &[*index])? != [(*index, *value)] {
                return Err(Error::Snapshot(format!(
                    "model register {index:#x} cannot be set to {value:#x}"
                )));
            }
            done = done.saturating_add(1);
        }
        rest = rest.get(done..).unwrap_or(&[]);
    }
    Ok(())
}

/// Whether the processors of a snapshot are the same as those that this host makes.
pub(crate) fn check(saved: &[ProcessorState], identifications: &[CpuId]) -> Result<()> {
    if saved.len() != identifications.len() {
        return Err(Error::Snapshot(format!(
            "{} processors, expected {}",
            saved.len(),
            identifications.len()
        )));
    }
    for ((number, state), identification) in (0..).zip(saved).zip(identifications) {
        let own = words(identification);
        if state.identification != own {
            let differs = state.identification.iter().zip(&own).find(|(old, new)| old != new);
            let leaf = differs.map_or(0, |(_, [function, ..])| *function);
            return Err(Error::Snapshot(format!(
                "processor {number} is another one: leaf {leaf:#x} of its identification differs"
            )));
        }
    }
    Ok(())
}

/// Restores processors that have their identification and nothing else yet, but for their
/// time.
pub(crate) fn restore(vcpus: &[VcpuFd], saved: &[ProcessorState], savable: &Savable) -> Result<()> {
    for (vcpu, state) in vcpus.iter().zip(saved) {
        if let Some(khz) = state.tsc_khz
            && vcpu.get_tsc_khz().ok() != Some(khz)
        {
            vcpu.set_tsc_khz(khz).map_err(Error::kvm("the time-stamp counter's frequency"))?;
        }
        vcpu.set_mp_state(state.mp_state).map_err(Error::kvm("restoring a processor's state"))?;
        vcpu.set_regs(&state.registers).map_err(Error::kvm("restoring registers"))?;
        // They say in which mode the APIC is, and which registers exist.
        vcpu.set_sregs(&state.system).map_err(Error::kvm("restoring system registers"))?;
        vcpu.set_xcrs(&state.extended_control).map_err(Error::kvm("restoring extended control"))?;
        set_xsave(vcpu, savable.xsave, &state.floating_point)?;
        vcpu.set_debug_regs(&state.debug).map_err(Error::kvm("restoring debug registers"))?;
        vcpu.set_lapic(&state.apic).map_err(Error::kvm("restoring a local APIC"))?;
        if let Some((unknown, _)) =
            state.msrs.iter().find(|(index, _)| savable.msrs.binary_search(index).is_err())
        {
            return Err(Error::Snapshot(format!("model register {unknown:#x} is none of a guest")));
        }
        set_msrs(vcpu, &state.msrs)?;
        // Last, because setting registers forgets an exception that is pending.
        vcpu.set_vcpu_events(&state.events).map_err(Error::kvm("restoring pending events"))?;
    }
    Ok(())
}

/// Restores the time-stamp counters, and then what rings at one of their values.
///
/// KVM takes a value less than a second from what the last one set would be by now for an
/// attempt to set the same, and keeps the counters in step. That is what the second processor
/// needs and what the first must not get: a new machine's counters start at zero, and the
/// snapshot may have been made in the guest's first second. A value far away comes before.
pub(crate) fn restore_time(vcpus: &[VcpuFd], saved: &[ProcessorState]) -> Result<()> {
    if let (Some(vcpu), Some(first)) = (vcpus.first(), saved.first()) {
        set_msrs(vcpu, &[(TSC, first.tsc.wrapping_add(1 << 44))])?;
    }
    for (vcpu, state) in vcpus.iter().zip(saved) {
        set_msrs(vcpu, &[(TSC, state.tsc)])?;
    }
    for (vcpu, state) in vcpus.iter().zip(saved) {
        set_msrs(vcpu, &[(TSC_DEADLINE, state.tsc_deadline)])?;
    }
    Ok(())
}

/// Tells the guests' kernels that they stood still, so that none takes the time for its own
/// failure to make progress. A processor that was never started has no clock to tell it by.
pub(crate) fn stood_still(vcpus: &[VcpuFd]) {
    for vcpu in vcpus {
        if let Err(error) = vcpu.kvmclock_ctrl() {
            tracing::debug!(%error, "a processor is not told that it stood still");
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A processor after a reset, more or less.
    pub(in crate::snapshot) fn state(identification: &CpuId) -> ProcessorState {
        ProcessorState {
            identification: words(identification),
            tsc_khz: Some(2_000_000),
            mp_state: kvm_mp_state::default(),
            registers: kvm_regs { rip: 0xfff0, rflags: 2, ..kvm_regs::default() },
            system: kvm_sregs::default(),
            floating_point: vec![0x37f; XSAVE / 4],
            extended_control: kvm_xcrs::default(),
            debug: kvm_debugregs::default(),
            apic: kvm_lapic_state::default(),
            events: kvm_vcpu_events::default(),
            msrs: vec![(0x174, 0x10), (0xc000_0082, u64::MAX)],
            tsc: 1 << 40,
            tsc_deadline: 0,
        }
    }
}
