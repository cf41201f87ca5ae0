// SPDX-License-Identifier: Apache-2.0 OR MIT
//! AES over sectors: XTS and CBC, each with the ways to make an initialisation vector.

use crate::SECTOR;
use crate::derive::Hash;
use aes::cipher::array::Array;
use aes::cipher::consts::U16;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use aes::{Aes128, Aes192, Aes256};
use std::fmt;
use std::sync::Arc;
use tranship_block::{Error, Result, SectorCipher};
use zeroize::Zeroizing;

const BLOCK: usize = 16;
/// Largest sector that LUKS2 allows.
const MAX_SECTOR: usize = 4096;
/// Sectors whose initialisation vectors are made together, so that the processor has
/// several blocks in flight for them, too.
const BATCH: usize = 8;

type Block = Array<u8, U16>;

/// One of the three sizes of AES.
trait Aes:
    BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + KeyInit + Send + Sync
{
}
impl Aes for Aes128 {}
impl Aes for Aes192 {}
impl Aes for Aes256 {}

/// How the number of a sector becomes its initialisation vector.
enum Vector {
    /// The low 32 bits of the number.
    Plain,
    /// The number.
    Plain64,
    /// The number, encrypted with the hash of the key.
    Essiv(Box<Aes256>),
}

enum Direction {
    Encrypt,
    Decrypt,
}

/// What an encryption does to one sector, whose vector is known.
trait Mode: Send + Sync {
    /// Changes the vectors of several sectors, if the mode needs that.
    fn prepare(&self, vectors: &mut [Block]);

    fn sector(&self, direction: &Direction, vector: &Block, sector: &mut [u8]);
}

/// XTS (IEEE 1619) without ciphertext stealing: sectors are whole blocks.
struct Xts<A> {
    data: A,
    tweak: A,
}

/// CBC that starts anew in each sector.
struct Cbc<A>(A);

fn blocks(data: &mut [u8]) -> &mut [Block] {
    Array::cast_slice_from_core_mut(data.as_chunks_mut::<BLOCK>().0)
}

fn xor(blocks: &mut [Block], with: impl Iterator<Item = u128>) {
    for (block, other) in blocks.iter_mut().zip(with) {
        block.0 = (u128::from_le_bytes(block.0) ^ other).to_le_bytes();
    }
}

/// The tweaks of a sector's blocks: each is the one before, times x in GF(2^128).
fn tweaks(first: &Block) -> impl Iterator<Item = u128> {
    std::iter::successors(Some(u128::from_le_bytes(first.0)), |tweak| {
        let carry = if tweak >> 127 == 0 { 0 } else { 0x87 };
        Some((tweak << 1) ^ carry)
    })
}

impl<A: Aes> Mode for Xts<A> {
    fn prepare(&self, vectors: &mut [Block]) {
        self.tweak.encrypt_blocks(vectors);
    }

    fn sector(&self, direction: &Direction, vector: &Block, sector: &mut [u8]) {
        let sector = blocks(sector);
        xor(sector, tweaks(vector));
        match direction {
            Direction::Encrypt => self.data.encrypt_blocks(sector),
            Direction::Decrypt => self.data.decrypt_blocks(sector),
        }
        xor(sector, tweaks(vector));
    }
}

impl<A: Aes> Mode for Cbc<A> {
    fn prepare(&self, _vectors: &mut [Block]) {}

    fn sector(&self, direction: &Direction, vector: &Block, sector: &mut [u8]) {
        let mut chained = u128::from_le_bytes(vector.0);
        match direction {
            Direction::Encrypt => {
                for block in blocks(sector) {
                    block.0 = (u128::from_le_bytes(block.0) ^ chained).to_le_bytes();
                    self.0.encrypt_block(block);
                    chained = u128::from_le_bytes(block.0);
                }
            }
            Direction::Decrypt => {
                // All blocks at once; what they are chained with is lost by that.
                let mut copy = [0; MAX_SECTOR];
                for (kept, byte) in copy.iter_mut().zip(sector.iter()) {
                    *kept = *byte;
                }
                let sector = blocks(sector);
                self.0.decrypt_blocks(sector);
                let before = copy.as_chunks::<BLOCK>().0.iter().copied().map(u128::from_le_bytes);
                xor(sector, std::iter::once(chained).chain(before));
            }
        }
    }
}

/// A mode with a key, for sectors of one size.
struct Sectors {
    mode: Box<dyn Mode>,
    vector: Vector,
    sector_size: u32,
    /// Added to the number of each sector.
    vector_offset: u64,
    name: String,
}

impl fmt::Debug for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The key must not show, and it is in every other field.
        f.debug_struct("Sectors")
            .field("name", &self.name)
            .field("sector_size", &self.sector_size)
            .finish_non_exhaustive()
    }
}

