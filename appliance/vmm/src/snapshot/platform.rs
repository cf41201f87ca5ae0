// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the processors share inside of KVM: interrupt controllers, interval timer and clock.

use crate::{Error, Result};
use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// The two 8259 and the IOAPIC.
const CHIPS: [u32; 3] = [
    kvm_bindings::KVM_IRQCHIP_PIC_MASTER,
    kvm_bindings::KVM_IRQCHIP_PIC_SLAVE,
    kvm_bindings::KVM_IRQCHIP_IOAPIC,
];

/// For a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PlatformState {
    chips: Vec<kvm_irqchip>,
    timer: kvm_pit_state2,
    /// Nanoseconds of the guest's clock.
    clock: u64,
}

/// Reads the state while the processors stand still.
pub(crate) fn save(vm: &VmFd) -> Result<PlatformState> {
    let mut chips = Vec::new();
    for number in CHIPS {
        let mut chip = kvm_irqchip { chip_id: number, ..kvm_irqchip::default() };
        vm.get_irqchip(&mut chip).map_err(Error::kvm("reading an interrupt controller"))?;
        chips.push(chip);
    }
    let timer = vm.get_pit2().map_err(Error::kvm("reading the interval timer"))?;
    let clock = vm.get_clock().map_err(Error::kvm("reading the clock"))?.clock;
    Ok(PlatformState { chips, timer, clock })
}

/// Restores interrupt controllers and timer; after the local APICs, whose state would hide
/// what the IOAPIC has still to deliver.
pub(crate) fn restore(vm: &VmFd, saved: &PlatformState) -> Result<()> {
    let numbers: Vec<u32> = saved.chips.iter().map(|chip| chip.chip_id).collect();
    if numbers != CHIPS {
        return Err(Error::Snapshot(format!(
            "interrupt controllers {numbers:?}, expected {CHIPS:?}"
        )));
    }
    for chip in &saved.chips {
        vm.set_irqchip(chip).map_err(Error::kvm("restoring an interrupt controller"))?;
    }
    vm.set_pit2(&saved.timer).map_err(Error::kvm("restoring the interval timer"))
}

/// Lets the clock go on from where it was, however long ago that is: without flags KVM does
/// not add the time between. After the time-stamp counters, from which the guest tells how
/// much of it has passed.
pub(crate) fn restore_clock(vm: &VmFd, saved: &PlatformState) -> Result<()> {
    let clock = kvm_clock_data { clock: saved.clock, ..kvm_clock_data::default() };
    vm.set_clock(&clock).map_err(Error::kvm("restoring the clock"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::snapshot) fn state() -> PlatformState {
        let chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..kvm_irqchip::default() });
        PlatformState { chips: chips.to_vec(), timer: kvm_pit_state2::default(), clock: 1 << 33 }
    }
}
