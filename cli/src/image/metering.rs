// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--limit-rate` and `--statistics`, for every command that opens disks.

use super::sizes::{self, SizeError};
use crate::args::MeteringArgs;
use crate::failure::Failure;
use crate::stdout;
use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use tranship_block::{Copied, Meter, Rate};

/// The meter of a command's disks, and what is told in the end.
#[derive(Debug)]
pub(crate) struct Metering {
    meter: Meter,
    out: Option<Out>,
    begun: Instant,
    copied: Mutex<Option<Copied>>,
}

#[derive(Debug)]
enum Out {
    /// Standard output has the results.
    StandardError,
    File(PathBuf, File),
}

impl Metering {
    /// Checks the options; nobody works for hours to find out that there is no room for
    /// what was counted.
    pub(crate) fn start(args: &MeteringArgs) -> Result<Self, Failure> {
        let rate = args.limit_rate.as_deref().map(rate).transpose()?.flatten();
        let out = match &args.statistics {
            None => None,
            Some(path) if path.as_os_str() == "-" => Some(Out::StandardError),
            Some(path) => {
                let file =
                    File::options().write(true).create(true).truncate(false).open(path).map_err(
                        |error| Failure::io(&format!("creating {}", path.display()), &error),
                    )?;
                Some(Out::File(path.clone(), file))
            }
        };
        Ok(Self {
            meter: Meter::new(rate, out.is_some()),
            out,
            begun: Instant::now(),
            copied: Mutex::default(),
        })
    }

    /// For those who open disks.
    pub(crate) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Notes what a copy did.
    pub(crate) fn note_copy(&self, copied: Copied) {
        *self.copied.lock().unwrap_or_else(PoisonError::into_inner) = Some(copied);
    }

    /// Tells what was counted, whether the command did what it was to do or not.
    pub(crate) fn finish(self, command: &str) -> Result<(), Failure> {
        let Some(out) = self.out else { return Ok(()) };
        let copied = self.copied.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut told = serde_json::json!({
            "command": command,
            "seconds": self.begun.elapsed().as_secs_f64(),
            "disks": self.meter.statistics(),
        });
        if let Some(copied) = copied {
            told["copied"] = serde_json::json!({
                "bytes_read": copied.bytes_read,
                "bytes_written": copied.bytes_written,
                "bytes_zero": copied.bytes_zero,
                "bytes_offloaded": copied.bytes_offloaded,
                "bytes_skipped": copied.bytes_skipped,
                "bytes_unreadable": copied.bytes_unreadable,
            });
        }
        let text = format!("{told:#}");
        match out {
            Out::StandardError => stdout::complain(&text),
            Out::File(path, mut file) => {
                let failed = |error| Failure::io(&format!("writing {}", path.display()), &error);
                // What is no file has no end that could be moved.
                if file.metadata().map_err(failed)?.is_file() {
                    file.set_len(0).map_err(failed)?;
                }
                writeln!(file, "{text}").map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// Bytes per second; 0 is no limit.
fn rate(text: &str) -> Result<Option<Rate>, Failure> {
    match sizes::parse(text) {
        Ok(rate) => {
            Ok(NonZeroU64::new(rate).map(|bytes| Rate { bytes: Some(bytes), operations: None }))
        }
        Err(SizeError::Invalid) => {
            Err(Failure::usage(format!("Invalid rate limit specified: '{text}'.")))
        }
        Err(SizeError::OutOfRange) => Err(Failure::usage(format!(
            "Invalid rate limit specified. Must be between 0 and {}.",
            i64::MAX
        ))),
    }
}
