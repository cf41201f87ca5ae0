// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finding the key that a passphrase opens.

use crate::cipher::sector_cipher;
use crate::derive::Hash;
use crate::header::{Header, KeySlot, read_within};
use crate::limits::{Budget, Limits};
use crate::{SECTOR, split};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result, SectorCipher};
use zeroize::Zeroizing;

/// The cipher of the payload whose header begins at byte 0 of `header_file`; for a qcow2
/// file with LUKS encryption, that is the region of the header. It numbers sectors from
/// the start of what is encrypted.
///
/// # Errors
///
/// As [`crate::Luks::unlock`].
pub fn unlock_cipher(
    header_file: &Arc<dyn BlockDevice>,
    passphrase: &[u8],
    limits: &Limits,
) -> Result<Arc<dyn SectorCipher>> {
    cipher_of(&Header::read(header_file)?, header_file, passphrase, limits)
}

pub(crate) fn cipher_of(
    header: &Header,
    file: &dyn BlockDevice,
    passphrase: &[u8],
    limits: &Limits,
) -> Result<Arc<dyn SectorCipher>> {
    let mut budget = Budget::new(limits);
    // A slot that cannot be tried says nothing about the others.
    let mut failure = None;
    let mut tried: usize = 0;
    for slot in header.slots.iter().filter(|slot| slot.active) {
        match try_slot(header, slot, file, passphrase, &mut budget) {
            Ok(Some(key)) => {
                return sector_cipher(
                    &header.encryption(),
                    &key,
                    header.sector_size,
                    header.iv_offset,
                );
            }
            Ok(None) => tried = tried.saturating_add(1),
            Err(error) => {
                failure.get_or_insert_with(|| {
                    Error::new(error.kind(), format!("key slot {} is not usable", slot.number))
                        .because(error)
                });
            }
        }
    }
    Err(failure.unwrap_or_else(|| {
        Error::usage(format!("passphrase opens none of the {tried} key slots in use"))
    }))
}

/// The payload's key, if `passphrase` opens `slot`.
fn try_slot(
    header: &Header,
    slot: &KeySlot,
    file: &dyn BlockDevice,
    passphrase: &[u8],
    budget: &mut Budget,
) -> Result<Option<Zeroizing<Vec<u8>>>> {
    budget.check_slot(slot.key_bytes, slot.stripes)?;
    budget.check_slot(slot.area_key_bytes, slot.stripes)?;
    let hash = Hash::named(&slot.split_hash)?;
    let key_bytes = usize::try_from(slot.key_bytes).unwrap_or(usize::MAX);
    let len = u64::from(slot.key_bytes).saturating_mul(u64::from(slot.stripes));
    let sectors = len.checked_next_multiple_of(SECTOR).unwrap_or(len);
    let mut material = Zeroizing::new(vec![0; usize::try_from(sectors).unwrap_or(usize::MAX)]);
    // Read before the passphrase is worked on: a truncated file needs no minute for that.
    read_within(file, &mut material, slot.area_offset, "key material")?;
    let area_key_bytes = usize::try_from(slot.area_key_bytes).unwrap_or(usize::MAX);
    let key = slot.kdf.derive(passphrase, &slot.salt, area_key_bytes, budget)?;
    sector_cipher(&slot.encryption, &key, 512, 0)?.decrypt(0, &mut material)?;
    material.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    let key = split::merge(&material, key_bytes, hash);
    Ok(header.digest.fits(&key, budget)?.then_some(key))
}
