// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What clients did with the exports, and what their disks had to do for it.

use super::listening::Serving;
use crate::failure::Failure;
use crate::stdout;
use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tranship_block::Meter;

/// Why something is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Because {
    /// The server ends.
    TheEnd,
    /// SIGUSR1 came.
    OfASignal,
}

/// Where statistics go.
#[derive(Debug)]
pub(super) struct Telling {
    begun: Instant,
    out: Out,
}

#[derive(Debug)]
enum Out {
    /// Nobody asked in advance.
    OnlyIfAsked,
    StandardError,
    File(PathBuf, File),
}

impl Telling {
    /// Opens the file before there is work whose account could be lost.
    pub(super) fn start(path: Option<&Path>) -> Result<Self, Failure> {
        let out = match path {
            None => Out::OnlyIfAsked,
            Some(path) if path.as_os_str() == "-" => Out::StandardError,
            Some(path) => {
                let file =
                    File::options().write(true).create(true).truncate(false).open(path).map_err(
                        |error| Failure::io(&format!("creating {}", path.display()), &error),
                    )?;
                Out::File(path.to_owned(), file)
            }
        };
        Ok(Self { begun: Instant::now(), out })
    }

    /// Tells what was counted until now.
    pub(super) fn tell(
        &self,
        serving: &Serving,
        meter: &Meter,
        because: Because,
    ) -> Result<(), Failure> {
        if because == Because::TheEnd && matches!(self.out, Out::OnlyIfAsked) {
            return Ok(());
        }
        let told = serde_json::json!({
            "command": "serve",
            "seconds": self.begun.elapsed().as_secs_f64(),
            "exports": serving.statistics(),
            "disks": meter.statistics(),
        });
        let text = format!("{told:#}");
        match &self.out {
            Out::OnlyIfAsked | Out::StandardError => stdout::complain(&text),
            Out::File(path, file) => {
                let failed = |error| Failure::io(&format!("writing {}", path.display()), &error);
                let mut file: &File = file;
                // What is no file has no start to go back to.
                if file.metadata().map_err(failed)?.is_file() {
                    file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
                }
                writeln!(file, "{text}").map_err(failed)?;
            }
        }
        Ok(())
    }
}
