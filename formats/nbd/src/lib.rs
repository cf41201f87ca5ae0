// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The network block device protocol: a server for any [`tranship_block::BlockDevice`],
//! and a client that makes one of an export.
//!
//! The server speaks the fixed newstyle handshake with structured and extended replies and
//! metadata contexts, on Unix sockets, TCP and vsock. The protocol is the one of the NBD
//! project's `doc/proto.md`; comments cite its names.
//!
//! The two phases of a connection are written against [`std::io::Read`] and
//! [`std::io::Write`], never against a socket, and all decisions on what a client sends
//! are in functions without I/O.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod client;
mod context;
mod export;
mod greeter;
mod handshake;
mod input;
mod limits;
mod listener;
#[cfg(test)]
mod mutation;
mod option;
mod reply;
mod request;
mod server;
mod socket;
mod statistics;
mod status;
mod tls;
mod transmission;
mod uri;
mod wire;

pub use client::{
    Address, ClientOptions, Dialer, Facts, ListedExport, Listing, Moved, Remote, Retry,
    describe_export, list_exports,
};
pub use export::{DirtyBitmap, Export, ExportedBitmap};
pub use limits::Limits;
pub use listener::{Listener, Place};
pub use server::{Running, Server, serve};
pub use statistics::Statistics;
pub use tls::{ClientTls, ServerTls, TlsReading, TlsWriting};
pub use uri::{PORT, TlsKind, TlsOptions, Uri};
