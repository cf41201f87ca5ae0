// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is in this guest: operating system, kernels, mounts, bootloader.
//!
//! [`inspect_root`] looks at one mounted root through [`GuestTree`] and returns [`Facts`];
//! [`is_root`] and [`resolve_mounts`] say what to mount. Nothing here changes a guest, and
//! nothing of a guest is ever run.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]
// Linux compares the endings of file names by case, so do the programs that read them.
#![allow(clippy::case_sensitive_file_extension_comparisons)]

mod bootloader;
mod error;
mod facts;
pub mod folder;
mod fstab;
mod inspection;
mod kernels;
mod modules;
mod network;
mod packages;
mod reader;
mod release;
mod roots;
mod services;
mod tree;

pub use bootloader::{BootEntry, Bootloader, BootloaderKind};
pub use error::{Error, ErrorKind, Result};
pub use facts::{
    Clock, Facts, Family, Init, Kind, OperatingSystem, Package, Packages, SeLinux,
    optional_path_text, path_list_text, path_text,
};
pub use fstab::{CryptVolume, Mount, parse_crypttab, parse_fstab};
pub use inspection::inspect_root;
pub use kernels::{Kernel, Support, Virtio};
pub use modules::{ModuleIndex, module_name};
pub use network::{NetConfig, Network, PinnedName, mac_address};
pub use roots::{Filesystem, ResolvedMount, RootCheck, is_root, kernel_name, resolve_mounts};
pub use services::{AgentState, HypervisorTool};
pub use tree::{DirEntry, FileKind, Finished, GuestEdit, GuestTree, Ownership, Space, Stat};
