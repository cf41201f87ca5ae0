// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a conversion tells while it runs.

/// How serious an event is; the `type` of virt-v2v's machine-readable messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// A step of the work.
    Message,
    /// Something worth knowing.
    Info,
    /// Something that may need attention.
    Warning,
    /// The reason of a failure.
    Error,
}

/// One thing that happened. Names are stable; new ones may appear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// How serious it is.
    pub severity: Severity,
    /// Its stable name: `source.read`, `copy.progress`, …
    pub name: &'static str,
    /// One sentence for people.
    pub message: String,
    /// Index of the disk that it is about, from 0.
    pub disk: Option<usize>,
    /// Bytes (or steps) done and in all, for progress.
    pub progress: Option<(u64, u64)>,
    /// Machine-readable details: stable keys, values as text.
    pub details: Vec<(&'static str, String)>,
}

impl Event {
    /// A step of the work.
    pub fn step(name: &'static str, message: impl Into<String>) -> Self {
        Self::new(Severity::Message, name, message)
    }

    /// Something worth knowing.
    pub fn info(name: &'static str, message: impl Into<String>) -> Self {
        Self::new(Severity::Info, name, message)
    }

    /// Something that may need attention.
    pub fn warning(name: &'static str, message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, name, message)
    }

    /// An event of any severity.
    pub fn new(severity: Severity, name: &'static str, message: impl Into<String>) -> Self {
        Self {
            severity,
            name,
            message: message.into(),
            disk: None,
            progress: None,
            details: Vec::new(),
        }
    }

    /// The same about disk number `index`.
    #[must_use]
    pub fn of_disk(mut self, index: usize) -> Self {
        self.disk = Some(index);
        self
    }

    /// The same with progress.
    #[must_use]
    pub fn at(mut self, done: u64, total: u64) -> Self {
        self.progress = Some((done, total));
        self
    }

    /// The same with one more detail.
    // Takes numbers and references alike, as `to_string` does.
    #[allow(clippy::needless_pass_by_value)]
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl ToString) -> Self {
        self.details.push((key, value.to_string()));
        self
    }
}

/// Takes events: a terminal, a log, a test.
///
/// Progress events ([`Event::progress`]) come from several threads and up to ten times a
/// second per disk; an implementation may drop all but the last.
pub trait Reporter: Send + Sync {
    /// Takes one event.
    fn report(&self, event: &Event);
}

/// The reporter that looks away.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Reporter for Quiet {
    fn report(&self, _event: &Event) {}
}
