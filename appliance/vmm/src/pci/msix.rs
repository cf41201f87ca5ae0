// SPDX-License-Identifier: Apache-2.0 OR MIT
//! MSI-X: a table of messages, a mask for each, and what is pending (PCI Local Bus 3.0,
//! section 6.8.2).

use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

/// Takes an interrupt message to the guest's interrupt controllers.
pub(crate) trait MessageSink: Debug + Send + Sync {
    fn send(&self, address: u64, data: u32);
}

/// Bytes of one entry of the table.
pub(crate) const ENTRY: u64 = 16;

/// Message control: the function's interrupts are on.
const ENABLE: u16 = 1 << 15;
/// Message control: every vector is masked.
const FUNCTION_MASK: u16 = 1 << 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

/// All of a function's interrupts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MsixState {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
}

/// The interrupts of one function.
#[derive(Debug)]
pub(crate) struct Msix {
    state: Mutex<MsixState>,
    sink: Arc<dyn MessageSink>,
}

impl Msix {
    pub(crate) fn new(vectors: u16, sink: Arc<dyn MessageSink>) -> Self {
        let entry = Entry { address: 0, data: 0, masked: true, pending: false };
        let entries = vec![entry; usize::from(vectors)];
        Self { state: Mutex::new(MsixState { entries, enabled: false, masked: false }), sink }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, MsixState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn vectors(&self) -> u16 {
        u16::try_from(self.locked().entries.len()).unwrap_or(u16::MAX)
    }

    /// Takes the new value of the capability's message control.
    pub(crate) fn control(&self, value: u16) {
        let mut state = self.locked();
        state.enabled = value & ENABLE != 0;
        state.masked = value & FUNCTION_MASK != 0;
        self.deliver(&mut state);
    }

    pub(crate) fn save(&self) -> MsixState {
        self.locked().clone()
    }

    /// Whether a saved state has as many vectors, and what message control says.
    pub(crate) fn fits(&self, saved: &MsixState, control: u16) -> bool {
        saved.entries.len() == self.locked().entries.len()
            && saved.enabled == (control & ENABLE != 0)
            && saved.masked == (control & FUNCTION_MASK != 0)
    }

    /// Takes over a saved state that fits. What is pending stays so: it was held back.
    pub(crate) fn restore(&self, saved: MsixState) {
        *self.locked() = saved;
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.locked().enabled
    }

    /// Raises `vector`, now or as soon as it is unmasked. One that does not exist (0xffff
    /// stands for none) raises nothing. `false` if the function has to use its pin instead.
    pub(crate) fn raise(&self, vector: u16) -> bool {
        let mut state = self.locked();
        if !state.enabled {
            return false;
        }
        let open = !state.masked;
        let Some(entry) = state.entries.get_mut(usize::from(vector)) else { return true };
        if open && !entry.masked {
            let (address, data) = (entry.address, entry.data);
            drop(state);
            self.sink.send(address, data);
        } else {
            entry.pending = true;
        }
        true
    }

    /// Sends what was held back and is not masked any more.
    fn deliver(&self, state: &mut MsixState) {
        if !state.enabled || state.masked {
            return;
        }
        for entry in state.entries.iter_mut().filter(|entry| entry.pending && !entry.masked) {
            entry.pending = false;
            self.sink.send(entry.address, entry.data);
        }
    }

    /// Reads from the table; what lies outside of it is zero.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.locked();
        for (index, byte) in (0_u64..).zip(data) {
            let at = offset.saturating_add(index);
            let Some(entry) = entry_of(at).and_then(|index| state.entries.get(index)) else {
                continue;
            };
            *byte = bytes_of(entry).get(within(at)).copied().unwrap_or(0);
        }
    }

