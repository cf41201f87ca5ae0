// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The PCI buses: who is where, and how the guest reaches it.

pub(crate) mod config;
pub(crate) mod msix;
pub(crate) mod pin;

use crate::layout::{BAR_SIZE, BAR_WINDOW, BAR_WINDOW_SIZE, BUSES, ECAM_BUS};
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

/// Slots of a bus, and those of the first bus without the host bridge's.
const SLOTS: usize = 32;
const FIRST_BUS_SLOTS: usize = SLOTS - 1;
const FUNCTIONS: usize = 8;
/// How many devices there can be.
pub(crate) const MOST_DEVICES: usize = (FIRST_BUS_SLOTS + SLOTS) * FUNCTIONS;

impl Address {
    /// The place of device number `index`: first a slot for each, then further functions.
    pub(crate) fn of(index: usize) -> Option<Self> {
        let first = FIRST_BUS_SLOTS * FUNCTIONS;
        let (bus, slot, function) = if index < first {
            (0, 1 + index % FIRST_BUS_SLOTS, index / FIRST_BUS_SLOTS)
        } else {
            let rest = index - first;
            (1, rest % SLOTS, rest / SLOTS)
        };
        (index < MOST_DEVICES).then_some(())?;
        Some(Self { bus, devfn: u8::try_from(slot << 3 | function).ok()? })
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

    /// From the address port of configuration mechanism 1.
    fn from_port(address: u32) -> Option<(Self, usize)> {
        if address >> 31 == 0 {
            return None;
        }
        let [register, devfn, bus, _] = address.to_le_bytes();
        (bus < BUSES).then_some((Self { bus, devfn }, usize::from(register & 0xfc)))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.devfn >> 3, self.devfn & 7)
    }
}

/// Intel's 82441: a host bridge that no driver wants.
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

    fn read_config(&self, place: Option<(Address, usize)>, data: &mut [u8]) {
        // What is not there reads as ones.
        data.fill(0xff);
        let Some((address, register)) = place else { return };
        if (address.bus, address.devfn) == (0, 0) {
            for (index, byte) in data.iter_mut().enumerate() {
                let at = register.saturating_add(index);
                *byte = HOST_BRIDGE.get(at).copied().unwrap_or(0);
            }
        } else if let Some(function) = self.get(address) {
            lock(&function).read_config(register, data);
        }
    }

    fn write_config(&self, place: Option<(Address, usize)>, data: &[u8]) {
        let Some((address, register)) = place else { return };
        if let Some(function) = self.get(address) {
            lock(&function).write_config(register, data);
        }
    }

    /// The guest reads the memory-mapped configuration space.
    pub(crate) fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        self.read_config(Address::from_ecam(offset), data);
    }

    /// The guest writes to it.
    pub(crate) fn write_ecam(&self, offset: u64, data: &[u8]) {
        self.write_config(Address::from_ecam(offset), data);
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
        let place = self.port_place(within);
        self.read_config(place, data);
    }

    /// The guest writes to the data port.
    pub(crate) fn write_data(&self, within: u16, data: &[u8]) {
        let place = self.port_place(within);
        self.write_config(place, data);
    }

    fn port_place(&self, within: u16) -> Option<(Address, usize)> {
        let (address, register) = Address::from_port(*self.port())?;
        Some((address, register.saturating_add(usize::from(within))))
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
        assert!(places.iter().all(|(bus, devfn, bar)| (*bus, *devfn) != (0, 0) && *bar != 0));
        assert_eq!(Address::of(MOST_DEVICES), None);
        for place in (0..MOST_DEVICES).filter_map(Address::of) {
            assert_eq!(Address::from_bar(u64::from(place.bar()) + BAR_SIZE - 1), Some(place));
        }
        assert_eq!(Address::from_bar(BAR_WINDOW - 1), None);
        assert_eq!(Address::from_bar(BAR_WINDOW + BAR_WINDOW_SIZE * 2), None);
        assert_eq!(Address::of(0).unwrap().to_string(), "00:01.0");
        assert_eq!(Address::of(32).unwrap().to_string(), "00:02.1");
    }

    #[test]
    fn nobody_answers_with_ones() {
        let pci = Pci::default();
        let mut data = [0; 4];
        pci.read_ecam(1 << 15, &mut data);
        assert_eq!(data, [0xff; 4]);
        pci.write_address(&0x8000_0000_u32.to_le_bytes());
        pci.read_data(0, &mut data);
        assert_eq!(data, [0x86, 0x80, 0x37, 0x12]);
        pci.read_ecam(u64::MAX, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(!pci.read_bar(BAR_WINDOW, &mut data));
    }
}
