// SPDX-License-Identifier: Apache-2.0 OR MIT
//! LUKS1 and LUKS2 containers: read-only.
//!
//! [`Header::read`] tells what a container is without its passphrase; [`Luks::unlock`]
//! gives the disk inside. [`unlock_cipher`] is for the headers that QEMU keeps inside
//! qcow2 files, [`legacy_aes_cipher`] for the method that came before them.
//!
//! References: "LUKS1 On-Disk Format Specification" 1.2.3 and "LUKS2 On-Disk Format
//! Specification" 1.1.1. Keys and passphrases are wiped after use and never show in
//! errors or debug output.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod cipher;
mod derive;
mod device;
mod header;
mod limits;
mod luks1;
mod luks2;
mod metadata;
mod split;
mod unlock;

pub use cipher::legacy_aes_cipher;
pub use device::Luks;
pub use header::{Header, Kdf, KeySlot};
pub use limits::Limits;
pub use unlock::unlock_cipher;

/// Bytes of a sector as LUKS counts them, whatever the size of an encrypted sector is.
const SECTOR: u64 = 512;