    /// Writes to the table.
    pub(crate) fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.locked();
        for (index, byte) in (0_u64..).zip(data) {
            let at = offset.saturating_add(index);
            let Some(entry) = entry_of(at).and_then(|index| state.entries.get_mut(index)) else {
                continue;
            };
            let mut bytes = bytes_of(entry);
            if let Some(place) = bytes.get_mut(within(at)) {
                *place = *byte;
            }
            let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, control, ..] = bytes;
            entry.address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
            entry.data = u32::from_le_bytes([d0, d1, d2, d3]);
            entry.masked = control & 1 != 0;
        }
        self.deliver(&mut state);
    }

    /// Reads the bits of what is pending.
    pub(crate) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.locked();
        for (index, byte) in (0_u64..).zip(data) {
            let at = offset.saturating_add(index);
            let first = usize::try_from(at).ok().and_then(|at| at.checked_mul(8));
            *byte = (0..8)
                .filter(|bit| {
                    first
                        .and_then(|first| first.checked_add(*bit))
                        .and_then(|index| state.entries.get(index))
                        .is_some_and(|entry| entry.pending)
                })
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }
}

fn entry_of(offset: u64) -> Option<usize> {
    usize::try_from(offset / ENTRY).ok()
}

fn within(offset: u64) -> usize {
    usize::try_from(offset % ENTRY).unwrap_or(usize::MAX)
}

fn bytes_of(entry: &Entry) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
    bytes[12] = u8::from(entry.masked);
    bytes
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Remembers what was sent.
    #[derive(Debug, Default)]
    pub(crate) struct Sent(pub(crate) Mutex<Vec<(u64, u32)>>);

    impl MessageSink for Sent {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    #[test]
    fn masked_vectors_wait() {
        let sent = Arc::new(Sent::default());
        let msix = Msix::new(2, Arc::clone(&sent) as Arc<dyn MessageSink>);
        msix.write_table(16, &0xfee0_1000_u64.to_le_bytes());
        msix.write_table(24, &[0x41, 0, 0, 0]);
        assert!(!msix.raise(1));
        msix.control(ENABLE);
        assert!(msix.raise(1));
        assert!(sent.0.lock().unwrap().is_empty());
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(28, &[0; 4]);
        assert_eq!(*sent.0.lock().unwrap(), [(0xfee0_1000, 0x41)]);
        msix.raise(1);
        msix.control(ENABLE | FUNCTION_MASK);
        msix.raise(1);
        assert_eq!(sent.0.lock().unwrap().len(), 2);
        msix.control(ENABLE);
        assert_eq!(sent.0.lock().unwrap().len(), 3);
    }

    #[test]
    fn what_is_pending_outlives_a_snapshot() {
        let msix = Msix::new(2, Arc::new(Sent::default()));
        msix.write_table(16, &[0, 0x10, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0, 0, 0, 1, 0, 0, 0]);
        msix.control(ENABLE);
        msix.raise(1);
        let saved = msix.save();
        let sent = Arc::new(Sent::default());
        let other = Msix::new(2, Arc::clone(&sent) as Arc<dyn MessageSink>);
        assert!(other.fits(&saved, ENABLE));
        assert!(!other.fits(&saved, 0));
        assert!(!Msix::new(3, Arc::new(Sent::default())).fits(&saved, ENABLE));
        other.restore(saved.clone());
        assert_eq!(other.save(), saved);
        assert!(sent.0.lock().unwrap().is_empty());
        other.write_table(28, &[0; 4]);
        assert_eq!(*sent.0.lock().unwrap(), [(0xfee0_1000, 0x41)]);
    }

    #[test]
    fn what_is_outside_reads_as_zero_and_takes_nothing() {
        let msix = Msix::new(1, Arc::new(Sent::default()));
        msix.write_table(u64::MAX - 3, &[0xff; 4]);
        msix.raise(u16::MAX);
        let mut data = [0xaa; 8];
        msix.read_table(u64::MAX - 7, &mut data);
        assert_eq!(data, [0; 8]);
        msix.read_pending(u64::MAX - 7, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
