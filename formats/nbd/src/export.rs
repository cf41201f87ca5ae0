// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a server offers: devices by name, and what clients did with them.

use crate::wire::{MAX_STRING, export_flag};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use tranship_block::{BlockDevice, Error, Result};

/// A device under a name.
#[derive(Clone, Debug)]
pub struct Export {
    /// What clients ask for; at most 4096 bytes, may be empty.
    pub name: String,
    /// Text for humans that clients can list; at most 4096 bytes, may be empty.
    pub description: String,
    /// The bytes. They may be read and written by several clients at the same time.
    pub device: Arc<dyn BlockDevice>,
    /// Refuses writes even where the device would take them.
    pub read_only: bool,
}

/// What clients did with an export since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Connections that chose the export.
    pub connections: u64,
    /// Read requests.
    pub reads: u64,
    /// Bytes that they asked for, holes included.
    pub bytes_read: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes that they brought.
    pub bytes_written: u64,
    /// Requests to zero or to trim.
    pub zeroes: u64,
    /// Bytes that they named.
    pub bytes_zeroed: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Block status requests.
    pub statuses: u64,
    /// Requests of any kind that were answered with an error.
    pub errors: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) connections: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
    pub(crate) zeroes: AtomicU64,
    pub(crate) bytes_zeroed: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) statuses: AtomicU64,
    pub(crate) errors: AtomicU64,
}

impl Counters {
    fn read(&self) -> Statistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            connections: get(&self.connections),
            reads: get(&self.reads),
            bytes_read: get(&self.bytes_read),
            writes: get(&self.writes),
            bytes_written: get(&self.bytes_written),
            zeroes: get(&self.zeroes),
            bytes_zeroed: get(&self.bytes_zeroed),
            flushes: get(&self.flushes),
            statuses: get(&self.statuses),
            errors: get(&self.errors),
        }
    }
}

/// Adds to a counter that orders nothing.
pub(crate) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// An export together with its counters; connections keep it alive.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) export: Export,
    pub(crate) counters: Counters,
}

impl Served {
    pub(crate) fn is_read_only(&self) -> bool {
        self.export.read_only || self.export.device.is_read_only()
    }

    /// The transmission flags for a client that has negotiated structured replies or not.
    ///
    /// CAN_MULTI_CONN is true of every [`BlockDevice`]: all connections share the one
    /// device, so a flush covers the writes of all and a read sees them.
    pub(crate) fn flags(&self, structured: bool) -> u16 {
        let mut flags = export_flag::HAS_FLAGS
            | export_flag::SEND_FLUSH
            | export_flag::SEND_FUA
            | export_flag::CAN_MULTI_CONN;
        flags |= if self.is_read_only() {
            export_flag::READ_ONLY
        } else {
            export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES
        };
        if structured {
            flags |= export_flag::SEND_DF;
        }
        flags
    }
}

/// All exports of a server, in the order in which they were added.
#[derive(Debug, Default)]
pub(crate) struct Exports(RwLock<Vec<Arc<Served>>>);

impl Exports {
    /// Adds an export, in place of one of the same name if there is one.
    pub(crate) fn add(&self, export: Export) -> Result<()> {
        for (what, text) in [("name", &export.name), ("description", &export.description)] {
            if text.len() > MAX_STRING || text.contains('\0') {
                return Err(Error::usage(format!(
                    "export {what} of {} bytes, expected at most {MAX_STRING} without NUL",
                    text.len()
                )));
            }
        }
        let size = export.device.size();
        if i64::try_from(size).is_err() {
            return Err(Error::usage(format!(
                "export {:?} has {size} bytes, and clients take at most 2^63 - 1",
                export.name
            )));
        }
        let served = Arc::new(Served { export, counters: Counters::default() });
        let mut list = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match list.iter_mut().find(|old| old.export.name == served.export.name) {
            Some(old) => *old = served,
            None => list.push(served),
        }
        Ok(())
    }

    pub(crate) fn all(&self) -> Vec<Arc<Served>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The export of this name; the empty name also means the only one there is.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Served>> {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let exact = list.iter().find(|served| served.export.name == name);
        exact
            .or(match list.as_slice() {
                [only] if name.is_empty() => Some(only),
                _ => None,
            })
            .cloned()
    }

    pub(crate) fn statistics(&self, name: &str) -> Option<Statistics> {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        list.iter().find(|served| served.export.name == name).map(|served| served.counters.read())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    fn export(name: &str, len: usize) -> Export {
        Export {
            name: name.to_owned(),
            description: String::new(),
            device: Arc::new(MemoryDevice::new(vec![0; len])),
            read_only: false,
        }
    }

    #[test]
    fn a_name_finds_its_export_and_the_empty_name_the_only_one() {
        let exports = Exports::default();
        assert!(exports.find("").is_none());
        exports.add(export("a", 1)).unwrap();
        assert_eq!(exports.find("").unwrap().export.name, "a");
        exports.add(export("b", 2)).unwrap();
        assert!(exports.find("").is_none());
        exports.add(export("a", 3)).unwrap();
        assert_eq!(exports.find("a").unwrap().export.device.size(), 3);
        assert_eq!(exports.all().len(), 2);
    }

    #[test]
    fn names_that_cannot_travel_are_refused() {
        let exports = Exports::default();
        assert!(exports.add(export(&"x".repeat(4097), 1)).is_err());
        assert!(exports.add(export("a\0b", 1)).is_err());
        assert!(exports.add(export(&"x".repeat(4096), 1)).is_ok());
    }

    #[test]
    fn flags_follow_the_state() {
        let exports = Exports::default();
        exports.add(export("a", 1)).unwrap();
        exports.add(Export { read_only: true, ..export("r", 1) }).unwrap();
        assert_eq!(exports.find("a").unwrap().flags(false), 0x16d);
        assert_eq!(exports.find("a").unwrap().flags(true), 0x1ed);
        assert_eq!(exports.find("r").unwrap().flags(true), 0x18f);
    }
}
