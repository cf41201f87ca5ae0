// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server as its clients see it: raw sockets, and the tools that people use.
#![allow(clippy::cast_possible_truncation, reason = "numbers of a test are small")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod abuse;
mod client;
mod extended;
mod files;
mod foreign;
mod handshake;
mod hostile;
mod images;
mod listeners;
mod matrix;
mod moving;
mod oracle;
mod queue;
mod reconnect;
mod remote;
mod scripted;
mod server;
mod tls;
mod tls_server;
mod transmission;
mod uri;
