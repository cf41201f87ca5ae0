// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the tests of every disk format share.
//!
//! - [`Op`], [`apply`], [`operations`]: random work on a disk, and the bytes in memory
//!   that it has to equal afterwards.
//! - [`write_from_threads`]: four writers who meet everywhere.
//! - [`PowerCut`]: a storage that logs what reaches it, and gives every disk that a power
//!   cut could leave behind.
//! - [`damaged`]: an image with a few bytes changed, for properties of the kind "whatever
//!   is in the file, there is no panic and no flood".
//! - [`qemu_img`], [`raw_by_qemu`]: the reference tool, with a visible skip without it.
//! - [`samples`]: the disks of other vendors' software, where there are any.
//!
//! It panics where a test should fail: it is for tests alone.
#![allow(clippy::missing_panics_doc, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod damage;
mod oracle;
mod power_cut;
mod samples;
mod work;

pub use damage::{damaged, exercise};
pub use oracle::{has_tool, qemu_img, qemu_img_status, raw_by_qemu};
pub use power_cut::PowerCut;
pub use samples::{Sample, digest, samples};
pub use work::{Op, apply, contents, operations, pattern, verify, write_from_threads};
