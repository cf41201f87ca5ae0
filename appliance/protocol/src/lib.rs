// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages between the host and the agent in the appliance.
//!
//! Two byte streams connect them, both virtio-serial ports: [`CONTROL_PORT`] for calls,
//! replies and everything short, [`BULK_PORT`] for the contents of files. Each carries
//! [`Frame`]s. A call and everything that belongs to it share one request id, so that
//! any number of calls can be under way at once.
//!
//! ```text
//! host                                agent
//!   <- Hello   what the agent is and can (once, control)
//!   -> Call    id, a call (control)
//!   <- Credit  id, bytes that may be uploaded, again and again (control)
//!   -> Data…   id, bytes of an upload (bulk), as far as credit reaches
//!   -> End     id (bulk)
//!   <- Progress id, done and total (control)
//!   <- Data…   id, bytes of a download (bulk), as far as credit reaches
//!   -> Credit  id, bytes that were taken (control)
//!   <- End     id (bulk), of every call that downloads, also when it fails
//!   <- Reply | Failure   id (control), the last frame of a call
//!   -> Cancel  id: the call ends soon, with a Failure unless it was done (control)
//! ```
//!
//! An upload starts without credit, so that no byte overtakes its call on the other port;
//! a download starts with [`WINDOW`] bytes of credit.
//!
//! Once a guest's filesystem is mounted the agent counts as hostile: the host bounds
//! every length, never allocates by a size that the agent names, and treats what comes
//! back as data only.
#![forbid(unsafe_code)]

mod call;
mod frame;
mod path;

pub use call::{
    Attributes, Call, Cancelled, Credit, Entropy, Failure, FileKind, FilesystemCheck, Hello, Name,
    NewFile, ProgramOutput, Progress, Reply, Space, Volume, VolumeKind,
};
pub use frame::{Body, Frame, FrameError, FrameKind, MAX_BODY};
pub use path::GuestPath;

/// Number of the protocol; both ends must have the same.
pub const VERSION: u32 = 2;

/// Name of the virtio-serial port for calls and replies.
pub const CONTROL_PORT: &str = "org.tranship.control.0";

/// Name of the virtio-serial port for file contents.
pub const BULK_PORT: &str = "org.tranship.bulk.0";

/// Bytes of file contents that may be under way in one direction of one call before the
/// receiver has taken them.
pub const WINDOW: u64 = 2 << 20;

impl Call {
    /// Whether the agent answers with [`FrameKind::Data`] and [`FrameKind::End`].
    pub fn downloads(&self) -> bool {
        matches!(self, Self::ReadDir { .. } | Self::Download { .. } | Self::Run { .. })
    }

    /// Whether the host sends [`FrameKind::Data`] and [`FrameKind::End`].
    pub fn uploads(&self) -> bool {
        matches!(
            self,
            Self::OpenEncrypted { .. }
                | Self::Upload { .. }
                | Self::Append { .. }
                | Self::Run { input: true, .. }
        )
    }
}

/// Most random bytes in one [`Call::Wake`].
pub const MOST_ENTROPY: usize = 256;

/// Bytes of file contents in one [`FrameKind::Data`] frame, at most.
pub const CHUNK: usize = 256 << 10;

/// The serial number that marks the read-only disk with the appliance's tools.
pub const TOOLS_SERIAL: &str = "tranship-tools";

/// The serial number of the guest's disk number `index`.
pub fn disk_serial(index: usize) -> String {
    format!("tranship-{index}")
}

/// The API's name of the guest's disk number `index`: `sda`, …, `sdz`, `sdaa`, …
pub fn disk_name(index: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = index;
    loop {
        letters.push(char::from(b'a' + u8::try_from(rest % 26).unwrap_or(0)));
        match (rest / 26).checked_sub(1) {
            Some(next) => rest = next,
            None => break,
        }
    }
    letters.push('d');
    letters.push('s');
    letters.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::disk_name;

    #[test]
    fn disks_are_named_past_z() {
        for (index, name) in
            [(0, "sda"), (25, "sdz"), (26, "sdaa"), (51, "sdaz"), (52, "sdba"), (702, "sdaaa")]
        {
            assert_eq!(disk_name(index), name);
        }
    }
}
