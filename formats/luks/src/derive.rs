// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a passphrase to a key.

use crate::header::{Kdf, KeyDigest};
use crate::limits::Budget;
use argon2::{Algorithm, Argon2, Params, Version};
use pbkdf2::pbkdf2_hmac;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use tranship_block::{Error, Result};
use zeroize::Zeroizing;

/// The hashes that containers are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    /// The hash that a header names.
    pub(crate) fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "sha1" => Self::Sha1,
            "sha224" => Self::Sha224,
            "sha256" => Self::Sha256,
            "sha384" => Self::Sha384,
            "sha512" => Self::Sha512,
            _ => {
                return Err(Error::unsupported(format!(
                    "hash is {name:?}, expected sha1, sha224, sha256, sha384 or sha512"
                )));
            }
        })
    }

    /// Bytes of a result.
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The hash of `parts` one after the other.
    pub(crate) fn of(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        fn run<D: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
            let mut hash = D::new();
            for part in parts {
                hash.update(part);
            }
            Zeroizing::new(hash.finalize().to_vec())
        }
        match self {
            Self::Sha1 => run::<Sha1>(parts),
            Self::Sha224 => run::<Sha224>(parts),
            Self::Sha256 => run::<Sha256>(parts),
            Self::Sha384 => run::<Sha384>(parts),
            Self::Sha512 => run::<Sha512>(parts),
        }
    }

    fn pbkdf2(
        self,
        secret: &[u8],
        salt: &[u8],
        iterations: u32,
        key: &mut [u8],
        budget: &mut Budget,
    ) -> Result<()> {
        if iterations == 0 {
            return Err(Error::corrupt("pbkdf2 has 0 iterations, expected at least 1"));
        }
        let blocks = u64::try_from(key.len().div_ceil(self.len())).unwrap_or(u64::MAX);
        budget.spend_pbkdf2(iterations, blocks)?;
        match self {
            Self::Sha1 => pbkdf2_hmac::<Sha1>(secret, salt, iterations, key),
            Self::Sha224 => pbkdf2_hmac::<Sha224>(secret, salt, iterations, key),
            Self::Sha256 => pbkdf2_hmac::<Sha256>(secret, salt, iterations, key),
            Self::Sha384 => pbkdf2_hmac::<Sha384>(secret, salt, iterations, key),
            Self::Sha512 => pbkdf2_hmac::<Sha512>(secret, salt, iterations, key),
        }
        Ok(())
    }
}

impl Kdf {
    /// A key of `len` bytes from `passphrase`.
    pub(crate) fn derive(
        &self,
        passphrase: &[u8],
        salt: &[u8],
        len: usize,
        budget: &mut Budget,
    ) -> Result<Zeroizing<Vec<u8>>> {
        let mut key = Zeroizing::new(vec![0; len]);
        match self {
            Self::Pbkdf2 { hash, iterations } => {
                Hash::named(hash)?.pbkdf2(passphrase, salt, *iterations, &mut key, budget)?;
            }
            Self::Argon2 { variant, memory, passes, lanes } => {
                let algorithm = match variant.as_str() {
                    "argon2i" => Algorithm::Argon2i,
                    _ => Algorithm::Argon2id,
                };
                budget.spend_argon2(*memory, *passes)?;
                let kib = u32::try_from(memory / 1024).unwrap_or(u32::MAX);
                let bad = |error: argon2::Error| {
                    Error::corrupt(format!("parameters of {variant} are impossible: {error}"))
                };
                let params = Params::new(kib, *passes, *lanes, Some(len)).map_err(bad)?;
                Argon2::new(algorithm, Version::V0x13, params)
                    .hash_password_into(passphrase, salt, &mut key)
                    .map_err(bad)?;
            }
        }
        Ok(key)
    }
}

impl KeyDigest {
    /// Whether `key` is the one that the digest was made of.
    pub(crate) fn fits(&self, key: &[u8], budget: &mut Budget) -> Result<bool> {
        let mut found = vec![0; self.digest.len()];
        let hash = Hash::named(&self.hash)?;
        hash.pbkdf2(key, &self.salt, self.iterations, &mut found, budget)?;
        Ok(!found.is_empty() && found == self.digest)
    }
}
