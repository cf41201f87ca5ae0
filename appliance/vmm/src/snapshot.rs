// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine that stands still, as bytes: all but its memory, which is a file of its own.
//!
//! ```text
//!  0  magic       "trnshvmm"
//!  8  version     u32, little-endian
//! 12  length      of what follows the header, u32
//! 16  checksum    CRC-32 of it, u32
//! 20  the state   postcard
//! ```
//!
//! Whoever keeps a snapshot sees to it that nobody else can write it. What is checked here
//! keeps one that is damaged or of another machine from doing more than not being restored:
//! everything in it is state that a guest could have brought about by itself.

pub(crate) mod memory;
pub(crate) mod platform;
pub(crate) mod processor;

use crate::pci::Address;
use crate::serial::UartState;
use crate::virtio::transport::FunctionState;
use crate::{Error, Result};
use platform::PlatformState;
use processor::ProcessorState;
use serde::{Deserialize, Serialize};

const MAGIC: [u8; 8] = *b"trnshvmm";
/// Changes with every change of the state or of what it means.
const VERSION: u32 = 3;
const HEADER: usize = 20;
/// The most that a snapshot may be long: 8 processors with large registers and 256 disks take
/// a fraction.
const MOST: usize = 4 << 20;

/// A paused machine without its memory.
#[derive(Clone, Debug)]
pub struct Snapshot(pub(crate) State);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) memory_mib: u32,
    pub(crate) processors: Vec<ProcessorState>,
    pub(crate) platform: PlatformState,
    pub(crate) uart: UartState,
    /// What the address port of PCI's configuration mechanism 1 holds.
    pub(crate) address_port: u32,
    pub(crate) functions: Vec<(Address, FunctionState)>,
}

impl Snapshot {
    /// The snapshot as bytes for a file.
    ///
    /// # Errors
    ///
    /// A state that is larger than any machine's.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let state = postcard::to_stdvec(&self.0)
            .map_err(|error| Error::Unsaved(format!("its state: {error}")))?;
        let length = u32::try_from(state.len()).ok().filter(|_| state.len() <= MOST - HEADER);
        let length = length.ok_or_else(|| {
            Error::Unsaved(format!("its state has {} bytes, more than {MOST}", state.len()))
        })?;
        let mut bytes = MAGIC.to_vec();
        for number in [VERSION, length, crc32fast::hash(&state)] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&state);
        Ok(bytes)
    }

    /// The snapshot that the bytes of a file hold.
    ///
    /// # Errors
    ///
    /// [`Error::Snapshot`] if they are none, damaged, or written by another version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let damaged = |what: String| Error::Snapshot(what);
        if bytes.len() > MOST {
            return Err(damaged(format!("{} bytes, at most {MOST} are possible", bytes.len())));
        }
        let field = |at: usize| {
            bytes
                .get(at..)
                .and_then(|tail| tail.first_chunk())
                .map(|raw| u32::from_le_bytes(*raw))
                .ok_or_else(|| damaged(format!("{} bytes are no whole header", bytes.len())))
        };
        let (version, length, checksum) = (field(8)?, field(12)?, field(16)?);
        if bytes.get(..8) != Some(&MAGIC) {
            return Err(damaged("it does not begin as one".into()));
        }
        if version != VERSION {
            return Err(damaged(format!("version {version}, expected {VERSION}")));
        }
        let state = bytes.get(HEADER..).unwrap_or(&[]);
        if u32::try_from(state.len()) != Ok(length) {
            return Err(damaged(format!("{} bytes of state, expected {length}", state.len())));
        }
        if crc32fast::hash(state) != checksum {
            return Err(damaged("the checksum of the state is wrong".into()));
        }
        let (state, rest) = postcard::take_from_bytes(state)
            .map_err(|error| damaged(format!("the state: {error}")))?;
        if !rest.is_empty() {
            return Err(damaged(format!("{} bytes behind the state", rest.len())));
        }
        Ok(Self(state))
    }

    /// The memory of the machine in MiB: the size of the file that holds it.
    pub fn memory_mib(&self) -> u32 {
        self.0.memory_mib
    }

    /// The number of its processors.
    pub fn processors(&self) -> usize {
        self.0.processors.len()
    }
}

#[cfg(test)]
mod tests;
