// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The text form of a manifest, read and written line by line.

use super::{Digest, HashedChunk, check_chunk};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::io::{BufRead, Read, Write};

/// The one version there is.
const VERSION: u32 = 1;

/// The one algorithm there is.
const ALGORITHM: &str = "sha256";

/// Longest line that is read; ours have less than 120 bytes.
const LONGEST_LINE: u64 = 4096;

/// The first line of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestHeader {
    /// Version of the manifest's form: 1.
    #[serde(rename = "tranship-manifest")]
    pub version: u32,
    /// What the hashes are: `sha256`.
    pub algorithm: String,
    /// Bytes of a chunk, a power of two.
    pub chunk: u64,
    /// Virtual size of the disk in bytes.
    pub size: u64,
}

impl ManifestHeader {
    /// Chunks that the disk has.
    pub fn chunks(&self) -> u64 {
        self.size.div_ceil(self.chunk.max(1))
    }

    fn check(&self) -> Result<()> {
        if self.version != VERSION {
            return Err(Error::unsupported(format!(
                "manifest has version {}, expected {VERSION}",
                self.version
            )));
        }
        if self.algorithm != ALGORITHM {
            return Err(Error::unsupported(format!(
                "manifest has hashes of algorithm {:?}, expected {ALGORITHM:?}",
                self.algorithm
            )));
        }
        check_chunk(self.chunk)
    }
}

/// The last line of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestSummary {
    /// How many chunks are listed: those that are not all zero.
    pub chunks: u64,
    /// Digest of the whole disk: equal for equal disks and chunk sizes.
    pub digest: Digest,
}

/// What is hashed of the rows.
#[derive(Clone, Debug)]
struct Whole {
    hash: Sha256,
    chunks: u64,
    next: u64,
}

impl Whole {
    fn new(header: &ManifestHeader) -> Self {
        let mut hash = Sha256::new();
        hash.update(header.chunk.to_le_bytes());
        hash.update(header.size.to_le_bytes());
        Self { hash, chunks: 0, next: 0 }
    }

    fn add(&mut self, header: &ManifestHeader, row: &HashedChunk) -> Result<()> {
        if row.index < self.next || row.index >= header.chunks() {
            return Err(Error::corrupt(format!(
                "manifest lists chunk {}, expected one from {} to below {}",
                row.index,
                self.next,
                header.chunks()
            )));
        }
        self.hash.update(row.index.to_le_bytes());
        self.hash.update(row.digest.0);
        self.chunks = self.chunks.saturating_add(1);
        self.next = row.index.saturating_add(1);
        Ok(())
    }

    fn summary(&self) -> ManifestSummary {
        let digest = Digest(self.hash.clone().finalize().into());
        ManifestSummary { chunks: self.chunks, digest }
    }
}

/// Writes a manifest while its chunks become known.
#[derive(Debug)]
pub struct ManifestWriter<W> {
    out: W,
    header: ManifestHeader,
    whole: Whole,
}

impl<W: Write> ManifestWriter<W> {
    /// Begins the manifest of a disk of `size` bytes in chunks of `chunk` bytes.
    ///
    /// # Errors
    ///
    /// A chunk size that is no power of two from 4 KiB to 16 MiB; what `out` reports.
    pub fn new(out: W, chunk: u64, size: u64) -> Result<Self> {
        let header =
            ManifestHeader { version: VERSION, algorithm: ALGORITHM.to_owned(), chunk, size };
        header.check()?;
        let whole = Whole::new(&header);
        let mut writer = Self { out, header, whole };
        let header = writer.header.clone();
        writer.line(&header)?;
        Ok(writer)
    }

    /// Goes on with the manifest of an interrupted copy, of which everything below byte
    /// `start` is kept. A last line that was cut short does no harm.
    ///
    /// # Errors
    ///
    /// What `earlier` and `out` report; [`crate::ErrorKind::Corrupt`] for an `earlier`
    /// manifest that is not of a disk of `size` bytes in chunks of `chunk`.
    pub fn resume(
        out: W,
        mut earlier: ManifestReader<impl BufRead>,
        chunk: u64,
        size: u64,
        start: u64,
    ) -> Result<Self> {
        let header = earlier.header();
        if (header.chunk, header.size) != (chunk, size) {
            return Err(Error::corrupt(format!(
                "manifest is of {} bytes in chunks of {}, expected {size} in chunks of {chunk}",
                header.size, header.chunk
            )));
        }
        let mut writer = Self::new(out, chunk, size)?;
        let keep = start.checked_div(chunk).unwrap_or(0);
        // What comes behind the checkpoint, or ends in the middle, is made again.
        while let Some(row) = earlier.row()?.filter(|row| row.index < keep) {
            writer.push(&row)?;
        }
        Ok(writer)
    }

