// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupt pins: what a function asserts, and the line that it shares with others (PCI Local
//! Bus 3.0, section 2.2.6; Virtual I/O Device Version 1.2, section 4.1.5.3).
//!
//! Messages need vectors, which a guest with one processor and hundreds of disks does not have.

use super::Address;
use crate::layout::{PIN_INTERRUPT, PIN_INTERRUPTS};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An input of the guest's interrupt controllers.
pub(crate) trait LineSink: Debug + Send + Sync {
    fn set(&self, interrupt: u32, high: bool);
}

/// Bits of the ISR status register (virtio 1.2, section 4.1.4.5).
pub(crate) const QUEUE: u8 = 1;
pub(crate) const CONFIGURATION: u8 = 2;

/// The interrupt to which the pins of all functions in a slot lead.
pub(crate) fn interrupt_of(slot: u8) -> u32 {
    PIN_INTERRUPT + u32::from(slot) % PIN_INTERRUPTS
}

/// An input that is high as long as any function asserts its pin.
#[derive(Debug)]
pub(crate) struct Line {
    interrupt: u32,
    sink: Arc<dyn LineSink>,
    /// How many pins are asserted. The input changes under this lock, or two changes could
    /// arrive in the wrong order.
    asserted: Mutex<u32>,
}

impl Line {
    fn change(&self, assert: bool) {
        let mut asserted = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        let old = *asserted;
        *asserted = if assert { old.saturating_add(1) } else { old.saturating_sub(1) };
        if (old == 0) != (*asserted == 0) {
            self.sink.set(self.interrupt, assert);
        }
    }
}

/// All lines of a machine.
#[derive(Clone, Debug)]
pub(crate) struct Lines(Vec<Arc<Line>>);

impl Lines {
    pub(crate) fn new(sink: &Arc<dyn LineSink>) -> Self {
        let line = |interrupt| {
            Arc::new(Line { interrupt, sink: Arc::clone(sink), asserted: Mutex::new(0) })
        };
        Self((PIN_INTERRUPT..).take(PIN_INTERRUPTS as usize).map(line).collect())
    }

    /// A pin for the function at `address`.
    pub(crate) fn pin(&self, address: Address) -> Pin {
        let interrupt = interrupt_of(address.devfn >> 3);
        let line = self.0.iter().find(|line| line.interrupt == interrupt).cloned();
        Pin { line, state: Mutex::default() }
    }
}

#[derive(Debug, Default)]
struct State {
    isr: u8,
    /// The command register forbids it, or there are messages instead.
    closed: bool,
    asserted: bool,
}

/// A function's pin together with its ISR status, whose bits assert it.
#[derive(Debug)]
pub(crate) struct Pin {
    line: Option<Arc<Line>>,
    state: Mutex<State>,
}

impl Pin {
    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, state: &mut State) {
        let assert = state.isr != 0 && !state.closed;
        if std::mem::replace(&mut state.asserted, assert) != assert
            && let Some(line) = &self.line
        {
            line.change(assert);
        }
    }

    /// Sets bits of the ISR status.
    pub(crate) fn raise(&self, bits: u8) {
        let mut state = self.locked();
        state.isr |= bits;
        self.update(&mut state);
    }

    /// The driver reads the ISR status, which clears it.
    pub(crate) fn take(&self) -> u8 {
        let mut state = self.locked();
        let isr = std::mem::take(&mut state.isr);
        self.update(&mut state);
        isr
    }

    /// The ISR status as it is.
    pub(crate) fn isr(&self) -> u8 {
        self.locked().isr
    }

    /// From a snapshot.
    pub(crate) fn set_isr(&self, isr: u8) {
        let mut state = self.locked();
        state.isr = isr;
        self.update(&mut state);
    }

    /// Whether the function may assert its pin.
    pub(crate) fn close(&self, closed: bool) {
        let mut state = self.locked();
        state.closed = closed;
        self.update(&mut state);
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Others share the line.
        self.take();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Remembers how each line changed.
    #[derive(Debug, Default)]
    pub(crate) struct Changes(pub(crate) Mutex<Vec<(u32, bool)>>);

    impl LineSink for Changes {
        fn set(&self, interrupt: u32, high: bool) {
            self.0.lock().unwrap().push((interrupt, high));
        }
    }

    fn lines() -> (Arc<Changes>, Lines) {
        let changes = Arc::new(Changes::default());
        let lines = Lines::new(&(Arc::clone(&changes) as Arc<dyn LineSink>));
        (changes, lines)
    }

    fn address(slot: u8, function: u8) -> Address {
        Address { bus: 0, devfn: slot << 3 | function }
    }

    #[test]
    fn every_slot_has_a_line() {
        let (_, lines) = lines();
        for slot in 0..32 {
            let line = lines.pin(address(slot, 0)).line.clone().unwrap();
            assert_eq!(line.interrupt, interrupt_of(slot));
            assert!((16..24).contains(&line.interrupt), "{slot}");
        }
    }

    #[test]
    fn a_line_is_high_as_long_as_anybody_asserts_it() {
        let (changes, lines) = lines();
        let [one, two, other] =
            [address(1, 0), address(9, 3), address(2, 0)].map(|address| lines.pin(address));
        let seen = || std::mem::take(&mut *changes.0.lock().unwrap());
        one.raise(QUEUE);
        assert_eq!(seen(), [(17, true)]);
        one.raise(CONFIGURATION);
        two.raise(QUEUE);
        assert_eq!(seen(), []);
        other.raise(QUEUE);
        assert_eq!(seen(), [(18, true)]);
        assert_eq!(one.take(), QUEUE | CONFIGURATION);
        assert_eq!(one.take(), 0);
        assert_eq!(seen(), []);
        assert_eq!(two.take(), QUEUE);
        assert_eq!(seen(), [(17, false)]);
        drop(other);
        assert_eq!(seen(), [(18, false)]);
    }

    #[test]
    fn a_closed_pin_keeps_what_is_pending() {
        let (changes, lines) = lines();
        let pin = lines.pin(address(3, 0));
        let seen = || std::mem::take(&mut *changes.0.lock().unwrap());
        pin.close(true);
        pin.raise(QUEUE);
        assert_eq!((seen(), pin.isr()), (vec![], QUEUE));
        pin.close(false);
        assert_eq!(seen(), [(19, true)]);
        pin.close(true);
        assert_eq!(seen(), [(19, false)]);
        pin.take();
        pin.close(false);
        assert_eq!(seen(), []);
        pin.set_isr(QUEUE);
        assert_eq!(seen(), [(19, true)]);
    }

    #[test]
    fn threads_leave_a_shared_line_as_their_pins_are() {
        let (changes, lines) = lines();
        let pins: Vec<_> = (0..4).map(|function| lines.pin(address(5, function))).collect();
        std::thread::scope(|scope| {
            for pin in &pins {
                scope.spawn(move || {
                    for _ in 0..1000 {
                        pin.raise(QUEUE);
                        pin.take();
                    }
                });
            }
        });
        let changes = changes.0.lock().unwrap();
        // High and low in turn, low at last.
        for (index, (interrupt, high)) in changes.iter().enumerate() {
            assert_eq!((*interrupt, *high), (21, index % 2 == 0));
        }
        assert!(!changes.is_empty() && changes.len() % 2 == 0);
    }
}
