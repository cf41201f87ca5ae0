// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The PCI buses: who is where, and how the guest reaches it.

pub(crate) mod config;
pub(crate) mod msix;
pub(crate) mod pin;

use crate::layout::{BAR_SIZE, BAR_WINDOW, BAR_WINDOW_SIZE, BUSES, ECAM_BUS, PCI_SEGMENT};
use crate::virtio::transport::Function;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Bus, slot and function of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Address {
    pub(crate) bus: u8,
    /// Slot in the upper five bits, function in the lower three.
    pub(crate) devfn: u8,
}

/// Functions of a bus: 32 slots with 8 each.
const FUNCTIONS: usize = 256;
/// How many devices there can be.
pub(crate) const MOST_DEVICES: usize = FUNCTIONS * BUSES as usize;

impl Address {
    /// The place of device number `index`: all functions of a slot, then the next slot. A kernel
    /// that finds a device in a slot looks for further functions there, each time.
    pub(crate) fn of(index: usize) -> Option<Self> {
        let bus = u8::try_from(index / FUNCTIONS).ok().filter(|bus| *bus < BUSES)?;
        Some(Self { bus, devfn: u8::try_from(index % FUNCTIONS).ok()? })
    }

    /// Where the function's BAR is before anybody moves it.
    pub(crate) fn bar(self) -> u32 {
        let at =
            BAR_WINDOW + u64::from(self.bus) * BAR_WINDOW_SIZE + u64::from(self.devfn) * BAR_SIZE;
        u32::try_from(at).unwrap_or(0)
    }

    /// The function whose BAR contains `at` before anybody moves it.
    fn from_bar(at: u64) -> Option<Self> {
        let index = at.checked_sub(BAR_WINDOW)? / BAR_SIZE;
        let bus = u8::try_from(index >> 8).ok().filter(|bus| *bus < BUSES)?;
        Some(Self { bus, devfn: u8::try_from(index & 0xff).ok()? })
    }

    /// From an offset into the memory-mapped configuration space: the function and the
    /// register.
    fn from_ecam(offset: u64) -> Option<(Self, usize)> {
        let bus = u8::try_from(offset / ECAM_BUS).ok().filter(|bus| *bus < BUSES)?;
        let devfn = u8::try_from(offset >> 12 & 0xff).ok()?;
        Some((Self { bus, devfn }, usize::try_from(offset & 0xfff).ok()?))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (slot, function) = (self.devfn >> 3, self.devfn & 7);
        write!(f, "{PCI_SEGMENT:04x}:{:02x}:{slot:02x}.{function}", self.bus)
    }
}

/// Intel's 82441, a host bridge that no driver wants: all that configuration mechanism 1 leads to.
///
/// The ports reach segment 0 alone, and the devices are in segment 1, where a register takes one
/// exit and not two. Without ports that work a kernel finds no configuration space at first, and
/// says so on the console.
const HOST_BRIDGE: [u8; 16] = [0x86, 0x80, 0x37, 0x12, 0, 0, 0, 0, 0, 0, 0, 0x06, 0, 0, 0, 0];

type Shared = Arc<Mutex<Function>>;

/// All devices.
#[derive(Debug, Default)]
pub(crate) struct Pci {
    functions: RwLock<BTreeMap<Address, Shared>>,
    /// What the guest wrote to the address port last.
    port: Mutex<u32>,
}

impl Pci {
    /// Puts a device in its place; `false` if there is one already.
    pub(crate) fn add(&self, address: Address, function: Function) -> bool {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        if functions.contains_key(&address) {
            return false;
        }
        functions.insert(address, Arc::new(Mutex::new(function)));
        true
    }

