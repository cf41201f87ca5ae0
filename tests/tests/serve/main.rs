// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `tranship serve` and the link `qemu-nbd`, beside the real one, with the clients that
//! people use: qemu-img, qemu-io, nbdcopy, nbdinfo and fio.
#![allow(clippy::cast_possible_truncation, reason = "numbers of a test are small")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod abuse;
mod activation;
mod bench;
#[allow(dead_code, reason = "the server's own tests use all of it")]
#[path = "../../../formats/nbd/tests/nbd/client.rs"]
mod client;
mod contents;
mod crowd;
mod durable;
mod fio;
mod info;
mod life;
mod maps;
mod power;
mod remote;
mod resize;
mod run;
mod space;
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod words;
