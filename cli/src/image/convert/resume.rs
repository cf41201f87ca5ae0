// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How far a copy has come, beside the unfinished image, so that it can go on.

use crate::args::image::ConvertArgs;
use crate::failure::Failure;
use crate::image::source::Source;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use tranship_formats::Staged;

/// What a copy is of, and how it was asked for: a copy goes on only with the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Asked {
    /// Path, size and time of change of every file that the sources consist of.
    files: Vec<(PathBuf, u64, i64, i64)>,
    size: u64,
    format: Option<String>,
    options: Vec<String>,
    backing: Option<String>,
    snapshot: Option<String>,
}

/// The file with what was asked for and how far it is.
#[derive(Debug)]
pub(super) struct State {
    path: PathBuf,
    asked: Asked,
    done: u64,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    asked: Asked,
    done: u64,
}

impl State {
    /// The state of a copy that is to be restartable: that of an earlier try if it was the
    /// same copy, else of a new one.
    pub(super) fn open(
        args: &ConvertArgs,
        staged: &Staged,
        sources: &[Source],
        size: u64,
    ) -> Result<Option<Self>, Failure> {
        if !args.resume {
            return Ok(None);
        }
        let path = staged.note("state").ok_or_else(|| {
            Failure::usage("--resume needs a target that is a file in a folder that can be written")
        })?;
        let mut files = Vec::new();
        for (file, _) in sources.iter().flat_map(|source| &source.opened.chain) {
            let metadata =
                file.metadata().map_err(|error| Failure::io("looking at a source", &error))?;
            files.push((file.clone(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()));
        }
        let asked = Asked {
            files,
            size,
            format: args.target_format.clone(),
            options: args.target_options.clone(),
            backing: args.backing.clone(),
            snapshot: args.source_snapshot.clone(),
        };
        let stored = std::fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Stored>(&bytes).ok());
        let done = match stored {
            Some(stored) if stored.asked == asked && staged.path().exists() => stored.done,
            _ => 0,
        };
        Ok(Some(Self { path, asked, done }))
    }

    /// The first byte that has to be copied.
    pub(super) fn start(&self) -> u64 {
        self.done
    }

    /// Everything below `done` is on the disk.
    pub(super) fn reached(&mut self, done: u64) -> std::io::Result<()> {
        self.done = done;
        let stored = Stored { asked: self.asked.clone(), done };
        let bytes = serde_json::to_vec(&stored)?;
        let next = self.path.with_extension("next");
        let mut file = File::create(&next)?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        std::fs::rename(&next, &self.path)
    }
}
