// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tells people and programs how the work goes.

mod channel;
mod events;
mod human;

pub(crate) use channel::Channel;

use crate::args::MachineReadable;
use crate::failure::Failure;
use crate::personality::Personality;
use events::Events;
use human::{Human, Lines};
use tranship_convert::{Event, Reporter};

/// Passes every event to people and, where asked for, to programs.
#[derive(Debug)]
pub(crate) struct Reports {
    human: Human,
    events: Option<Events>,
    /// Standard error carries events and nothing else.
    errors_in_events: bool,
}

/// Whether an event counts steps instead of bytes: each of them is news.
fn counts_steps(event: &Event) -> bool {
    event.name.rsplit('.').next() == Some("step")
}

/// What a command line says about reports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wishes<'a> {
    /// virt-v2v's messages belong on standard output, all others on standard error.
    pub(crate) personality: Personality,
    /// Where events go.
    pub(crate) machine_readable: Option<&'a MachineReadable>,
    /// Warnings and errors only.
    pub(crate) quiet: bool,
    /// Colours even where no terminal is.
    pub(crate) colors: bool,
    /// Standard output carries the result of `--json`.
    pub(crate) json: bool,
}

impl Reports {
    /// Opens the channel for events, if there is one.
    pub(crate) fn open(wishes: Wishes<'_>) -> Result<Self, Failure> {
        let channel = match wishes.machine_readable {
            Some(MachineReadable::Events(channel)) => Some(channel),
            _ => None,
        };
        // A stream that carries JSON carries nothing else.
        let stdout_taken = wishes.json || channel == Some(&Channel::Stdout);
        let stderr_taken = channel == Some(&Channel::Stderr);
        let lines = match wishes.personality {
            Personality::VirtV2v if !stdout_taken => Lines::Stdout,
            _ if !stderr_taken => Lines::Stderr,
            _ => Lines::Nowhere,
        };
        let plain = wishes.machine_readable == Some(&MachineReadable::Plain) && !stdout_taken;
        Ok(Self {
            human: Human::new(wishes.personality.program(), lines)
                .quiet(wishes.quiet)
                .colours(wishes.colors)
                .fractions(plain),
            events: channel.map(Channel::open).transpose()?.map(Events::new),
            errors_in_events: stderr_taken,
        })
    }

    /// Ends the reports with the outcome, and passes it on as the exit code.
    pub(crate) fn finish(&self, outcome: Result<(), Failure>) -> Result<u8, Failure> {
        self.human.finish();
        if let Some(events) = &self.events {
            events.finished(outcome.as_ref().err());
        }
        match outcome {
            Ok(()) => Ok(0),
            Err(failure) if self.errors_in_events => Err(failure.already_shown()),
            Err(failure) => Err(failure),
        }
    }
}

impl Reporter for Reports {
    fn report(&self, event: &Event) {
        self.human.report(event);
        if let Some(events) = &self.events {
            events.report(event);
        }
    }
}
