// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The serial console: what the kernel prints, mostly its last words.

use crate::layout::SERIAL;
use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use vm_superio::serial::NoEvents;
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
pub(crate) struct Uart(Mutex<Serial<Interrupt, NoEvents, Output>>);

/// Output that never fails: a console that cannot be written is no reason to stop a guest.
#[derive(Debug)]
struct Output(File);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Uart {
    pub(crate) fn new(interrupt: Arc<EventFd>, output: File) -> Self {
        Self(Mutex::new(Serial::new(Interrupt(interrupt), Output(output))))
    }

    /// The register behind a port, if it is one of ours.
    pub(crate) fn register(port: u16) -> Option<u8> {
        port.checked_sub(SERIAL).filter(|register| *register < 8)?.try_into().ok()
    }

    pub(crate) fn read(&self, register: u8) -> u8 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(register)
    }

    pub(crate) fn write(&self, register: u8, value: u8) {
        let mut serial = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = serial.write(register, value) {
            tracing::debug!(?error, "the serial console");
        }
    }
}
