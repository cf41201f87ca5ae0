// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log on standard error: quiet unless asked for.

use crate::args::Talk;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Starts the log; `TRANSHIP_LOG` says more precisely what `-v` and `-x` say in short.
pub(crate) fn start(talk: &Talk) {
    let level = match (talk.verbose, talk.trace) {
        (_, true) => "warn,tranship=trace",
        (true, false) => "warn,tranship=debug",
        (false, false) => "off",
    };
    let filter = EnvFilter::try_from_env("TRANSHIP_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    // A second start, in a test, keeps the first one's settings.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}
