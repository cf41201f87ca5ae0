// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The engine's calls.

pub(crate) use tranship_convert::{VerifyOptions, convert, dry_run, read_source, verify_boot};