impl Sectors {
    fn run(&self, direction: &Direction, sector: u64, data: &mut [u8]) -> Result<()> {
        let size = usize::try_from(self.sector_size).unwrap_or(MAX_SECTOR);
        let batch = size.saturating_mul(BATCH);
        if !data.len().is_multiple_of(size) {
            return Err(Error::usage(format!(
                "{} bytes to encrypt or decrypt, expected a multiple of {size}",
                data.len()
            )));
        }
        // Vectors count units of 512 bytes, whatever the size of a sector is.
        let step = u64::from(self.sector_size) / SECTOR;
        let mut number = sector.wrapping_mul(step).wrapping_add(self.vector_offset);
        for group in data.chunks_mut(batch) {
            let mut vectors = [Block::default(); BATCH];
            for vector in &mut vectors {
                let value = match self.vector {
                    Vector::Plain => number & u64::from(u32::MAX),
                    Vector::Plain64 | Vector::Essiv(_) => number,
                };
                vector.0 = u128::from(value).to_le_bytes();
                number = number.wrapping_add(step);
            }
            if let Vector::Essiv(cipher) = &self.vector {
                cipher.encrypt_blocks(&mut vectors);
            }
            self.mode.prepare(&mut vectors);
            for (sector, vector) in group.chunks_mut(size).zip(&vectors) {
                self.mode.sector(direction, vector, sector);
            }
        }
        Ok(())
    }
}

impl SectorCipher for Sectors {
    fn sector_size(&self) -> u32 {
        self.sector_size
    }

    fn decrypt(&self, sector: u64, data: &mut [u8]) -> Result<()> {
        self.run(&Direction::Decrypt, sector, data)
    }

    fn encrypt(&self, sector: u64, data: &mut [u8]) -> Result<()> {
        self.run(&Direction::Encrypt, sector, data)
    }
}

/// The cipher that `encryption`, for example `aes-xts-plain64`, means with `key`.
pub(crate) fn sector_cipher(
    encryption: &str,
    key: &[u8],
    sector_size: u32,
    vector_offset: u64,
) -> Result<Arc<dyn SectorCipher>> {
    let unknown = || {
        Error::unsupported(format!(
            "encryption is {encryption:?}, expected aes-xts or aes-cbc with plain, plain64 or \
             essiv:sha256"
        ))
    };
    if !matches!(sector_size, 512 | 1024 | 2048 | 4096) {
        return Err(Error::corrupt(format!(
            "encrypted sectors have {sector_size} bytes, expected 512, 1024, 2048 or 4096"
        )));
    }
    let (chain, vector) = encryption
        .strip_prefix("aes-")
        .and_then(|rest| rest.split_once('-'))
        .ok_or_else(unknown)?;
    let vector = match vector {
        "plain" => Vector::Plain,
        "plain64" => Vector::Plain64,
        "essiv:sha256" => {
            let salt = Hash::Sha256.of(&[key]);
            Vector::Essiv(Box::new(keyed(&salt).ok_or_else(unknown)?))
        }
        _ => return Err(unknown()),
    };
    let mode = match chain {
        "xts" => xts(key),
        "cbc" => cbc(key),
        _ => return Err(unknown()),
    };
    let mode = mode.ok_or_else(|| {
        Error::corrupt(format!("key of {encryption} has {} bytes: no size of AES", key.len()))
    })?;
    let name = encryption.to_owned();
    Ok(Arc::new(Sectors { mode, vector, sector_size, vector_offset, name }))
}

fn keyed<A: Aes>(key: &[u8]) -> Option<A> {
    A::new_from_slice(key).ok()
}

fn xts(key: &[u8]) -> Option<Box<dyn Mode>> {
    fn of<A: Aes + 'static>(data: &[u8], tweak: &[u8]) -> Option<Box<dyn Mode>> {
        Some(Box::new(Xts::<A> { data: keyed(data)?, tweak: keyed(tweak)? }))
    }
    let (data, tweak) = key.split_at_checked(key.len() / 2)?;
    match key.len() {
        32 => of::<Aes128>(data, tweak),
        48 => of::<Aes192>(data, tweak),
        64 => of::<Aes256>(data, tweak),
        _ => None,
    }
}

fn cbc(key: &[u8]) -> Option<Box<dyn Mode>> {
    fn of<A: Aes + 'static>(key: &[u8]) -> Option<Box<dyn Mode>> {
        Some(Box::new(Cbc::<A>(keyed(key)?)))
    }
    match key.len() {
        16 => of::<Aes128>(key),
        24 => of::<Aes192>(key),
        32 => of::<Aes256>(key),
        _ => None,
    }
}

