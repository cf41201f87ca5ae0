// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server as its clients see it: raw sockets, and the tools that people use.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod client;
mod handshake;
mod oracle;
mod server;
mod transmission;
