// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is done with what the copy engine tells.

use super::how::HASH_CHUNK;
use super::journal::Journal;
use super::progress::Progress;
use crate::failure::Failure;
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tranship_appliance::CancelToken;
use tranship_block::{CopyObserver, HashedChunk, ManifestReader, ManifestSummary, ManifestWriter};

/// Shows how far a copy is, keeps its hashes and its checkpoints.
#[derive(Debug)]
pub(super) struct Watch<'a> {
    progress: &'a Progress,
    cancel: &'a CancelToken,
    /// Bytes in all, if that is known.
    total: Option<u64>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    manifest: Option<Manifest>,
    journal: Option<Journal>,
    /// Everything below this is on stable storage.
    reached: u64,
    /// Hashes of chunks below this number are written down.
    hashed: u64,
    /// What went wrong here; the copy ends then.
    failure: Option<Failure>,
}

/// Where hashes go.
#[derive(Debug)]
enum Manifest {
    /// To the file, as they come.
    Written { path: PathBuf, writer: ManifestWriter<BufWriter<File>> },
    /// Nobody knows the disk's size, which a manifest begins with.
    Collected { path: PathBuf, chunks: Vec<HashedChunk> },
}

impl<'a> Watch<'a> {
    /// For a copy of `total` bytes, from where `journal` says on, with hashes to `hash`.
    pub(super) fn new(
        (progress, cancel): (&'a Progress, &'a CancelToken),
        total: Option<u64>,
        hash: Option<&Path>,
        journal: Option<Journal>,
    ) -> Result<Self, Failure> {
        let manifest = match (hash, total) {
            (None, _) => None,
            (Some(path), None) => {
                Some(Manifest::Collected { path: path.to_owned(), chunks: Vec::new() })
            }
            (Some(path), Some(size)) => {
                let start = journal.as_ref().map_or(0, Journal::start);
                let writer = begun(path, size, start)?;
                Some(Manifest::Written { path: path.to_owned(), writer })
            }
        };
        let reached = journal.as_ref().map_or(0, Journal::start);
        let kept = Kept { manifest, journal, reached, hashed: 0, failure: None };
        Ok(Self { progress, cancel, total, kept: Mutex::new(kept) })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What went wrong here and ended the copy.
    pub(super) fn failure(&self) -> Option<Failure> {
        self.kept().failure.take()
    }

    /// Everything below this byte is on stable storage.
    pub(super) fn reached(&self) -> u64 {
        self.kept().reached
    }

    /// The copy of a disk of `size` bytes is complete: gives the manifest its name, and
    /// forgets how far the copy was.
    pub(super) fn finish(&self, size: u64) -> Result<Option<ManifestSummary>, Failure> {
        let mut kept = self.kept();
        if let Some(failure) = kept.failure.take() {
            return Err(failure);
        }
        let summary = match kept.manifest.take() {
            None => None,
            Some(Manifest::Written { path, writer }) => Some(complete(&path, writer)?),
            Some(Manifest::Collected { path, chunks }) => {
                let mut writer = begun(&path, size, 0)?;
                chunks.iter().try_for_each(|chunk| writer.push(chunk))?;
                Some(complete(&path, writer)?)
            }
        };
        if let Some(journal) = kept.journal.take() {
            journal.close();
        }
        Ok(summary)
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let mut kept = self.kept();
        if let (Some(Manifest::Written { path, .. }), None) = (kept.manifest.take(), &kept.journal)
        {
            let _ = std::fs::remove_file(part_of(&path));
        }
    }
}

/// A manifest for the file `path`; with those hashes of an earlier try that are of bytes
/// below `start`.
fn begun(path: &Path, size: u64, start: u64) -> Result<ManifestWriter<BufWriter<File>>, Failure> {
    let part = part_of(path);
    let named = |error| Failure::io(&format!("creating {}", part.display()), &error);
    let earlier = part.with_extension("earlier");
    if start > 0 {
        std::fs::rename(&part, &earlier).map_err(named)?;
    }
    let out = BufWriter::new(File::create(&part).map_err(named)?);
    if start == 0 {
        return Ok(ManifestWriter::new(out, HASH_CHUNK, size)?);
    }
    let reader = ManifestReader::new(BufReader::new(File::open(&earlier).map_err(named)?))?;
    let writer = ManifestWriter::resume(out, reader, HASH_CHUNK, size, start)?;
    std::fs::remove_file(&earlier).map_err(named)?;
    Ok(writer)
}

/// Writes the last line of a manifest, which has its name then.
fn complete(
    path: &Path,
    writer: ManifestWriter<BufWriter<File>>,
) -> Result<ManifestSummary, Failure> {
    let named = |error| Failure::io(&format!("writing {}", path.display()), &error);
    let (out, summary) = writer.finish()?;
    out.into_inner().map_err(|error| named(error.into_error()))?.sync_data().map_err(named)?;
    std::fs::rename(part_of(path), path).map_err(named)?;
    Ok(summary)
}

/// Where a manifest is until it is complete.
pub(super) fn part_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    path.with_file_name(name)
}

impl CopyObserver for Watch<'_> {
    fn progress(&self, done: u64, _total: u64) {
        self.progress.set(done, self.total);
    }

    fn checkpoint(&self, offset: u64) {
        let mut kept = self.kept();
        kept.reached = offset;
        // Hashes of what is below the checkpoint have to be there before it counts.
        let flushed = match &mut kept.manifest {
            Some(Manifest::Written { writer, .. }) => writer.flush(),
            _ => Ok(()),
        };
        let failure = match flushed {
            Err(error) => Some(error.into()),
            Ok(()) => kept
                .journal
                .as_mut()
                .and_then(|journal| journal.reached(offset).err())
                .map(|error| Failure::io("writing down how far the copy is", &error)),
        };
        if let Some(failure) = failure {
            kept.failure.get_or_insert(failure);
        }
    }

    fn hashed(&self, chunk: HashedChunk) {
        let mut kept = self.kept();
        if chunk.index < kept.hashed {
            // Copied once more, after the first copy was lost.
            return;
        }
        kept.hashed = chunk.index.saturating_add(1);
        let pushed = match &mut kept.manifest {
            Some(Manifest::Written { writer, .. }) => writer.push(&chunk),
            Some(Manifest::Collected { chunks, .. }) => {
                chunks.push(chunk);
                Ok(())
            }
            None => Ok(()),
        };
        if let Err(error) = pushed {
            kept.failure.get_or_insert(error.into());
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled() || self.kept().failure.is_some()
    }
}
