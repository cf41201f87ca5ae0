// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What ends a server: a signal, its last client, or the command that it was started for.

use super::command::{self, Running};
use super::listening::Serving;
use super::statistics::Because;
use crate::failure::Failure;
use crate::stdout;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::io;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

/// The longest time for which a client that has left is not noticed.
const TICK: Duration = Duration::from_millis(100);

/// Why the server is not needed any more.
#[derive(Debug)]
pub(super) enum Ended {
    /// Somebody said so, or everybody has left.
    Served,
    /// The command has ended with this code.
    Command(u8),
}

enum Event {
    Signal(i32),
    /// The last client has left.
    Left,
    Command(io::Result<ExitStatus>),
}

/// What happens around the server.
#[derive(Debug)]
pub(super) struct Watch {
    sender: Sender<Event>,
    events: Receiver<Event>,
}

impl Watch {
    /// Takes signals from now on.
    pub(super) fn start() -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::io("listening for signals", &error);
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1]).map_err(failed)?;
        let (sender, events) = channel();
        let own = sender.clone();
        let listen = move || {
            let mut is_ending = false;
            for signal in signals.forever() {
                if signal != SIGUSR1 {
                    // The first one lets requests end and flushes; the second one does not.
                    if std::mem::replace(&mut is_ending, true) {
                        std::process::exit(128 + signal);
                    }
                }
                if own.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("signals".to_owned()).spawn(listen).map_err(failed)?;
        Ok(Self { sender, events })
    }

    /// Waits for the end; `tell` says what clients did so far.
    pub(super) fn wait(
        &mut self,
        serving: &Serving,
        is_persistent: bool,
        command: Option<Running>,
        tell: &dyn Fn(Because) -> Result<(), Failure>,
    ) -> Result<Ended, Failure> {
        let stop_command = command.as_ref().map(Running::stopper);
        if let Some(mut running) = command {
            let sender = self.sender.clone();
            let wait = move || {
                // Nobody waits for it any more if this fails.
                let _ = sender.send(Event::Command(running.child.wait()));
            };
            thread::Builder::new()
                .name("command".to_owned())
                .spawn(wait)
                .map_err(|error| Failure::io("waiting for the command of --run", &error))?;
        }
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            if !is_persistent {
                let sender = self.sender.clone();
                let is_over = &is_over;
                scope.spawn(move || {
                    while !is_over.load(Ordering::Relaxed) {
                        if serving.negotiated() > 0 && serving.connections() == 0 {
                            let _ = sender.send(Event::Left);
                            return;
                        }
                        serving.wait(TICK);
                    }
                });
            }
            let ended = self.end(stop_command.as_ref(), tell);
            is_over.store(true, Ordering::Relaxed);
            ended
        })
    }

    fn end(
        &self,
        stop_command: Option<&impl Fn()>,
        tell: &dyn Fn(Because) -> Result<(), Failure>,
    ) -> Result<Ended, Failure> {
        loop {
            // This holds a sender itself, so there is always somebody who could send.
            let Ok(event) = self.events.recv() else { return Ok(Ended::Served) };
            match event {
                Event::Signal(SIGUSR1) => {
                    if let Err(failure) = tell(Because::OfASignal) {
                        stdout::complain(failure.render("tranship").trim_end());
                    }
                }
                Event::Signal(_) => match stop_command {
                    // It has its own way to end, and then this ends with it.
                    Some(stop) => stop(),
                    None => return Ok(Ended::Served),
                },
                Event::Left => return Ok(Ended::Served),
                Event::Command(status) => {
                    let status = status
                        .map_err(|error| Failure::io("waiting for the command of --run", &error))?;
                    return Ok(Ended::Command(command::code_of(status)));
                }
            }
        }
    }
}
