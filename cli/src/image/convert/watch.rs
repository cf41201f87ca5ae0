// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is done with what the copy engine tells.

use super::plan::HASH_CHUNK;
use super::resume::State;
use crate::failure::Failure;
use crate::image::console::{Console, Progress};
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tranship_appliance::CancelToken;
use tranship_block::{
    Copied, CopyObserver, Error, HashedChunk, ManifestReader, ManifestWriter, Span,
};

/// Damaged ranges that are listed.
const MOST_LISTED: usize = 100;

/// Shows how far a copy is, keeps its hashes and its checkpoints.
pub(super) struct Watch<'a> {
    progress: &'a Progress,
    cancel: &'a CancelToken,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    manifest: Option<(PathBuf, ManifestWriter<BufWriter<File>>)>,
    state: Option<State>,
    unreadable: Vec<String>,
    /// What went wrong here; the copy ends then.
    failure: Option<Failure>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(
        progress: &'a Progress,
        cancel: &'a CancelToken,
        hash: Option<&Path>,
        size: u64,
        state: Option<State>,
    ) -> Result<Self, Failure> {
        let manifest = match hash {
            None => None,
            Some(path) => {
                let start = state.as_ref().map_or(0, State::start);
                Some((path.to_owned(), manifest(path, size, start)?))
            }
        };
        let kept = Kept { manifest, state, ..Kept::default() };
        Ok(Self { progress, cancel, kept: Mutex::new(kept) })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What went wrong here and ended the copy.
    pub(super) fn failure(&self) -> Option<Failure> {
        self.kept().failure.take()
    }

    /// The copy is complete.
    pub(super) fn finish(&self, copied: Copied, console: Console) -> Result<(), Failure> {
        let mut kept = self.kept();
        if let Some(failure) = kept.failure.take() {
            return Err(failure);
        }
        if let Some((path, writer)) = kept.manifest.take() {
            let named = |error| Failure::io(&format!("writing {}", path.display()), &error);
            let (out, _) = writer.finish()?;
            out.into_inner()
                .map_err(|error| named(error.into_error()))?
                .sync_data()
                .map_err(named)?;
            std::fs::rename(part_of(&path), &path).map_err(named)?;
        }
        for text in &kept.unreadable {
            console.warn(text);
        }
        if copied.bytes_unreadable > 0 {
            console.warn(&format!(
                "{} bytes of the source could not be read and are zero in the target",
                copied.bytes_unreadable
            ));
        }
        Ok(())
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let mut kept = self.kept();
        if let (Some((path, _)), None) = (kept.manifest.take(), &kept.state) {
            let _ = std::fs::remove_file(part_of(&path));
        }
    }
}

/// A manifest for the file `path`; with those hashes of an earlier try that are of bytes
/// below `start`.
fn manifest(
    path: &Path,
    size: u64,
    start: u64,
) -> Result<ManifestWriter<BufWriter<File>>, Failure> {
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

/// Where a manifest is until it is complete.
fn part_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    path.with_file_name(name)
}

impl CopyObserver for Watch<'_> {
    fn progress(&self, done: u64, total: u64) {
        self.progress.set(done, total);
    }

    fn checkpoint(&self, offset: u64) {
        let mut kept = self.kept();
        // Hashes of what is below the checkpoint have to be there before it counts.
        let flushed = kept.manifest.as_mut().map_or(Ok(()), |(_, writer)| writer.flush());
        let failure = match flushed {
            Err(error) => Some(error.into()),
            Ok(()) => kept
                .state
                .as_mut()
                .and_then(|state| state.reached(offset).err())
                .map(|error| Failure::io("writing down how far the copy is", &error)),
        };
        if let Some(failure) = failure {
            kept.failure.get_or_insert(failure);
        }
    }

    fn hashed(&self, chunk: HashedChunk) {
        let mut kept = self.kept();
        let pushed = kept.manifest.as_mut().map_or(Ok(()), |(_, writer)| writer.push(&chunk));
        if let Err(error) = pushed {
            kept.failure.get_or_insert(error.into());
        }
    }

    fn unreadable(&self, span: Span, error: &Error) {
        let mut kept = self.kept();
        if kept.unreadable.len() < MOST_LISTED {
            kept.unreadable.push(format!(
                "{} bytes at offset {} cannot be read: {error}",
                span.len, span.start
            ));
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled() || self.kept().failure.is_some()
    }
}
