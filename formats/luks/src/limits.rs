// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a header may cost: its numbers decide how long unlocking takes.

use tranship_block::{Error, Result};

/// The most that unlocking one container may cost, over all its key slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a key.
    pub key_bytes: u32,
    /// Anti-forensic stripes of a key slot.
    pub stripes: u32,
    /// Iterations of PBKDF2, counted once for each block of the hash that a key needs.
    pub pbkdf2_iterations: u64,
    /// Bytes of memory for Argon2.
    pub argon2_memory: u64,
    /// Bytes that Argon2 fills: its memory times its passes.
    pub argon2_work: u64,
}

impl Default for Limits {
    /// Far above what `cryptsetup` and QEMU choose by themselves: about a minute of work.
    fn default() -> Self {
        Self {
            key_bytes: 512,
            stripes: 10_000,
            pbkdf2_iterations: 200_000_000,
            argon2_memory: 1 << 30,
            argon2_work: 64 << 30,
        }
    }
}

/// What is left of [`Limits`] while slot after slot is tried.
#[derive(Debug)]
pub(crate) struct Budget {
    limits: Limits,
    iterations: u64,
    work: u64,
}

impl Budget {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self { limits: *limits, iterations: limits.pbkdf2_iterations, work: limits.argon2_work }
    }

    /// Takes `blocks` hash blocks of `iterations` each.
    pub(crate) fn spend_pbkdf2(&mut self, iterations: u32, blocks: u64) -> Result<()> {
        let cost = u64::from(iterations).saturating_mul(blocks);
        self.iterations = self.iterations.checked_sub(cost).ok_or_else(|| {
            Error::unsupported(format!(
                "pbkdf2 asks for {cost} iterations, expected at most {} in all key slots",
                self.limits.pbkdf2_iterations
            ))
        })?;
        Ok(())
    }

    /// Takes `passes` over `memory` bytes.
    pub(crate) fn spend_argon2(&mut self, memory: u64, passes: u32) -> Result<()> {
        if memory > self.limits.argon2_memory {
            return Err(Error::unsupported(format!(
                "argon2 asks for {memory} bytes of memory, expected at most {}",
                self.limits.argon2_memory
            )));
        }
        let cost = memory.saturating_mul(u64::from(passes));
        self.work = self.work.checked_sub(cost).ok_or_else(|| {
            Error::unsupported(format!(
                "argon2 asks for {passes} passes over {memory} bytes, expected at most {} bytes \
                 in all key slots",
                self.limits.argon2_work
            ))
        })?;
        Ok(())
    }

    /// Checks the sizes that decide how much of the file is read.
    pub(crate) fn check_slot(&self, key_bytes: u32, stripes: u32) -> Result<()> {
        if key_bytes == 0 || key_bytes > self.limits.key_bytes {
            return Err(Error::corrupt(format!(
                "key has {key_bytes} bytes, expected 1 to {}",
                self.limits.key_bytes
            )));
        }
        if stripes == 0 || stripes > self.limits.stripes {
            return Err(Error::corrupt(format!(
                "key is split into {stripes} stripes, expected 1 to {}",
                self.limits.stripes
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_one_for_all_slots() {
        let limits = Limits { pbkdf2_iterations: 100, ..Limits::default() };
        let mut budget = Budget::new(&limits);
        budget.spend_pbkdf2(30, 2).unwrap();
        let error = budget.spend_pbkdf2(21, 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "pbkdf2 asks for 42 iterations, expected at most 100 in all key slots"
        );
    }

    #[test]
    fn argon2_is_limited_in_memory_and_in_work() {
        let mut budget = Budget::new(&Limits::default());
        let error = budget.spend_argon2((1 << 30) + 1024, 1).unwrap_err();
        assert!(error.to_string().contains("expected at most 1073741824"), "{error}");
        budget.spend_argon2(1 << 30, 64).unwrap();
        assert!(budget.spend_argon2(1 << 20, 1).is_err());
    }
}
