// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The frequency of the processor's time-stamp counter.
//!
//! Under emulation a kernel that is not told calibrates against an emulated timer, which
//! costs time and can fail on a busy host. QEMU's emulated counter ticks as the host's.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The counter's frequency in kHz; measured once in 10 ms unless CPUID tells.
pub(crate) fn tsc_khz() -> Option<u64> {
    static FOUND: OnceLock<Option<u64>> = OnceLock::new();
    *FOUND.get_or_init(|| from_cpuid().or_else(measured))
}

#[cfg(target_arch = "x86_64")]
fn from_cpuid() -> Option<u64> {
    use std::arch::x86_64::__cpuid;
    if __cpuid(0).eax < 0x15 {
        return None;
    }
    // Leaf 0x15: EBX/EAX is the ratio of the counter to a crystal of ECX Hz.
    let leaf = __cpuid(0x15);
    let (denominator, numerator, crystal) =
        (u64::from(leaf.eax), u64::from(leaf.ebx), u64::from(leaf.ecx));
    if crystal == 0 || numerator == 0 {
        return None;
    }
    crystal.checked_mul(numerator)?.checked_div(denominator).map(|hertz| hertz / 1000)
}

#[cfg(target_arch = "x86_64")]
fn measured() -> Option<u64> {
    let read = || {
        // SAFETY: RDTSC has no preconditions; every x86_64 processor has it.
        unsafe { std::arch::x86_64::_rdtsc() }
    };
    let (begin, first) = (Instant::now(), read());
    std::thread::sleep(Duration::from_millis(10));
    let (elapsed, second) = (begin.elapsed(), read());
    let micros = u64::try_from(elapsed.as_micros()).ok()?;
    second.checked_sub(first)?.checked_mul(1000)?.checked_div(micros)
}

#[cfg(not(target_arch = "x86_64"))]
fn from_cpuid() -> Option<u64> {
    None
}

#[cfg(not(target_arch = "x86_64"))]
fn measured() -> Option<u64> {
    None
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    #[test]
    fn the_frequency_is_one_that_processors_have() {
        let khz = super::tsc_khz().unwrap();
        assert!((400_000..8_000_000).contains(&khz), "{khz} kHz");
    }
}
