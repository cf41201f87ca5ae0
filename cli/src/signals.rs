// SPDX-License-Identifier: Apache-2.0 OR MIT
//! SIGINT and SIGTERM: the first one asks the work to stop, the second one does not ask.

use crate::failure::Failure;
use crate::stdout;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use tranship_appliance::CancelToken;

static RECEIVED: AtomicI32 = AtomicI32::new(0);

/// Set while a prompt waits: then an interrupt has nothing to stop.
static AT_PROMPT: AtomicBool = AtomicBool::new(false);

/// Cancels `token` on the first signal and ends the process on the second.
pub(crate) fn cancel_on_signal(token: CancelToken) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGINT, SIGTERM])
        .map_err(|error| Failure::io("listening for signals", &error))?;
    let listen = move || {
        for signal in signals.forever() {
            if signal == SIGINT && AT_PROMPT.load(Ordering::SeqCst) {
                stdout::complain("\nuse quit or end of input to leave");
                continue;
            }
            if RECEIVED.swap(signal, Ordering::SeqCst) != 0 {
                std::process::exit(128 + signal);
            }
            token.cancel();
            stdout::complain("stopping in order; a second signal stops at once");
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(listen)
        .map(|_| ())
        .map_err(|error| Failure::io("listening for signals", &error))
}

/// 128 + the signal that came, if one did.
pub(crate) fn exit_code() -> Option<u8> {
    match RECEIVED.load(Ordering::SeqCst) {
        0 => None,
        signal => u8::try_from(128 + signal).ok(),
    }
}

/// Says whether a prompt waits for input now.
pub(crate) fn at_prompt(waiting: bool) {
    AT_PROMPT.store(waiting, Ordering::SeqCst);
}
