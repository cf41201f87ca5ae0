// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The manifest of an OVF package: checksums of its files.

use crate::files::Files;
use crate::{Error, ErrorKind, Result};
use sha1::Sha1;
use sha2::digest::DynDigest;
use sha2::{Sha256, Sha512};
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tranship_block::BlockDevice;

const MAX_LINES: usize = 10_000;
const PIECE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Sha1,
    Sha256,
    Sha512,
}

/// One line: `SHA256(disk.vmdk)= 0123...`.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    algorithm: Algorithm,
    name: String,
    digest: String,
}

/// Checksums and the files that they are of.
#[derive(Debug)]
pub(crate) struct Manifest {
    entries: Vec<Entry>,
    files: Arc<Files>,
    warnings: Vec<String>,
}

impl Manifest {
    /// Parses the text of a manifest.
    pub(crate) fn parse(text: &[u8], files: Arc<Files>) -> Self {
        let mut entries = Vec::new();
        let mut warnings = Vec::new();
        let text = String::from_utf8_lossy(text);
        for (number, line) in text.split(['\n', '\r']).map(str::trim).enumerate().take(MAX_LINES) {
            if line.is_empty() {
                continue;
            }
            match Entry::parse(line) {
                Some(entry) => entries.push(entry),
                None => warnings
                    .push(format!("manifest line {} is not understood", number.saturating_add(1))),
            }
        }
        Self { entries, files, warnings }
    }

    /// Compares all files, with memory for one piece of a megabyte.
    pub(crate) fn verify(
        &self,
        progress: &dyn Fn(u64, u64),
        cancelled: &AtomicBool,
    ) -> Result<Vec<String>> {
        let mut warnings = self.warnings.clone();
        let mut found = Vec::new();
        for entry in &self.entries {
            match self.files.open(&entry.name) {
                Ok(file) => found.push((entry, file)),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    warnings.push(format!("file {:?} of the manifest does not exist", entry.name));
                }
                Err(error) => return Err(error),
            }
        }
        let total = found.iter().fold(0_u64, |all, (_, file)| all.saturating_add(file.size()));
        let mut done = 0_u64;
        for (entry, file) in found {
            let mut hash = entry.algorithm.hash();
            let mut at = 0_u64;
            let mut piece = vec![0; usize::try_from(PIECE.min(file.size())).unwrap_or(0)];
            while at < file.size() {
                if cancelled.load(Ordering::Relaxed) {
                    return Err(Error::new(ErrorKind::Cancelled, "verification was cancelled"));
                }
                let len = file.size().saturating_sub(at).min(PIECE);
                let part = piece.get_mut(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
                file.read_at(part, at).map_err(|error| {
                    Error::disk(format!("cannot verify {:?}", entry.name), error)
                })?;
                hash.update(part);
                at = at.saturating_add(len);
                done = done.saturating_add(len);
                progress(done, total);
            }
            let digest = hex(&hash.finalize());
            if digest != entry.digest {
                return Err(Error::new(
                    ErrorKind::Mismatch,
                    format!(
                        "{:?} of {:?} is {digest}, the manifest says {}",
                        entry.algorithm, entry.name, entry.digest
                    ),
                ));
            }
        }
        Ok(warnings)
    }
}

impl Entry {
    fn parse(line: &str) -> Option<Self> {
        let (algorithm, rest) = line.split_once('(')?;
        let (name, digest) = rest.rsplit_once('=')?;
        let name = name.trim_end().strip_suffix(')')?.trim();
        let algorithm = match algorithm.trim().to_ascii_uppercase().as_str() {
            "SHA1" | "SHA-1" => Algorithm::Sha1,
            "SHA256" | "SHA-256" => Algorithm::Sha256,
            "SHA512" | "SHA-512" => Algorithm::Sha512,
            _ => return None,
        };
        let digest = digest.trim().to_ascii_lowercase();
        let whole = digest.len() == algorithm.digits()
            && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        (whole && !name.is_empty()).then(|| Self { algorithm, name: name.to_owned(), digest })
    }
}

impl Algorithm {
    fn digits(self) -> usize {
        match self {
            Self::Sha1 => 40,
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }

    fn hash(self) -> Box<dyn DynDigest> {
        match self {
            Self::Sha1 => Box::new(Sha1::default()),
            Self::Sha256 => Box::new(Sha256::default()),
            Self::Sha512 => Box::new(Sha512::default()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("a string takes everything");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spacing_is_free_and_rubbish_is_not_an_entry() {
        let digest = "AB".repeat(20);
        for line in [
            format!("SHA1(a b.vmdk)= {digest}"),
            format!("sha1 ( a b.vmdk ) ={digest}"),
            format!("SHA-1(a b.vmdk)  =   {digest}"),
        ] {
            let entry = Entry::parse(&line).unwrap();
            assert_eq!((entry.name.as_str(), entry.digest), ("a b.vmdk", digest.to_lowercase()));
        }
        for line in ["", "x", "MD5(a)= 00", "SHA1(a)= 00", "SHA1()= ", "SHA256 a = b"] {
            assert_eq!(Entry::parse(line), None, "{line}");
        }
    }
}
