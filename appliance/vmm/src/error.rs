// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one error type of the crate.

/// Result of an operation of the machine monitor.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a machine could not be built or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// KVM refused something.
    #[error("KVM: {what}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
    /// The operating system refused something.
    #[error("{what}")]
    System {
        /// What was asked of it.
        what: String,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
    /// Guest memory cannot hold what has to lie there.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The kernel file cannot be started.
    #[error("kernel: {0}")]
    Kernel(String),
    /// The description of the machine makes no sense.
    #[error("{0}")]
    Config(String),
    /// The machine cannot be saved now.
    #[error("the machine cannot be saved: {0}")]
    Unsaved(String),
    /// A snapshot is damaged, or is not one of this machine.
    #[error("the snapshot: {0}")]
    Snapshot(String),
    /// A disk cannot be opened.
    #[error("disk {serial}: {message}")]
    Disk {
        /// The disk's serial number.
        serial: String,
        /// What is wrong with it.
        message: String,
    },
}

impl Error {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { what, source: error.into() }
    }

    pub(crate) fn system<E: Into<std::io::Error>>(
        what: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |error| Self::System { what, source: error.into() }
    }
}
