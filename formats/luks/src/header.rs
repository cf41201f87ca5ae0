// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a container says about itself before it is unlocked.

use crate::derive::Hash;
use crate::{luks1, luks2};
use tranship_block::{BlockDevice, Error, Result, Span};

/// First bytes of LUKS1 and of the first header of LUKS2.
pub(crate) const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";

/// How a passphrase becomes a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kdf {
    /// PBKDF2 with a hash of this name.
    Pbkdf2 {
        /// Name of the hash.
        hash: String,
        /// Rounds.
        iterations: u32,
    },
    /// Argon2.
    Argon2 {
        /// `argon2i` or `argon2id`.
        variant: String,
        /// Bytes of memory.
        memory: u64,
        /// Passes over the memory.
        passes: u32,
        /// Lanes.
        lanes: u32,
    },
}

/// A place for the container's key, encrypted with a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// Number of the slot.
    pub number: u32,
    /// Whether there is a key in it.
    pub active: bool,
    /// How the passphrase becomes a key.
    pub kdf: Kdf,
    /// Anti-forensic stripes.
    pub stripes: u32,
    /// Where the encrypted key begins, in bytes from the header.
    pub area_offset: u64,
    pub(crate) salt: Vec<u8>,
    /// Bytes of the key in the slot.
    pub(crate) key_bytes: u32,
    /// What the key is encrypted with, for example `aes-xts-plain64`.
    pub(crate) encryption: String,
    /// Bytes of the key that the slot itself is encrypted with.
    pub(crate) area_key_bytes: u32,
    /// Name of the hash that joins the stripes.
    pub(crate) split_hash: String,
}

/// How to tell whether a key is the right one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyDigest {
    pub(crate) hash: String,
    pub(crate) iterations: u32,
    pub(crate) salt: Vec<u8>,
    pub(crate) digest: Vec<u8>,
}

/// The facts of a container that need no passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 1 or 2.
    pub version: u16,
    /// Name of the cipher, for example `aes`.
    pub cipher: String,
    /// Mode and initialisation vector, for example `xts-plain64`.
    pub mode: String,
    /// Name of the hash that verifies the key.
    pub hash: String,
    /// The container's UUID as text.
    pub uuid: String,
    /// Label; LUKS1 has none.
    pub label: String,
    /// Where the payload begins, in bytes.
    pub payload_offset: u64,
    /// Bytes of the payload, if the header tells; else it reaches to the end of the file.
    pub payload_len: Option<u64>,
    /// Bytes that are encrypted as one unit: 512, or up to 4096 in LUKS2.
    pub sector_size: u32,
    /// Bytes of the key that encrypts the payload.
    pub key_bytes: u32,
    /// All slots of LUKS1; those for the payload's key of LUKS2.
    pub slots: Vec<KeySlot>,
    /// What was wrong with the header and could be worked around.
    pub warnings: Vec<String>,
    pub(crate) digest: KeyDigest,
    /// What is added to the number of a sector to get its initialisation vector.
    pub(crate) iv_offset: u64,
}

impl Header {
    /// Reads and checks the header at the start of `file`. Where the first header of LUKS2
    /// is lost, its copy serves.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if there is no header or its numbers make no
    /// sense, [`tranship_block::ErrorKind::Unsupported`] for what this reader does not
    /// know: other versions, integrity protection, an encryption in progress.
    pub fn read(file: &dyn BlockDevice) -> Result<Self> {
        let mut start = [0; 8];
        read_within(file, &mut start, 0, "LUKS header")?;
        let [magic @ .., high, low] = start;
        if magic != *MAGIC {
            return luks2::read(file)?
                .ok_or_else(|| Error::corrupt("no LUKS header, neither at 0 nor a copy").at(0));
        }
        match u16::from_be_bytes([high, low]) {
            1 => luks1::read(file),
            2 => luks2::read(file)?
                .ok_or_else(|| Error::corrupt("both headers of LUKS2 are damaged").at(0)),
            other => {
                Err(Error::unsupported(format!("LUKS version is {other}, expected 1 or 2")).at(6))
            }
        }
    }

    /// Rounds of PBKDF2 that verify the payload's key.
    pub fn digest_iterations(&self) -> u32 {
        self.digest.iterations
    }

    /// The specification of the payload's encryption, for example `aes-xts-plain64`.
    pub(crate) fn encryption(&self) -> String {
        format!("{}-{}", self.cipher, self.mode)
    }

    /// Checks what both versions have in common.
    pub(crate) fn check(self) -> Result<Self> {
        Hash::named(&self.digest.hash)?;
        Ok(self)
    }
}

/// Fills `buf` from `file` after a check that it reaches that far.
pub(crate) fn read_within(
    file: &dyn BlockDevice,
    buf: &mut [u8],
    offset: u64,
    what: &str,
) -> Result<()> {
    let len = u64::try_from(buf.len()).unwrap_or(u64::MAX);
    if Span::new(offset, len).check_within(file.size()).is_err() {
        return Err(Error::corrupt(format!(
            "{what} of {len} bytes ends past the file's size of {} bytes",
            file.size()
        ))
        .at(offset));
    }
    file.read_at(buf, offset)
}

/// Text that ends at the first NUL of a field.
pub(crate) fn text(name: &str, field: &[u8]) -> Result<String> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    match std::str::from_utf8(field.get(..end).unwrap_or_default()) {
        Ok(text) if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        _ => Err(Error::corrupt(format!("{name} of the LUKS header is not text"))),
    }
}
