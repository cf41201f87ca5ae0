// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a server offers: devices by name, and what clients did with them.

use crate::context::LONGEST_BITMAP;
use crate::reply::Framing;
use crate::statistics::{Counters, Statistics};
use crate::wire::{MAX_STRING, export_flag};
use std::fmt::Debug;
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
    /// Tells clients that they may use several connections at once.
    ///
    /// The promise holds for every device: all connections share the one device, so a flush
    /// covers the writes of all, and a read sees them.
    pub shared: bool,
    /// Offers the context `qemu:allocation-depth`: from which layer of a chain of images
    /// the bytes come.
    pub depth: bool,
    /// Layers, from 0 for the first, that have every byte of the disk themselves, holes too:
    /// a raw disk hides what is below it.
    pub whole_layers: Vec<u32>,
    /// Offered as contexts `qemu:dirty-bitmap:NAME`.
    pub bitmaps: Vec<ExportedBitmap>,
}

impl Export {
    /// `device` as it is, under `name`: writable if it is, shared, without a description.
    pub fn new(name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            device,
            read_only: false,
            shared: true,
            depth: false,
            whole_layers: Vec::new(),
            bitmaps: Vec::new(),
        }
    }
}

/// A record of which parts of a disk have changed.
pub trait DirtyBitmap: Debug + Send + Sync {
    /// Whether the bytes from `offset` onward are dirty, and for how many bytes that holds;
    /// never 0.
    ///
    /// # Errors
    ///
    /// A bitmap that cannot be read.
    fn dirty_at(&self, offset: u64) -> Result<(bool, u64)>;
}

/// A bitmap under a name.
#[derive(Clone, Debug)]
pub struct ExportedBitmap {
    /// What follows `qemu:dirty-bitmap:`; not empty, at most 4078 bytes.
    pub name: String,
    /// The record.
    pub bitmap: Arc<dyn DirtyBitmap>,
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

    /// The transmission flags for a client that has negotiated `framing`.
    pub(crate) fn flags(&self, framing: Framing) -> u16 {
        let mut flags = export_flag::HAS_FLAGS
            | export_flag::SEND_FLUSH
            | export_flag::SEND_FUA
            | export_flag::SEND_CACHE;
        flags |= if self.is_read_only() {
            export_flag::READ_ONLY
        } else {
            export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES | export_flag::SEND_FAST_ZERO
        };
        if self.export.shared {
            flags |= export_flag::CAN_MULTI_CONN;
        }
        match framing {
            Framing::Simple => flags,
            Framing::Structured => flags | export_flag::SEND_DF,
            Framing::Extended => flags | export_flag::SEND_DF | export_flag::BLOCK_STATUS_PAYLOAD,
        }
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
        for bitmap in &export.bitmaps {
            let name = &bitmap.name;
            if name.is_empty() || name.len() > LONGEST_BITMAP || name.contains('\0') {
                return Err(Error::usage(format!(
                    "bitmap name of {} bytes, expected 1 to {LONGEST_BITMAP} without NUL",
                    name.len()
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

    /// Takes the export called `name` off the list.
    pub(crate) fn remove(&self, name: &str) -> Option<Arc<Served>> {
        let mut list = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let index = list.iter().position(|served| served.export.name == name)?;
        Some(list.remove(index))
    }

    pub(crate) fn all(&self) -> Vec<Arc<Served>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The export of this name; the empty name also means the only one there is. Its size is
    /// what it is now: clients cannot be told when it changes, but the next one can.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Served>> {
        let found = self.named(name)?;
        found.export.device.refresh_size();
        Some(found)
    }

    fn named(&self, name: &str) -> Option<Arc<Served>> {
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
        list.iter()
            .find(|served| served.export.name == name)
            .map(|served| served.counters.snapshot())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    fn export(name: &str, len: usize) -> Export {
        Export::new(name, Arc::new(MemoryDevice::new(vec![0; len])))
    }

    #[test]
    fn a_removed_export_is_found_no_more() {
        let exports = Exports::default();
        exports.add(export("a", 512)).unwrap();
        exports.add(export("b", 512)).unwrap();
        assert_eq!(exports.remove("a").unwrap().export.name, "a");
        assert!(exports.find("a").is_none());
        assert!(exports.remove("a").is_none());
        assert!(exports.find("b").is_some());
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
        exports.add(Export { shared: false, ..export("s", 1) }).unwrap();
        let flags = |name, framing| exports.find(name).unwrap().flags(framing);
        assert_eq!(flags("a", Framing::Simple), 0xd6d);
        assert_eq!(flags("a", Framing::Structured), 0xded);
        assert_eq!(flags("a", Framing::Extended), 0x1ded);
        assert_eq!(flags("r", Framing::Structured), 0x58f);
        assert_eq!(flags("s", Framing::Simple), 0xc6d);
    }
}