    /// The first place where nobody is.
    pub(crate) fn free(&self) -> Option<Address> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        (0..MOST_DEVICES).filter_map(Address::of).find(|address| !functions.contains_key(address))
    }

    /// Takes the device out of its place; to the guest it is as if it had never been there.
    pub(crate) fn remove(&self, address: Address) -> Option<Shared> {
        self.functions.write().unwrap_or_else(PoisonError::into_inner).remove(&address)
    }

    /// Every device in the order of the buses.
    pub(crate) fn all(&self) -> Vec<(Address, Shared)> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().map(|(address, function)| (*address, Arc::clone(function))).collect()
    }

    pub(crate) fn get(&self, address: Address) -> Option<Shared> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.get(&address).cloned()
    }

    /// The guest reads the memory-mapped configuration space.
    pub(crate) fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        // What is not there reads as ones.
        data.fill(0xff);
        let Some((address, register)) = Address::from_ecam(offset) else { return };
        if let Some(function) = self.get(address) {
            lock(&function).read_config(register, data);
        }
    }

    /// The guest writes to it.
    pub(crate) fn write_ecam(&self, offset: u64, data: &[u8]) {
        let Some((address, register)) = Address::from_ecam(offset) else { return };
        if let Some(function) = self.get(address) {
            lock(&function).write_config(register, data);
        }
    }

    /// For a snapshot: what the address port holds.
    pub(crate) fn address_port(&self) -> u32 {
        *self.port()
    }

    /// From a snapshot.
    pub(crate) fn set_address_port(&self, value: u32) {
        *self.port() = value;
    }

    fn port(&self) -> std::sync::MutexGuard<'_, u32> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads the address port.
    pub(crate) fn read_address(&self, data: &mut [u8]) {
        data.fill(0xff);
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.port().to_le_bytes();
        }
    }

    /// The guest writes to the address port.
    pub(crate) fn write_address(&self, data: &[u8]) {
        if let Ok(data) = <[u8; 4]>::try_from(data) {
            *self.port() = u32::from_le_bytes(data);
        }
    }

    /// The guest reads the data port, `within` bytes into it.
    pub(crate) fn read_data(&self, within: u16, data: &mut [u8]) {
        data.fill(0xff);
        let address = *self.port();
        // Enabled, bus 0, slot 0, function 0.
        if address & 0x80ff_ff00 == 0x8000_0000 {
            let register = usize::from(address.to_le_bytes()[0] & 0xfc);
            for (byte, at) in data.iter_mut().zip(register.saturating_add(within.into())..) {
                *byte = HOST_BRIDGE.get(at).copied().unwrap_or(0);
            }
        }
    }

    /// The device that answers at `at`, and the offset into its BAR.
    fn find(&self, at: u64) -> Option<(Shared, u64)> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        let answers = |function: &Shared| {
            let bar = lock(function).bar()?;
            let offset = at.checked_sub(bar).filter(|offset| *offset < BAR_SIZE)?;
            Some((Arc::clone(function), offset))
        };
        // Hardly any guest moves a BAR.
        Address::from_bar(at)
            .and_then(|address| functions.get(&address))
            .and_then(answers)
            .or_else(|| functions.values().find_map(answers))
    }

    /// The guest reads from a BAR's window; `false` if nobody answers there.
    pub(crate) fn read_bar(&self, at: u64, data: &mut [u8]) -> bool {
        let found = self.find(at);
        if let Some((function, offset)) = &found {
            lock(function).read_bar(*offset, data);
        }
        found.is_some()
    }

    /// The guest writes to a BAR's window; `false` if nobody answers there.
    pub(crate) fn write_bar(&self, at: u64, data: &[u8]) -> bool {
        let found = self.find(at);
        if let Some((function, offset)) = &found {
            lock(function).write_bar(*offset, data);
        }
        found.is_some()
    }
}

/// A device is a state machine that stays consistent whatever panics beside it.
pub(crate) fn lock(function: &Shared) -> std::sync::MutexGuard<'_, Function> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_device_has_its_place_and_its_window() {
        let places: HashSet<_> = (0..MOST_DEVICES)
            .map(|index| Address::of(index).unwrap())
            .map(|place| (place.bus, place.devfn, place.bar()))
            .collect();
        assert_eq!(places.len(), MOST_DEVICES);
        assert!(places.iter().all(|(_, _, bar)| *bar != 0));
        assert_eq!(Address::of(MOST_DEVICES), None);
        for place in (0..MOST_DEVICES).filter_map(Address::of) {
            assert_eq!(Address::from_bar(u64::from(place.bar()) + BAR_SIZE - 1), Some(place));
        }
        assert_eq!(Address::from_bar(BAR_WINDOW - 1), None);
        assert_eq!(Address::from_bar(BAR_WINDOW + BAR_WINDOW_SIZE * 2), None);
        assert_eq!(Address::of(0).unwrap().to_string(), "0001:00:00.0");
        assert_eq!(Address::of(9).unwrap().to_string(), "0001:00:01.1");
        assert_eq!(Address::of(256).unwrap().to_string(), "0001:01:00.0");
    }

    #[test]
    fn nobody_answers_with_ones() {
        let pci = Pci::default();
        let mut data = [0; 4];
        pci.read_ecam(1 << 15, &mut data);
        assert_eq!(data, [0xff; 4]);
        // The ports lead to a host bridge and to nothing else.
        for (address, within, expected) in [
            (0x8000_0000_u32, 0, [0x86, 0x80, 0x37, 0x12]),
            (0x8000_0008, 2, [0, 6, 0, 0]),
            (0x8000_00fc, 3, [0; 4]),
            (0x0000_0000, 0, [0xff; 4]),
            (0x8000_0100, 0, [0xff; 4]),
            (0x8000_0800, 0, [0xff; 4]),
            (0x8001_0000, 0, [0xff; 4]),
        ] {
            pci.write_address(&address.to_le_bytes());
            pci.read_data(within, &mut data);
            assert_eq!(data, expected, "{address:#x}");
        }
        pci.read_ecam(u64::MAX, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(!pci.read_bar(BAR_WINDOW, &mut data));
    }
}
