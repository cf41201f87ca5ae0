// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine is saved while it runs, and goes on elsewhere.

use super::{Machine, Parts};
use crate::core_file::{self, ProcessorRegisters};
use crate::memory::Backing;
use crate::pci::lock;
use crate::snapshot::{Snapshot, State, memory, platform, processor};
use crate::{Error, Result};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use std::fs::File;
use std::sync::Arc;

/// Swapped with GS by the kernel (AMD64 Architecture Programmer's Manual, volume 2, 4.4.2).
const KERNEL_GS_BASE: u32 = 0xc000_0102;

impl Machine {
    /// Saves the machine, which goes on afterwards as if nothing had happened. `file` gets
    /// the memory; pages of zeroes are holes in it.
    ///
    /// The streams have to be silent: what one end has sent and the other not taken is in
    /// neither of them.
    ///
    /// # Errors
    ///
    /// [`Error::Unsaved`] if something is under way that no snapshot could hold or if the
    /// machine has ended, KVM's, and the operating system's about the file. The machine goes
    /// on then as well.
    pub fn save(&mut self, file: &File) -> Result<Snapshot> {
        let running = self.processors.pause();
        let functions = self.board.pci.all();
        for (_, function) in &functions {
            lock(function).pause();
        }
        let saved = self.take_state(file);
        if running {
            for (_, function) in &functions {
                lock(function).resume();
            }
            if !self.board.has_ended() {
                processor::stood_still(self.processors.standing());
            }
            self.processors.resume(&self.board)?;
        }
        saved
    }

    /// Writes the memory as an ELF core file. A guest that runs stands still meanwhile; one
    /// that has come to its end is as it was then.
    ///
    /// # Errors
    ///
    /// KVM's, and the operating system's about the file.
    pub fn dump(&mut self, vmcoreinfo: Option<(u64, u64)>, file: &File) -> Result<()> {
        let running = self.processors.pause();
        let taken: Result<Vec<_>> = self.processors.standing().iter().map(registers).collect();
        let written =
            taken.and_then(|taken| core_file::write(&self.memory.ram, &taken, vmcoreinfo, file));
        if running {
            if !self.board.has_ended() {
                processor::stood_still(self.processors.standing());
            }
            self.processors.resume(&self.board)?;
        }
        tracing::debug!(written = written.as_ref().ok(), "the memory was dumped");
        written.map(drop)
    }

    fn take_state(&self, file: &File) -> Result<Snapshot> {
        if self.board.has_ended() {
            return Err(Error::Unsaved("it has ended".into()));
        }
        let vcpus = self.processors.standing();
        if vcpus.len() != self.identifications.len() {
            return Err(Error::Unsaved("a processor's thread has died".into()));
        }
        let mut functions = Vec::new();
        for (address, function) in self.board.pci.all() {
            let state = lock(&function)
                .save()
                .map_err(|why| Error::Unsaved(format!("device {address}: {why}")))?;
            functions.push((address, state));
        }
        let state = State {
            memory_mib: self.memory_mib,
            processors: processor::save(vcpus, &self.identifications, &self.savable)?,
            platform: platform::save(&self.vm)?,
            uart: self.board.uart.save(),
            address_port: self.board.pci.address_port(),
            functions,
        };
        let written = memory::write(&self.memory, file)?;
        tracing::debug!(written, "the machine was saved");
        Ok(Snapshot(state))
    }

    /// Builds a machine that goes on where a saved one was, once it is started.
    ///
    /// The parts have to be the same but for kernel, initramfs and command line, which are
    /// not looked at, and the streams, whose other ends are new. `file` is only read: what
    /// the guest writes stays in this process.
    ///
    /// # Errors
    ///
    /// [`Error::Snapshot`] if the snapshot is of another machine or makes no sense, parts that
    /// make no sense, and KVM's.
    pub fn restore(parts: Parts, snapshot: Snapshot, file: File) -> Result<Self> {
        let State { memory_mib, processors, platform, uart, address_port, functions } = snapshot.0;
        if memory_mib != parts.memory_mib {
            return Err(Error::Snapshot(format!(
                "{memory_mib} MiB of memory, expected {}",
                parts.memory_mib
            )));
        }
        let parts = Parts { backing: Backing::Private(Arc::new(file)), ..parts };
        let machine = Self::assemble(parts, false)?;
        processor::check(&processors, &machine.identifications)?;

        let pci = &machine.board.pci;
        let own = pci.all();
        let places: Vec<_> = functions.iter().map(|(address, _)| *address).collect();
        if places != own.iter().map(|(address, _)| *address).collect::<Vec<_>>() {
            return Err(Error::Snapshot(format!(
                "{} devices, expected {} others",
                places.len(),
                own.len()
            )));
        }
        for ((address, state), (_, function)) in functions.into_iter().zip(&own) {
            lock(function)
                .restore(state)
                .map_err(|why| Error::Snapshot(format!("device {address}: {why}")))?;
        }
        pci.set_address_port(address_port);

        let vcpus = machine.processors.standing();
        processor::restore(vcpus, &processors, &machine.savable)?;
        platform::restore(&machine.vm, &platform)?;
        processor::restore_time(vcpus, &processors)?;
        platform::restore_clock(&machine.vm, &platform)?;
        processor::stood_still(vcpus);
        // May raise an interrupt, which the controllers now take.
        machine.board.uart.restore(&uart)?;
        Ok(machine)
    }
}

/// What a core file tells of a processor.
fn registers(vcpu: &VcpuFd) -> Result<ProcessorRegisters> {
    let mut gs_base =
        Msrs::from_entries(&[kvm_msr_entry { index: KERNEL_GS_BASE, ..Default::default() }])
            .map_err(|_| Error::Config("a list of one register".into()))?;
    vcpu.get_msrs(&mut gs_base).map_err(Error::kvm("reading a processor's registers"))?;
    Ok(ProcessorRegisters {
        general: vcpu.get_regs().map_err(Error::kvm("reading a processor's registers"))?,
        special: vcpu.get_sregs().map_err(Error::kvm("reading a processor's registers"))?,
        kernel_gs_base: gs_base.as_slice().first().map_or(0, |entry| entry.data),
    })
}
