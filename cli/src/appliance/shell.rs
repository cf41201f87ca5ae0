// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `appliance shell`: commands for the appliance itself, to see what is wrong in it.
//!
//! Every line is run by the appliance's own `sh`. Lines share a working directory and
//! nothing else.

use super::telling;
use crate::args::ApplianceShellArgs;
use crate::disk::{self, Use};
use crate::failure::Failure;
use crate::{logging, places, signals, stdout};
use std::io::{BufRead, IsTerminal, Write};
use tranship_appliance::{CancelToken, Guest};
use tranship_block::Meter;

/// Goes to where the last line left off, runs the line, and remembers where that led.
/// The appliance has disk programs only; busybox, if it is there, lends `ls` and the like.
const SCRIPT: &str = r#"a=/run/tranship-applets f=/run/tranship-cwd
[ -d "$a" ] || { busybox mkdir -p "$a" && busybox --install -s "$a"; } 2> /dev/null
PATH=$PATH:$a
[ -f "$f" ] && IFS= read -r d < "$f" && cd "$d"
eval "$1"
s=$?
pwd > "$f"
exit $s"#;

/// Runs the command.
pub(super) fn run(options: &ApplianceShellArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let mut guest = Guest::new(places::settings(&options.machine)).with_cancel(cancel.clone());
    for path in &options.add {
        guest.add_drive(disk::open(path, None, Use::Read, &Meter::default())?.drive)?;
    }
    guest.launch(&places::boot(&telling())?)?;
    let input = std::io::stdin();
    let interactive = input.is_terminal();
    let mut status = 0;
    loop {
        if interactive {
            let mut out = std::io::stdout();
            let _ = write!(out, "appliance# ").and_then(|()| out.flush());
        }
        let mut line = String::new();
        signals::at_prompt(interactive);
        let read = input.lock().read_line(&mut line);
        signals::at_prompt(false);
        let read = read.map_err(|error| Failure::io("reading standard input", &error))?;
        if read == 0 || line.trim() == "exit" {
            break;
        }
        let words = ["sh", "-c", SCRIPT, "sh", line.trim_end()];
        let mut show = |bytes: &[u8]| {
            let _ = stdout::bytes(bytes);
            Ok(())
        };
        status = guest.run(&words, false, None, None, &mut show)?.status;
    }
    guest.shutdown()?;
    Ok(u8::try_from(status).unwrap_or(1))
}
