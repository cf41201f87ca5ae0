// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lines of JSON over a socket, with at most one open file beside.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Read, Result, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// The most bytes of a line.
const MOST: usize = 64 << 10;

/// Sends a line; `file` goes with its first byte.
pub(super) fn send(
    mut stream: &UnixStream,
    line: &impl Serialize,
    file: Option<&File>,
) -> Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&files));
    }
    let sent = sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(bytes.get(sent..).unwrap_or_default())
}

/// Receives a line, and the file that came with it; if there were several, the first.
pub(super) fn receive<T: DeserializeOwned>(mut stream: &UnixStream) -> Result<(T, Option<File>)> {
    let mut bytes = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut file = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            for received in files {
                file.get_or_insert_with(|| File::from(received));
            }
        }
    }
    bytes.truncate(received.bytes);
    let mut more = [0; 4096];
    while !bytes.contains(&b'\n') {
        let count = stream.read(&mut more)?;
        if count == 0 || bytes.len() > MOST {
            return Err(Error::new(ErrorKind::InvalidData, "no line of at most 64 KiB"));
        }
        bytes.extend_from_slice(more.get(..count).unwrap_or_default());
    }
    Ok((serde_json::from_slice(&bytes)?, file))
}
