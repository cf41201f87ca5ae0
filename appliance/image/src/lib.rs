// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Builds and caches the appliance: kernel, modules, tools.
//!
//! Everything is made by an ordinary user from the distribution's kernel package and the host's own
//! disk programs, so that their security updates arrive by themselves. Nothing is installed, the
//! host's `/boot` is not needed, and no external program runs but the package manager's download.
#![forbid(unsafe_code)]

mod build;
mod cache;
pub mod cpio;
mod deb;
mod decompress;
mod digest;
mod elf;
mod error;
mod export;
mod initramfs;
mod kernel;
mod ldcache;
mod modules;
mod package;
mod squash;
mod tools;
mod tree;
pub mod vmlinux;
mod wanted;

pub use build::{AgentSource, Appliance, BuildOptions, KernelSource, Manifest, build};
pub use error::{Error, ErrorKind, Result};
pub use export::{Import, export, import};
pub use modules::{Module, Modules};
pub use tools::Tool;

/// What a build is doing, for a progress display.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Another process builds in the same cache.
    Waiting,
    /// A kernel package is being downloaded.
    Downloading {
        /// Its name.
        package: String,
    },
    /// A kernel or a package is being unpacked.
    Extracting {
        /// Its name.
        package: String,
    },
    /// A part of the appliance is being packed.
    Packing {
        /// `tools` or `initramfs`.
        what: &'static str,
    },
    /// No kernel package could be had: the imported appliance serves instead.
    UsingImported {
        /// What was wrong with the package.
        because: String,
    },
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Waiting => f.write_str("waiting for another process that builds it"),
            Self::Downloading { package } => write!(f, "downloading {package}"),
            Self::Extracting { package } => write!(f, "unpacking {package}"),
            Self::Packing { what } => write!(f, "packing the {what}"),
            Self::UsingImported { because } => {
                write!(
                    f,
                    "using the imported appliance, since there is no kernel package: {because}"
                )
            }
        }
    }
}

/// Where a build reports to.
pub type Progress<'a> = dyn Fn(Event) + 'a;
