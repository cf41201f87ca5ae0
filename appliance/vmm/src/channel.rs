// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The line between a machine's process and its parent.
//!
//! A pair of `SOCK_SEQPACKET` sockets: each packet is one message in JSON, and descriptors travel
//! with it (`SCM_RIGHTS`), so that a machine that can open nothing still gets disks while it runs.
//! The parent asks, the machine answers each question once and in order; between the answers it
//! may tell that it has ended.
//!
//! The guest may have taken the machine's process over: the parent takes answers as data, and
//! descriptors from nobody.

use crate::{Error, Result};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use tranship_block::{Counts, Rate};
use tranship_nbd::Moved;

/// The largest message in bytes.
const MOST: usize = 64 << 10;
/// The most descriptors of one message: those of an image with many files. Linux takes 253.
pub const MOST_DESCRIPTORS: usize = 64;

/// A disk that is to be plugged in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewDisk {
    /// At most 20 bytes by which the guest knows it.
    pub serial: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the guest's flushes reach it.
    pub durable: bool,
    /// Logical sector size in bytes: 512 or 4096.
    pub sector_size: u32,
    /// The most that may pass on average.
    pub rate: Option<Rate>,
    /// Whether what the disk and its files do is counted, for [`Request::Count`].
    pub counts: bool,
    /// Where its contents are.
    pub source: Source,
}

/// Where the contents of a disk are. Descriptors come with the message, in this order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Source {
    /// A file with the bytes as they are: one descriptor.
    Raw,
    /// An image of any format: a descriptor for each file and more for each server, and one
    /// more with `discard`.
    Image {
        /// Its path, from which the names of its other files start.
        path: PathBuf,
        /// Its format's name; recognised if it is not given.
        format: Option<String>,
        /// The files that it consists of, and whether they are to be written.
        files: Vec<(PathBuf, bool)>,
        /// The exports that it consists of. After the descriptors of the files there are, for
        /// each, one for a [`tranship_nbd::Dialer`] and those of its connections.
        servers: Vec<NewServer>,
        /// Whether what is written is thrown away. The last descriptor is an empty file for it.
        discard: bool,
    },
    /// An export of the NBD server at the other end of a connected socket: one descriptor.
    Nbd {
        /// The export's name.
        export: String,
    },
}

/// An export of somebody else's server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewServer {
    /// The name by which it will be asked for.
    pub name: String,
    /// The connections to it, on which there is nothing under way.
    pub connections: Vec<Moved>,
}

/// What the parent asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Plug a disk in.
    Add(NewDisk),
    /// Unplug the disk with this serial number, which the guest has let go.
    Remove {
        /// Its serial number.
        serial: String,
    },
    /// Tell what was counted of a disk, which may have been unplugged since.
    Count {
        /// Its serial number.
        serial: String,
        /// The one of its files that is meant instead of the whole.
        file: Option<PathBuf>,
    },
    /// Start the processors.
    Start,
    /// Write the state into the first file that comes with this and the memory into the second.
    Save,
    /// Write the memory as a core file into the file that comes with this.
    Dump {
        /// Where the kernel's notes for debuggers are, address and size.
        vmcoreinfo: Option<(u64, u64)>,
    },
}

/// What the machine tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Message {
    /// The request was carried out.
    Done,
    /// What was counted.
    Counted(Box<Counts>),
    /// The request was not carried out, for this reason.
    Failed(String),
    /// The guest has come to its end, in words. The machine's process waits for the parent to go
    /// away, so that the memory can still be looked at.
    Ended(String),
}

/// One end of the line.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends.
    ///
    /// # Errors
    ///
    /// The operating system's.
    pub fn pair() -> Result<(Self, Self)> {
        let (here, there) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(Error::system("a line to the machine"))?;
        Ok((Self(here), Self(there)))
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    ///
    /// A message that is too large, and the operating system's: the other end may be gone.
    pub fn send<M: Serialize>(&self, message: &M, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let failed = |what: &str| Error::Config(format!("a message to the other end: {what}"));
        let text = serde_json::to_vec(message).map_err(|error| failed(&error.to_string()))?;
        if text.len() > MOST || descriptors.len() > MOST_DESCRIPTORS {
            return Err(failed(&format!(
                "{} bytes and {} descriptors, at most {MOST} and {MOST_DESCRIPTORS}",
                text.len(),
                descriptors.len()
            )));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(failed("its descriptors do not fit"));
        }
        sendmsg(&self.0, &[IoSlice::new(&text)], &mut rights, SendFlags::NOSIGNAL)
            .map_err(Error::system("a message to the other end"))?;
        Ok(())
    }

    /// Waits for a message; `None` if the other end is gone.
    ///
    /// # Errors
    ///
    /// A message that makes no sense, and the operating system's.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<Option<(M, Vec<OwnedFd>)>> {
        let mut text = vec![0; MOST];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut text)];
            match recvmsg(&self.0, &mut parts, &mut rights, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                other => break other.map_err(Error::system("a message from the other end"))?,
            }
        };
        let mut descriptors = Vec::new();
        for message in rights.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        let broken = |what: &str| Error::Config(format!("a message from the other end: {what}"));
        if received
            .flags
            .intersects(rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC)
        {
            return Err(broken("it is too long"));
        }
        let text = text.get(..received.bytes).unwrap_or_default();
        let message = serde_json::from_slice(text).map_err(|error| broken(&error.to_string()))?;
        Ok(Some((message, descriptors)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn messages_arrive_whole_with_their_descriptors() {
        let (here, there) = Channel::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let disk = NewDisk {
            serial: "tranship-0".into(),
            read_only: true,
            durable: false,
            sector_size: 512,
            rate: None,
            counts: true,
            source: Source::Raw,
        };
        here.send(&Request::Add(disk), &[writer.as_fd()]).unwrap();
        here.send(&Request::Start, &[]).unwrap();
        drop(writer);
        let (request, mut fds) = there.receive::<Request>().unwrap().unwrap();
        assert!(matches!(request, Request::Add(disk) if disk.serial == "tranship-0"));
        std::io::Write::write_all(&mut File::from(fds.pop().unwrap()), b"x").unwrap();
        assert!(fds.is_empty());
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        let (request, fds) = there.receive::<Request>().unwrap().unwrap();
        assert!(matches!(request, Request::Start) && fds.is_empty());
        drop(here);
        assert!(there.receive::<Request>().unwrap().is_none());
    }

    #[test]
    fn nonsense_and_too_much_are_errors() {
        let (here, there) = Channel::pair().unwrap();
        here.send(&"what?", &[]).unwrap();
        assert!(there.receive::<Request>().is_err());
        let long = Message::Failed("x".repeat(MOST));
        assert!(here.send(&long, &[]).is_err());
        // The longest that a machine may have counted is not.
        let most = u64::MAX.to_string();
        let counts = serde_json::to_string(&Counts::default()).unwrap().replace('0', &most);
        let counts: Counts = serde_json::from_str(&counts).unwrap();
        here.send(&Message::Counted(Box::new(counts.clone())), &[]).unwrap();
        let (message, _) = there.receive::<Message>().unwrap().unwrap();
        assert!(matches!(message, Message::Counted(same) if *same == counts));
        let fds = vec![here.as_fd(); MOST_DESCRIPTORS + 1];
        assert!(here.send(&Message::Done, &fds).is_err());
    }
}
