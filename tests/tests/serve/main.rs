// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `tranship serve` and the link `qemu-nbd`, beside the real one, with the clients that
//! people use: qemu-img, qemu-io, nbdcopy and nbdinfo.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bench;
mod contents;
mod info;
mod life;
mod resize;
mod run;
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod words;