    /// Adds a chunk; chunks ascend.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Corrupt`] for a chunk out of order or past the disk's end; what
    /// the writer reports.
    pub fn push(&mut self, row: &HashedChunk) -> Result<()> {
        self.whole.add(&self.header, row)?;
        self.line(row)
    }

    /// Passes on what was written so far.
    ///
    /// # Errors
    ///
    /// What the writer reports.
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().map_err(|error| Error::io("cannot write the manifest", error))
    }

    /// Writes the last line.
    ///
    /// # Errors
    ///
    /// What the writer reports.
    pub fn finish(mut self) -> Result<(W, ManifestSummary)> {
        let summary = self.whole.summary();
        self.line(&summary)?;
        self.flush()?;
        Ok((self.out, summary))
    }

    fn line(&mut self, line: &impl Serialize) -> Result<()> {
        serde_json::to_writer(&mut self.out, line)
            .map_err(std::io::Error::from)
            .and_then(|()| self.out.write_all(b"\n"))
            .map_err(|error| Error::io("cannot write the manifest", error))
    }
}

/// Reads a manifest row by row.
#[derive(Debug)]
pub struct ManifestReader<R> {
    input: R,
    header: ManifestHeader,
    whole: Whole,
    /// The last line that was there.
    last: Option<ManifestSummary>,
    line: u64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Row(HashedChunk),
    Summary(ManifestSummary),
}

impl<R: BufRead> ManifestReader<R> {
    /// Reads the first line.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Corrupt`] if it is no manifest,
    /// [`crate::ErrorKind::Unsupported`] for another version or algorithm; I/O errors.
    pub fn new(mut input: R) -> Result<Self> {
        let text = next_line(&mut input)?.unwrap_or_default();
        let header: ManifestHeader = serde_json::from_slice(&text)
            .map_err(|error| Error::corrupt("is not a manifest").because(error))?;
        header.check()?;
        let whole = Whole::new(&header);
        Ok(Self { input, header, whole, last: None, line: 1 })
    }

    /// What the first line says.
    pub fn header(&self) -> &ManifestHeader {
        &self.header
    }

    /// What the last line says, once [`Self::row`] has returned `None`; `None` then is a
    /// manifest without one, of an interrupted copy.
    pub fn summary(&self) -> Option<ManifestSummary> {
        self.last
    }

    /// The next row; `None` after the last one.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Corrupt`] for anything that is no row, rows out of order, and
    /// a digest of the whole that is not that of the rows; I/O errors.
    pub fn row(&mut self) -> Result<Option<HashedChunk>> {
        if self.last.is_some() {
            return Ok(None);
        }
        let Some(text) = next_line(&mut self.input)? else { return Ok(None) };
        self.line = self.line.saturating_add(1);
        let parsed = match serde_json::from_slice(&text) {
            Ok(parsed) => parsed,
            // The end of what an interrupted copy wrote.
            Err(_) if text.last() != Some(&b'\n') => return Ok(None),
            Err(error) => {
                let text = format!("line {} of the manifest is not a chunk", self.line);
                return Err(Error::corrupt(text).because(error));
            }
        };
        match parsed {
            Line::Row(row) => self.whole.add(&self.header, &row).map(|()| Some(row)),
            Line::Summary(summary) if summary == self.whole.summary() => {
                self.last = Some(summary);
                Ok(None)
            }
            Line::Summary(_) => {
                Err(Error::corrupt("manifest's rows do not have the digest of its last line"))
            }
        }
    }
}

fn next_line(input: &mut impl BufRead) -> Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    input
        .take(LONGEST_LINE)
        .read_until(b'\n', &mut line)
        .map_err(|error| Error::io("cannot read the manifest", error))?;
    Ok(Some(line).filter(|line| !line.is_empty()))
}
