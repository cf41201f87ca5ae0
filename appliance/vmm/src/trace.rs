// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the machine's process tells the parent that traces.
//!
//! Events go to standard error, a line each, as a JSON text sequence (RFC 7464): the record
//! separator tells them from last words. The guest's console is standard output, so that a
//! guest cannot make any. Only `write` and `clock_gettime` are needed, which every thread may
//! call however confined it is.

use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::io::Write as _;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata, Subscriber, span};

/// The first character of an event's line.
pub const SEPARATOR: u8 = 0x1e;

/// The most letters of an event's text.
const MOST: usize = 2000;

/// Something that happened in the machine's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, as [`now`] says.
    pub at: u64,
    /// Level, as `tracing` writes it.
    pub level: String,
    /// Where in the program.
    pub target: String,
    /// What, with its fields behind it.
    pub text: String,
}

/// Nanoseconds of the clock that all processes share and that nobody sets.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let part = |number: i64| u64::try_from(number).unwrap_or(0);
    part(now.tv_sec).saturating_mul(1_000_000_000).saturating_add(part(now.tv_nsec))
}

/// The level to ask a machine's process for: what is traced here and now, if that is more than
/// the warnings and errors that everybody sees.
pub fn wanted() -> Option<String> {
    let level = LevelFilter::current().into_level()?;
    (level > Level::WARN).then(|| level.to_string())
}

/// Sends the events of this process to the parent, up to `level`.
pub fn start(level: &str) {
    let Ok(level) = level.parse() else { return };
    // Whoever has set one up before goes on with that.
    let _ = tracing::subscriber::set_global_default(Sender { level });
}

/// Writes events to standard error; spans are not told.
#[derive(Debug)]
struct Sender {
    level: Level,
}

impl Subscriber for Sender {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level && metadata.target().starts_with("tranship")
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level.into())
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let event = Event {
            at: now(),
            level: event.metadata().level().to_string(),
            target: event.metadata().target().to_owned(),
            text: text.whole(),
        };
        // One write for the whole line, so that lines of several threads do not mix. Nobody can
        // be told that it failed.
        let mut line = vec![SEPARATOR];
        if serde_json::to_writer(&mut line, &event).is_ok() {
            line.push(b'\n');
            let _ = std::io::stderr().lock().write_all(&line);
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// A message and the fields behind it.
#[derive(Debug, Default)]
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn whole(self) -> String {
        (self.message + &self.fields).chars().take(MOST).collect()
    }
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Nothing fails that writes to a string.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_events_up_to_the_level_are_sent() {
        let sender = Sender { level: Level::DEBUG };
        tracing::subscriber::with_default(sender, || {
            assert!(tracing::enabled!(target: "tranship_vmm", Level::DEBUG));
            assert!(!tracing::enabled!(target: "tranship_vmm", Level::TRACE));
            assert!(!tracing::enabled!(target: "other", Level::ERROR));
        });
    }

    #[test]
    fn an_event_is_a_message_with_fields() {
        #[derive(Debug, Default)]
        struct Keep(std::sync::Arc<std::sync::Mutex<String>>);

        impl Subscriber for Keep {
            fn enabled(&self, _: &Metadata<'_>) -> bool {
                true
            }
            fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
                span::Id::from_u64(1)
            }
            fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
            fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
            fn event(&self, event: &tracing::Event<'_>) {
                let mut text = Text::default();
                event.record(&mut text);
                *self.0.lock().unwrap() = text.whole();
            }
            fn enter(&self, _: &span::Id) {}
            fn exit(&self, _: &span::Id) {}
        }

        let kept = Keep::default();
        let text = std::sync::Arc::clone(&kept.0);
        tracing::subscriber::with_default(kept, || {
            tracing::debug!(sector = 7, serial = "a\nb", "request {}", 1);
        });
        assert_eq!(*text.lock().unwrap(), "request 1 sector=7 serial=\"a\\nb\"");
    }
}
