// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hashes of a disk, chunk by chunk: made while copying, checked at any time later.
//!
//! A manifest is text, one JSON object a line, so that neither side ever holds more than
//! a line of it:
//!
//! ```text
//! {"tranship-manifest":1,"algorithm":"sha256","chunk":1048576,"size":5242880}
//! {"index":0,"sha256":"<64 hex digits>"}
//! {"index":4,"sha256":"<64 hex digits>"}
//! {"chunks":2,"digest":"<64 hex digits>"}
//! ```
//!
//! Chunks ascend. A chunk that is not listed is all zero. The last line, without which a
//! manifest is incomplete, has the number of chunks listed and the digest of the whole:
//! the SHA-256 of chunk size and disk size as 64-bit little-endian numbers, followed by
//! index (likewise) and hash (32 bytes) of each chunk listed. The last chunk of a disk may
//! be short.

mod text;
mod verify;

use crate::{Error, Result, Span, is_zero};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use std::fmt;
pub use text::{ManifestHeader, ManifestReader, ManifestSummary, ManifestWriter};
pub use verify::{Verified, VerifyOptions, verify};

/// The usual chunk size: small enough to name the place of a damage, and 64 TiB have rows
/// of less than 7 GiB.
pub const MANIFEST_CHUNK: u64 = 1 << 20;

static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// A SHA-256 hash; its text form is 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut bytes = [0; 32];
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let fits = pairs.len() == bytes.len() && rest.is_empty();
        let parsed = bytes.iter_mut().zip(pairs).try_for_each(|(byte, pair)| {
            let digit =
                |at: u8| char::from(at).to_digit(16).and_then(|digit| digit.try_into().ok());
            let [high, low] = *pair;
            let (high, low): (u8, u8) = (digit(high)?, digit(low)?);
            *byte = (high << 4) | low;
            Some(())
        });
        if fits && parsed.is_some() {
            Ok(Self(bytes))
        } else {
            Err(serde::de::Error::custom("hash is not 64 hex digits"))
        }
    }
}

/// The hash of one chunk that is not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashedChunk {
    /// Number of the chunk: it begins at this many times the chunk size.
    pub index: u64,
    /// SHA-256 of its bytes.
    #[serde(rename = "sha256")]
    pub digest: Digest,
}

/// Checks the size of a manifest's chunks.
pub(crate) fn check_chunk(chunk: u64) -> Result<()> {
    if chunk.is_power_of_two() && (4096..=16 << 20).contains(&chunk) {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "manifest has chunks of {chunk} bytes, expected a power of two from 4096 to 16777216"
    )))
}

/// A chunk that is being hashed.
struct Open {
    index: u64,
    /// Up to where.
    at: u64,
    hash: Sha256,
    /// Whether anything but zeroes was seen.
    data: bool,
}

/// Hashes the chunks of `span`, which begins with one: `data` are the ranges that may hold
/// something and whose bytes `bytes` gives; all else is zero. Chunks that are all zero are
/// left out.
pub(crate) fn hash_chunk<'a>(
    chunk: u64,
    span: Span,
    data: impl Iterator<Item = Span>,
    bytes: impl Fn(Span) -> &'a [u8],
) -> Vec<HashedChunk> {
    let mut hashes: Vec<HashedChunk> = Vec::new();
    let mut open: Option<Open> = None;
    let end_of = |index: u64| index.saturating_add(1).saturating_mul(chunk).min(span.end());
    let close = |mut open: Open| {
        zeroes(&mut open.hash, end_of(open.index).saturating_sub(open.at));
        let digest = Digest(open.hash.finalize().into());
        open.data.then_some(HashedChunk { index: open.index, digest })
    };
    for data in data {
        let mut at = data.start;
        while at < data.end().min(span.end()) {
            let index = at.checked_div(chunk).unwrap_or(0);
            if open.as_ref().is_some_and(|open| open.index != index) {
                hashes.extend(open.take().and_then(close));
            }
            let begin = index.saturating_mul(chunk);
            let now = open.get_or_insert_with(|| Open {
                index,
                at: begin,
                hash: Sha256::new(),
                data: false,
            });
            zeroes(&mut now.hash, at.saturating_sub(now.at));
            let end = data.end().min(end_of(index));
            let bytes = bytes(Span::new(at, end.saturating_sub(at)));
            now.data = now.data || !is_zero(bytes);
            now.hash.update(bytes);
            now.at = end;
            at = end;
        }
    }
    hashes.extend(open.take().and_then(close));
    hashes
}

fn zeroes(hash: &mut Sha256, mut count: u64) {
    while count > 0 {
        let len = usize::try_from(count).unwrap_or(usize::MAX).min(ZEROES.len());
        hash.update(ZEROES.get(..len).unwrap_or(&ZEROES));
        count = count.saturating_sub(u64::try_from(len).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests;
