// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Raw disks: files and block devices, sparse-aware.
//!
//! [`RawFile`] is both a disk of its own and what the image formats keep their clusters
//! in. It never opens anything but a regular file or a block device, and opening never
//! waits for a peer, so that a FIFO in the place of a disk is an error instead of a hang.
//! It keeps out of the way of a running QEMU, and QEMU out of its way, if it is told to
//! take the image's locks ([`RawFile::lock`]); the only unsafe code is the system call for
//! these.
#![deny(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod allocation;
mod device;
mod direct;
mod file;
mod holes;
mod lock;

pub use allocation::Preallocation;
pub use file::{Access, RawFile};
pub use lock::{ImageLock, LockConflict, Permission};
