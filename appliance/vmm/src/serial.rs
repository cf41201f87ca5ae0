// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The serial console: what the kernel prints, mostly its last words.

use crate::layout::SERIAL;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use vm_superio::serial::NoEvents;
use vm_superio::serial::SerialState;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Raises the console's interrupt.
#[derive(Debug)]
struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// A 16550 whose output goes to a file.
#[derive(Debug)]
pub(crate) struct Uart {
    serial: Mutex<Serial<Interrupt, NoEvents, Output>>,
    interrupt: Arc<EventFd>,
    output: Arc<File>,
}

/// Its registers, for a snapshot. Nothing is ever received.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UartState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

/// Output that never fails: a console that cannot be written is no reason to stop a guest.
#[derive(Debug)]
struct Output(Arc<File>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = (&*self.0).write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Uart {
    pub(crate) fn new(interrupt: Arc<EventFd>, output: File) -> Self {
        let output = Arc::new(output);
        let serial = Serial::new(Interrupt(Arc::clone(&interrupt)), Output(Arc::clone(&output)));
        Self { serial: Mutex::new(serial), interrupt, output }
    }

    pub(crate) fn save(&self) -> UartState {
        let state = self.locked().state();
        UartState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }

    /// Takes over saved registers. An interrupt that they announce is raised again: the one
    /// before may have been on its way while the machine was saved.
    pub(crate) fn restore(&self, saved: &UartState) -> Result<()> {
        let state = SerialState {
            baud_divisor_low: saved.baud_divisor_low,
            baud_divisor_high: saved.baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: Vec::new(),
        };
        let interrupt = Interrupt(Arc::clone(&self.interrupt));
        let output = Output(Arc::clone(&self.output));
        *self.locked() = Serial::from_state(&state, interrupt, NoEvents, output)
            .map_err(|error| Error::Snapshot(format!("the serial console: {error}")))?;
        Ok(())
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Serial<Interrupt, NoEvents, Output>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The register behind a port, if it is one of ours.
    pub(crate) fn register(port: u16) -> Option<u8> {
        port.checked_sub(SERIAL).filter(|register| *register < 8)?.try_into().ok()
    }

    pub(crate) fn read(&self, register: u8) -> u8 {
        self.locked().read(register)
    }

    pub(crate) fn write(&self, register: u8, value: u8) {
        if let Err(error) = self.locked().write(register, value) {
            tracing::debug!(?error, "the serial console");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_outlive_a_snapshot() {
        let uart = |event: &Arc<EventFd>| {
            Uart::new(Arc::clone(event), File::options().write(true).open("/dev/null").unwrap())
        };
        let (near, far) =
            (crate::virtio::worker::event().unwrap(), crate::virtio::worker::event().unwrap());
        let old = uart(&near);
        // Interrupts for an empty transmitter, a scratch value, 8n1, and a baud rate.
        for (register, value) in [(1, 2), (7, 0x5a), (3, 0x83), (0, 1), (1, 0), (3, 3)] {
            old.write(register, value);
        }
        old.write(0, b'x');
        let saved = old.save();
        let new = uart(&far);
        new.restore(&saved).unwrap();
        assert_eq!(new.save(), saved);
        assert_eq!(far.read().unwrap(), 1);
        for register in 1..8 {
            assert_eq!(new.read(register), old.read(register), "{register}");
        }
        assert_eq!(new.read(7), 0x5a);
    }
}
