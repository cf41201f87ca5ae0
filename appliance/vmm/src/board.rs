// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the processors are plugged into: ports, memory-mapped devices, and the machine's end.

use crate::layout::{
    BAR_WINDOW, BAR_WINDOW_SIZE, BUSES, ECAM, ECAM_BUS, PCI_ADDRESS, PCI_DATA, RESET,
    SLEEP_CONTROL, SLEEP_ENABLE, SLEEP_STATUS,
};
use crate::pci::Pci;
use crate::serial::Uart;
use std::fmt;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest wrote to the reset register.
    Reset,
    /// The guest switched itself off.
    PoweredOff,
    /// The guest forced a reset by a triple fault: what `reboot=t` does, and what is left of
    /// a kernel without an exception handler.
    TripleFault,
    /// Somebody outside ended it.
    Stopped,
    /// KVM could not go on.
    Failed(String),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::PoweredOff => f.write_str("the guest switched itself off"),
            Self::TripleFault => f.write_str("the guest reset itself by a triple fault"),
            Self::Stopped => f.write_str("it was ended from outside"),
            Self::Failed(why) => write!(f, "KVM could not go on: {why}"),
        }
    }
}

/// How often the guest left the processor for us.
#[derive(Debug, Default)]
pub(crate) struct Exits {
    serial: AtomicU64,
    pci_ports: AtomicU64,
    other_ports: AtomicU64,
    ecam: AtomicU64,
    bar: AtomicU64,
    nowhere: AtomicU64,
    pub(crate) other: AtomicU64,
}

impl Exits {
    pub(crate) fn all(&self) -> Vec<(&'static str, u64)> {
        [
            ("serial console", &self.serial),
            ("PCI ports", &self.pci_ports),
            ("other ports", &self.other_ports),
            ("PCI configuration space", &self.ecam),
            ("device registers", &self.bar),
            ("addresses where nothing is", &self.nowhere),
            ("other", &self.other),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
        .to_vec()
    }
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// All that the processors share.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) pci: Pci,
    pub(crate) exits: Exits,
    pub(crate) uart: Uart,
    ending: Mutex<Option<Ending>>,
    ended: Condvar,
    /// Becomes readable at the end, too.
    end_event: Arc<EventFd>,
}

impl Board {
    pub(crate) fn new(serial: Arc<EventFd>, console: File, end_event: Arc<EventFd>) -> Self {
        Self {
            end_event,
            pci: Pci::default(),
            exits: Exits::default(),
            uart: Uart::new(serial, console),
            ending: Mutex::new(None),
            ended: Condvar::new(),
        }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Option<Ending>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine has ended; the first reason counts.
    pub(crate) fn end(&self, how: Ending) {
        let mut ending = self.locked();
        if ending.is_none() {
            tracing::debug!(%how, "the machine has ended");
            *ending = Some(how);
            // It is never read, so it cannot be full.
            let _ = self.end_event.write(1);
        }
        self.ended.notify_all();
    }

    /// Becomes readable when the machine has ended.
    pub(crate) fn end_event(&self) -> &EventFd {
        &self.end_event
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.locked().is_some()
    }

    /// Waits for the end, at most `limit`.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> Option<Ending> {
        let begun = Instant::now();
        let mut ending = self.locked();
        while ending.is_none() {
            let left = match limit {
                None => Duration::from_hours(1),
                Some(limit) => limit.checked_sub(begun.elapsed())?,
            };
            ending =
                self.ended.wait_timeout(ending, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        ending.clone()
    }

    /// The guest reads a port.
    pub(crate) fn read_port(&self, port: u16, data: &mut [u8]) {
        if let Some(register) = Uart::register(port) {
            count(&self.exits.serial);
            data.fill(self.uart.read(register));
        } else if port == PCI_ADDRESS {
            count(&self.exits.pci_ports);
            self.pci.read_address(data);
        } else if let Some(within) = port.checked_sub(PCI_DATA).filter(|within| *within < 4) {
            count(&self.exits.pci_ports);
            self.pci.read_data(within, data);
        } else {
            count(&self.exits.other_ports);
            // No sleep state was entered; nothing else answers.
            data.fill(if port == SLEEP_STATUS { 0 } else { 0xff });
        }
    }

    /// The guest writes to a port.
    pub(crate) fn write_port(&self, port: u16, data: &[u8]) {
        let Some(first) = data.first() else { return };
        if let Some(register) = Uart::register(port) {
            count(&self.exits.serial);
            for byte in data {
                self.uart.write(register, *byte);
            }
        } else if port == PCI_ADDRESS {
            count(&self.exits.pci_ports);
            self.pci.write_address(data);
        } else if port.checked_sub(PCI_DATA).is_some_and(|within| within < 4) {
            // The one function there has nothing to write to.
            count(&self.exits.pci_ports);
        } else {
            count(&self.exits.other_ports);
            match port {
                RESET => self.end(Ending::Reset),
                SLEEP_CONTROL if first & SLEEP_ENABLE != 0 => self.end(Ending::PoweredOff),
                _ => {}
            }
        }
    }

    /// The guest reads memory where there is none.
    pub(crate) fn read_memory(&self, at: u64, data: &mut [u8]) {
        if let Some(offset) = offset(at, ECAM, ECAM_BUS * u64::from(BUSES)) {
            count(&self.exits.ecam);
            self.pci.read_ecam(offset, data);
        } else if in_window(at) && self.pci.read_bar(at, data) {
            count(&self.exits.bar);
        } else {
            count(&self.exits.nowhere);
            data.fill(0xff);
        }
    }

    /// The guest writes to memory where there is none.
    pub(crate) fn write_memory(&self, at: u64, data: &[u8]) {
        if let Some(offset) = offset(at, ECAM, ECAM_BUS * u64::from(BUSES)) {
            count(&self.exits.ecam);
            self.pci.write_ecam(offset, data);
        } else if in_window(at) && self.pci.write_bar(at, data) {
            count(&self.exits.bar);
        } else {
            count(&self.exits.nowhere);
        }
    }
}

fn offset(at: u64, start: u64, size: u64) -> Option<u64> {
    at.checked_sub(start).filter(|offset| *offset < size)
}

fn in_window(at: u64) -> bool {
    offset(at, BAR_WINDOW, BAR_WINDOW_SIZE * u64::from(BUSES)).is_some()
}
