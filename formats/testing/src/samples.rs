// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that other vendors' software has made: in the folder that `TRANSHIP_SAMPLES`
//! names, with a list in its `MANIFEST.json`.

use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::io::Read;
use std::path::{Path, PathBuf};
use tranship_block::{BlockDevice, is_zero};

/// A row of the list.
#[derive(Clone, Debug, Deserialize)]
pub struct Sample {
    /// Name of the file after unpacking, below the folder.
    pub path: String,
    /// Name of the file as it is, below the folder.
    pub file: String,
    /// `xz` if it is packed, else nothing.
    #[serde(default)]
    pub packed: String,
    /// Format's name.
    #[serde(default)]
    pub format: Option<String>,
    /// Bytes that the guest sees.
    #[serde(default)]
    pub virtual_size: Option<u64>,
    /// [`digest`] of the guest's bytes.
    #[serde(default)]
    pub content_digest: Option<String>,
    /// Neighbours that it needs, by their `path`.
    #[serde(default)]
    pub files: Vec<String>,
    /// `content`, `refuse`, `open`, `clean`, `no-leak`, `clean-info` or `info`.
    pub expect: String,
    /// What is special about it.
    #[serde(default)]
    pub note: Option<String>,
    #[serde(skip)]
    folder: PathBuf,
}

/// All samples; an empty list, and a line that says so, where there are none.
pub fn samples() -> Vec<Sample> {
    let Some(folder) = std::env::var_os("TRANSHIP_SAMPLES").map(PathBuf::from) else {
        eprintln!("skipped: TRANSHIP_SAMPLES names no folder of sample disks");
        return Vec::new();
    };
    let text = std::fs::read(folder.join("MANIFEST.json")).unwrap();
    let rows: Vec<Sample> = serde_json::from_slice(&text).unwrap();
    rows.into_iter().map(|row| Sample { folder: folder.clone(), ..row }).collect()
}

impl Sample {
    /// Puts the sample with its neighbours into `folder`, unpacked, under their own
    /// names; returns the path of the sample itself.
    pub fn unpack(&self, folder: &Path, all: &[Sample]) -> PathBuf {
        for name in &self.files {
            all.iter().find(|sample| sample.path == *name).unwrap().put(folder);
        }
        self.put(folder)
    }

    fn put(&self, folder: &Path) -> PathBuf {
        let to = folder.join(&self.path);
        if to.exists() {
            return to;
        }
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        let bytes = std::fs::read(self.folder.join(&self.file)).unwrap();
        let bytes = if self.packed.is_empty() {
            bytes
        } else {
            let mut plain = Vec::new();
            liblzma::read::XzDecoder::new(bytes.as_slice()).read_to_end(&mut plain).unwrap();
            plain
        };
        std::fs::write(&to, bytes).unwrap();
        to
    }
}

/// SHA-256 of the decimal size, and for every 64 KiB chunk that is not zero of its number,
/// a colon and its bytes. A short last chunk counts with zeroes behind it.
///
/// # Errors
///
/// What reading reports.
pub fn digest(device: &dyn BlockDevice) -> tranship_block::Result<String> {
    const CHUNK: u64 = 65_536;
    let size = device.size();
    let mut hash = Sha256::new();
    hash.update(size.to_string());
    let mut at = 0;
    let mut buf = vec![0; CHUNK as usize];
    while at < size {
        let extent = device.extent_at(at)?;
        if extent.kind.reads_zero() && at % CHUNK == 0 && extent.len >= CHUNK {
            at += extent.len / CHUNK * CHUNK;
            continue;
        }
        let len = (size - at).min(CHUNK);
        buf.fill(0);
        device.read_at(&mut buf[..len as usize], at)?;
        if !is_zero(&buf) {
            hash.update(format!("{}:", at / CHUNK));
            hash.update(&buf);
        }
        at += len;
    }
    let mut text = String::new();
    for byte in hash.finalize() {
        write!(text, "{byte:02x}").unwrap();
    }
    Ok(text)
}
