// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bytes of the guest that are stored as they are, or encrypted: in the image or in its
//! data file.

use crate::geometry::{to_u64, to_usize};
use crate::header::Encryption;
use crate::image::Qcow2;
use std::io::IoSlice;
use std::sync::{Arc, PoisonError};
use tranship_block::{BlockDevice, Error, Result, SectorCipher, Storage};

/// Bytes that are encrypted together, with their number as the initial value.
const SECTOR: u64 = 512;

impl Qcow2 {
    /// What the payload is in.
    pub(crate) fn payload(&self) -> &dyn BlockDevice {
        match &self.data {
            Some(data) => data,
            None => &self.file,
        }
    }

    /// What payload is written to.
    pub(crate) fn payload_storage(&self, guest: u64) -> Result<&Arc<dyn Storage>> {
        let image = self.writable(guest)?;
        Ok(self.data.as_ref().unwrap_or(image))
    }

    /// Fills `buf` with the bytes at `host`, which the guest has at `guest`.
    pub(crate) fn load(&self, buf: &mut [u8], host: u64, guest: u64) -> Result<()> {
        // Bytes past the file's end were never written or were lost: not zeroes.
        if host.saturating_add(to_u64(buf.len())) > self.payload().size() {
            let cluster = self.geometry.offset(self.geometry.index(host));
            return Err(Error::corrupt(format!(
                "data in the cluster at {cluster:#x} or after it lies past the file's {} bytes: \
                 the image is incomplete",
                self.payload().size()
            ))
            .at(host));
        }
        match &self.cipher {
            None => self.payload().read_at(buf, host),
            Some(cipher) => self.load_encrypted(cipher, buf, host, guest),
        }
    }

    fn load_encrypted(
        &self,
        cipher: &Arc<dyn SectorCipher>,
        buf: &mut [u8],
        host: u64,
        guest: u64,
    ) -> Result<()> {
        let skip = to_usize(guest % SECTOR)?;
        let len = skip.saturating_add(buf.len());
        if skip == 0 && len.is_multiple_of(512) {
            self.payload().read_at(buf, host)?;
            return cipher.decrypt(self.sector(host, guest), buf);
        }
        let mut whole = vec![0; len.next_multiple_of(512)];
        let (host, guest) = (host & !(SECTOR - 1), guest & !(SECTOR - 1));
        self.payload().read_at(&mut whole, host)?;
        cipher.decrypt(self.sector(host, guest), &mut whole)?;
        buf.copy_from_slice(whole.get(skip..len).unwrap_or_default());
        Ok(())
    }

    /// Stores `bufs` at `host`, which the guest has at `guest`.
    pub(crate) fn store(&self, bufs: &[IoSlice<'_>], host: u64, guest: u64) -> Result<()> {
        let storage = self.payload_storage(guest)?;
        if let Some(cipher) = &self.cipher {
            return self.store_encrypted(cipher, bufs, host, guest);
        }
        match bufs {
            [buf] => storage.write_at(buf, host),
            _ => storage.write_vectored_at(bufs, host),
        }
    }

    fn store_encrypted(
        &self,
        cipher: &Arc<dyn SectorCipher>,
        bufs: &[IoSlice<'_>],
        host: u64,
        guest: u64,
    ) -> Result<()> {
        let storage = self.payload_storage(guest)?;
        let bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        let skip = to_usize(guest % SECTOR)?;
        let end = skip.saturating_add(bytes.len());
        if skip == 0 && end.is_multiple_of(512) {
            let mut bytes = bytes;
            cipher.encrypt(self.sector(host, guest), &mut bytes)?;
            return storage.write_at(&bytes, host);
        }
        // Neighbours in one sector must not lose each other's bytes.
        let _sectors = self.sectors.lock().unwrap_or_else(PoisonError::into_inner);
        let mut whole = vec![0; end.next_multiple_of(512)];
        let (host, guest) = (host & !(SECTOR - 1), guest & !(SECTOR - 1));
        let first = self.sector(host, guest);
        storage.read_at(&mut whole, host)?;
        cipher.decrypt(first, &mut whole)?;
        if let Some(part) = whole.get_mut(skip..end) {
            part.copy_from_slice(&bytes);
        }
        cipher.encrypt(first, &mut whole)?;
        storage.write_at(&whole, host)
    }

    /// The number that the cipher knows the sector at `host` by.
    fn sector(&self, host: u64, guest: u64) -> u64 {
        let offset = match self.header.encryption() {
            Some(Encryption::Luks { .. }) => host,
            _ => guest,
        };
        offset / SECTOR
    }
}