/// The encryption of qcow2 files before LUKS: AES-128 in CBC mode, sectors of 512 bytes
/// with the number of the guest's sector as initialisation vector; the key is the
/// passphrase itself, cut to 16 bytes or filled up with zeroes.
///
/// # Errors
///
/// None that a passphrase could cause.
pub fn legacy_aes_cipher(passphrase: &[u8]) -> Result<Arc<dyn SectorCipher>> {
    let mut key = Zeroizing::new([0_u8; 16]);
    for (byte, given) in key.iter_mut().zip(passphrase) {
        *byte = *given;
    }
    sector_cipher("aes-cbc-plain64", key.as_slice(), 512, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_format_testing::pattern;

    #[test]
    fn xts_gives_the_vectors_of_ieee_1619() {
        // Annex B, vector 4 (AES-128, sector 0) and vector 10 (AES-256, sector 0xff).
        let text: Vec<u8> = (0..=255).cycle().take(512).collect();
        let key = [
            0x27, 0x18, 0x28, 0x18, 0x28, 0x45, 0x90, 0x45, 0x23, 0x53, 0x60, 0x28, 0x74, 0x71,
            0x35, 0x26, 0x31, 0x41, 0x59, 0x26, 0x53, 0x58, 0x97, 0x93, 0x23, 0x84, 0x62, 0x64,
            0x33, 0x83, 0x27, 0x95,
        ];
        let mut data = text.clone();
        let cipher = sector_cipher("aes-xts-plain64", &key, 512, 0).unwrap();
        cipher.encrypt(0, &mut data).unwrap();
        assert_eq!(data[..8], [0x27, 0xa7, 0x47, 0x9b, 0xef, 0xa1, 0xd4, 0x76]);
        let key = [
            0x27, 0x18, 0x28, 0x18, 0x28, 0x45, 0x90, 0x45, 0x23, 0x53, 0x60, 0x28, 0x74, 0x71,
            0x35, 0x26, 0x62, 0x49, 0x77, 0x57, 0x24, 0x70, 0x93, 0x69, 0x99, 0x59, 0x57, 0x49,
            0x66, 0x96, 0x76, 0x27, 0x31, 0x41, 0x59, 0x26, 0x53, 0x58, 0x97, 0x93, 0x23, 0x84,
            0x62, 0x64, 0x33, 0x83, 0x27, 0x95, 0x02, 0x88, 0x41, 0x97, 0x16, 0x93, 0x99, 0x37,
            0x51, 0x05, 0x82, 0x09, 0x74, 0x94, 0x45, 0x92,
        ];
        let mut data = text;
        let cipher = sector_cipher("aes-xts-plain64", &key, 512, 0).unwrap();
        cipher.encrypt(0xff, &mut data).unwrap();
        assert_eq!(data[..8], [0x1c, 0x3b, 0x3a, 0x10, 0x2f, 0x77, 0x03, 0x86]);
    }

    #[test]
    fn decryption_undoes_encryption_in_every_mode() {
        let cases = [
            ("aes-xts-plain64", 32),
            ("aes-xts-plain", 48),
            ("aes-xts-plain64", 64),
            ("aes-cbc-plain", 16),
            ("aes-cbc-plain64", 24),
            ("aes-cbc-essiv:sha256", 32),
        ];
        for (encryption, key) in cases {
            for (sector, len) in [(512, 512), (4096, 4096)] {
                let cipher = sector_cipher(encryption, &pattern(key, 1), sector, 5).unwrap();
                let plain = pattern(4096 * 19, 2);
                let mut data = plain.clone();
                cipher.encrypt(77, &mut data).unwrap();
                assert_ne!(data, plain);
                // Sector by sector gives the same as all at once.
                for (number, part) in (77..).zip(data.chunks_mut(len)) {
                    cipher.decrypt(number, part).unwrap();
                }
                assert_eq!(data, plain, "{encryption} {key} {sector}");
            }
        }
    }

    #[test]
    fn large_sectors_count_vectors_in_512_bytes() {
        let key = pattern(64, 9);
        let large = sector_cipher("aes-xts-plain64", &key, 4096, 0).unwrap();
        let small = sector_cipher("aes-xts-plain64", &key, 512, 0).unwrap();
        let plain = pattern(4096, 1);
        let (mut one, mut other) = (plain.clone(), plain);
        large.encrypt(3, &mut one).unwrap();
        small.encrypt(24, &mut other).unwrap();
        assert_eq!(one[..512], other[..512]);
        assert_ne!(one[512..], other[512..]);
    }

    #[test]
    fn unknown_encryption_is_named() {
        for bad in ["serpent-xts-plain64", "aes-lrw-benbi", "aes", "aes-xts-", "aes-cbc-null"] {
            let error = sector_cipher(bad, &[0; 32], 512, 0).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
        assert!(sector_cipher("aes-xts-plain64", &[0; 31], 512, 0).is_err());
        assert!(sector_cipher("aes-xts-plain64", &[0; 32], 513, 0).is_err());
    }

    #[test]
    fn keys_and_odd_lengths_do_not_pass() {
        let cipher = legacy_aes_cipher(b"secret-passphrase").unwrap();
        assert!(!format!("{cipher:?}").contains("secret"));
        assert!(cipher.decrypt(0, &mut [0; 511]).is_err());
    }
}
