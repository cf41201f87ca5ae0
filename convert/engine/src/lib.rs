// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Carries a conversion out, from the source to the target.
#![forbid(unsafe_code)]

mod error;
mod event;
mod request;

pub use error::{Error, ErrorKind, Result};
pub use event::{Event, Quiet, Reporter, Severity};
pub use request::{
    InitramfsMode, Input, Key, NetworkRule, NetworkType, Request, RootChoice, TargetFormat,
};
