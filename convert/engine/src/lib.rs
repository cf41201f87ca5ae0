// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Carries a conversion out, from the source to the target.
//!
//! [`convert`] is the whole way; [`read_source`] and [`dry_run`] stop earlier;
//! [`verify_boot`] proves the result. What happens on the way goes to a [`Reporter`], what
//! went wrong comes back as an [`Error`] whose kind has one exit code.
#![forbid(unsafe_code)]

mod copying;
mod definition;
mod disks;
mod error;
mod event;
mod files;
mod libvirt;
mod machine;
mod pipeline;
mod request;
mod survey;
mod verification;
mod verify;
mod witness;
mod work;

pub use error::{Error, ErrorKind, Result};
pub use event::{Event, Quiet, Reporter, Severity};
pub use files::GuestFiles;
pub use libvirt::Domain;
pub use pipeline::{DryRun, Report, convert, dry_run, read_source};
pub use request::{
    InitramfsMode, Input, Key, NetworkRule, NetworkType, Request, RootChoice, TargetFormat,
};
pub use survey::{Survey, filesystems, subvolume_of, survey};
pub use tranship_appliance::CancelToken;
pub use verify::{BootReport, VerifyOptions, verify_boot};
