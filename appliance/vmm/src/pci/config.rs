// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The 256 bytes of a function's configuration space (PCI Local Bus 3.0, chapter 6).

/// Command register: the function answers in its memory window.
pub(crate) const MEMORY_SPACE: u16 = 1 << 1;

/// Command register: the function must not assert its interrupt pin.
pub(crate) const INTERRUPT_DISABLE: u16 = 1 << 10;
/// The lower byte of the status register, and its bit for a pin that would be asserted.
pub(crate) const STATUS: usize = 0x06;
pub(crate) const STATUS_INTERRUPT: u8 = 1 << 3;

const COMMAND: usize = 0x04;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_PIN: usize = 0x3d;
/// INTA#.
const PIN_A: u8 = 1;
const FIRST_CAPABILITY: usize = 0x40;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) revision: u8,
    /// Class, subclass and programming interface.
    pub(crate) class: [u8; 3],
    pub(crate) subsystem: u16,
    /// Whether the slot has further functions.
    pub(crate) multifunction: bool,
}

/// Registers with a mask of the bits that can be written.
#[derive(Clone, Debug)]
pub(crate) struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    /// Where the next capability goes, and where it is linked from.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    pub(crate) fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; 256],
            writable: [0; 256],
            next: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        let [class, subclass, interface] = identity.class;
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision, interface, subclass, class]);
        space.put(0x0e, &[if identity.multifunction { 0x80 } else { 0 }]);
        space.put(0x2c, &identity.vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.put(INTERRUPT_PIN, &[PIN_A]);
        // Memory space, bus master, interrupt disable; cache line size and interrupt line are
        // scratch registers.
        space.allow(COMMAND, &[0x06, 0x04]);
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at.saturating_add(bytes.len())) {
            place.copy_from_slice(bytes);
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        if let Some(place) = self.writable.get_mut(at..at.saturating_add(mask.len())) {
            place.copy_from_slice(mask);
        }
    }

    /// Gives the function one 32-bit memory BAR of `size` bytes (a power of two) at `address`.
    pub(crate) fn set_bar(&mut self, address: u32, size: u32) {
        self.put(BAR0, &address.to_le_bytes());
        // The bits below the size are fixed at zero: that is how the size is asked for.
        self.allow(BAR0, &size.wrapping_neg().to_le_bytes());
    }

    /// Where the BAR is now, if the function answers there.
    pub(crate) fn bar(&self) -> Option<u64> {
        let address = self.u32_at(BAR0);
        let on = self.command() & MEMORY_SPACE != 0;
        (on && address != 0).then_some(u64::from(address))
    }

    /// Whether the function may assert its interrupt pin.
    pub(crate) fn allows_pin(&self) -> bool {
        self.command() & INTERRUPT_DISABLE == 0
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    fn u32_at(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Appends a capability: its identifier and what follows the link. Returns where it is.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        let link = u8::try_from(at).unwrap_or(0);
        self.put(self.link, &[link]);
        self.put(at, &[id, 0]);
        self.put(at.saturating_add(2), body);
        self.allow(at.saturating_add(2), writable);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.link = at.saturating_add(1);
        self.next = at.saturating_add(body.len()).saturating_add(2).next_multiple_of(4);
        at
    }

    /// All registers, for a snapshot.
    pub(crate) fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Whether a saved state differs only where the guest can write.
    pub(crate) fn fits(&self, saved: &[u8]) -> bool {
        let fixed = |bytes: &[u8]| -> Vec<u8> {
            bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & !mask).collect()
        };
        saved.len() == self.bytes.len() && fixed(saved) == fixed(&self.bytes)
    }

    /// Takes over a saved state that fits.
    pub(crate) fn restore(&mut self, saved: &[u8]) {
        self.write(0, saved);
    }

    /// Reads registers; beyond the end they are zero.
    pub(crate) fn read(&self, at: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = at.saturating_add(index);
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes the bits of registers that can be written.
    pub(crate) fn write(&mut self, at: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            let at = at.saturating_add(index);
            if let (Some(place), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *place = (*place & !mask) | (byte & mask);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0x80, 0],
            subsystem: 0x40,
            multifunction: true,
        })
    }

    #[test]
    fn the_size_of_a_bar_can_be_asked_for() {
        let mut space = space();
        space.set_bar(0xc001_0000, 0x1_0000);
        assert_eq!(space.bar(), None);
        space.write(4, &[2, 0]);
        assert_eq!(space.bar(), Some(0xc001_0000));
        space.write(0x10, &[0xff; 4]);
        assert_eq!(space.u32_at(0x10), 0xffff_0000);
    }

    #[test]
    fn capabilities_are_linked_and_the_rest_is_read_only() {
        let mut space = space();
        let first = space.add_capability(9, &[16, 1, 0], &[]);
        let second = space.add_capability(0x11, &[1, 0], &[0, 0xc0]);
        let mut byte = [0];
        space.read(0x34, &mut byte);
        assert_eq!(usize::from(byte[0]), first);
        space.read(first + 1, &mut byte);
        assert_eq!(usize::from(byte[0]), second);
        space.write(0, &[0xff; 256]);
        let mut id = [0; 4];
        space.read(0, &mut id);
        assert_eq!(id, [0xf4, 0x1a, 0x42, 0x10]);
        space.read(second + 3, &mut byte);
        assert_eq!(byte[0], 0xc0);
    }

    #[test]
    fn only_registers_that_can_be_written_are_restored() {
        let mut old = space();
        old.set_bar(0xc001_0000, 0x1_0000);
        let mut new = old.clone();
        old.write(4, &[2, 0]);
        old.write(0x10, &[0, 0, 0x55, 0xc0]);
        let saved = old.save();
        assert!(new.fits(&saved));
        new.restore(&saved);
        assert_eq!(new.save(), saved);
        assert_eq!(new.bar(), Some(0xc055_0000));
        assert!(!new.fits(saved.get(1..).unwrap()));
        let mut other = saved;
        other[0] ^= 1;
        assert!(!new.fits(&other));
    }

    #[test]
    fn no_offset_is_too_large() {
        let mut space = space();
        space.write(usize::MAX - 1, &[1; 1]);
        space.write(254, &[1; 8]);
        let mut data = [7; 8];
        space.read(300, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
