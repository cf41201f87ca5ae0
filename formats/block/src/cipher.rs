// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Encryption of sectors, for the formats that keep encrypted payload.

use crate::Result;
use std::fmt::Debug;

/// A cipher with its key, for payload that is encrypted sector by sector.
pub trait SectorCipher: Debug + Send + Sync {
    /// Bytes of a sector: all lengths are multiples of it.
    fn sector_size(&self) -> u32;

    /// Decrypts `data`, which begins with sector `sector`, in place.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Usage`] for a length that is no multiple of the sector size.
    fn decrypt(&self, sector: u64, data: &mut [u8]) -> Result<()>;

    /// Encrypts `data`, which begins with sector `sector`, in place.
    ///
    /// # Errors
    ///
    /// As [`Self::decrypt`].
    fn encrypt(&self, sector: u64, data: &mut [u8]) -> Result<()>;
}
