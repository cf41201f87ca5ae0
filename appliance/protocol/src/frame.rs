// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames: how messages are cut out of a byte stream.
//!
//! A frame is a header of 16 bytes and a body of at most [`MAX_BODY`] bytes. All numbers
//! are little-endian: `u32` body length, `u8` kind, three zero bytes, `u64` request id.

use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};

/// Largest body of a frame, in bytes.
pub const MAX_BODY: usize = 1 << 20;

const HEADER: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// The agent introduces itself ([`crate::Hello`]).
    Hello = 1,
    /// The host asks for something ([`crate::Call`]).
    Call = 2,
    /// The call is done ([`crate::Reply`]).
    Reply = 3,
    /// The call failed ([`crate::Failure`]).
    Failure = 4,
    /// Bytes of a file; the body is the bytes themselves.
    Data = 5,
    /// No more bytes in this direction; empty body.
    End = 6,
    /// The receiver took bytes ([`crate::Credit`]).
    Credit = 7,
    /// The host no longer wants the call; empty body.
    Cancel = 8,
    /// How far a call is ([`crate::Progress`]).
    Progress = 9,
    /// A line for the log; the body is text.
    Log = 10,
}

impl FrameKind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Call,
            3 => Self::Reply,
            4 => Self::Failure,
            5 => Self::Data,
            6 => Self::End,
            7 => Self::Credit,
            8 => Self::Cancel,
            9 => Self::Progress,
            10 => Self::Log,
            _ => return None,
        })
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: FrameKind,
    /// Which request it belongs to; 0 for [`FrameKind::Hello`] and [`FrameKind::Log`].
    pub id: u64,
    /// Its body, encoded as the kind says.
    pub body: Vec<u8>,
}

/// Why a stream of frames cannot be followed any further.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The stream ended inside a frame.
    #[error("the connection ended in the middle of a message")]
    Cut,
    /// The length field exceeds [`MAX_BODY`].
    #[error("a message claims {0} bytes, at most {MAX_BODY} are allowed")]
    TooLong(u32),
    /// The kind is unknown, or a reserved byte is not zero.
    #[error("a message has an invalid header")]
    Header,
    /// The body does not decode.
    #[error("a message does not decode: {0}")]
    Body(postcard::Error),
}

/// A type that is the body of a frame.
pub trait Body: Serialize + DeserializeOwned {
    /// The kind of frame whose body it is.
    const KIND: FrameKind;
}

impl Frame {
    /// A frame of request `id` with `body` encoded.
    ///
    /// # Errors
    ///
    /// [`FrameError::TooLong`] if it is larger than a frame can be.
    pub fn encode<B: Body>(id: u64, body: &B) -> Result<Self, FrameError> {
        let body = postcard::to_stdvec(body).map_err(FrameError::Body)?;
        if body.len() > MAX_BODY {
            return Err(FrameError::TooLong(u32::try_from(body.len()).unwrap_or(u32::MAX)));
        }
        Ok(Self { kind: B::KIND, id, body })
    }

    /// The body, decoded.
    ///
    /// # Errors
    ///
    /// [`FrameError::Body`] if it is not exactly one `B`.
    pub fn decode<B: Body>(&self) -> Result<B, FrameError> {
        let (value, rest) = postcard::take_from_bytes(&self.body).map_err(FrameError::Body)?;
        if rest.is_empty() {
            Ok(value)
        } else {
            Err(FrameError::Body(postcard::Error::DeserializeBadEncoding))
        }
    }

    /// Writes the frame with one call, so that frames of several threads never mix as
    /// long as each holds the stream's lock.
    ///
    /// # Errors
    ///
    /// The stream's own.
    pub fn write_to(&self, stream: &mut impl Write) -> Result<(), FrameError> {
        let length = u32::try_from(self.body.len()).unwrap_or(u32::MAX);
        if self.body.len() > MAX_BODY {
            return Err(FrameError::TooLong(length));
        }
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&[self.kind as u8, 0, 0, 0]);
        bytes.extend_from_slice(&self.id.to_le_bytes());
        bytes.extend_from_slice(&self.body);
        stream.write_all(&bytes)?;
        Ok(())
    }

    /// Reads the next frame; `None` if the stream ended between two frames.
    ///
    /// # Errors
    ///
    /// Anything that makes the rest of the stream meaningless.
    pub fn read_from(stream: &mut impl Read) -> Result<Option<Self>, FrameError> {
        let mut header = [0; HEADER];
        let mut filled = 0;
        while filled < HEADER {
            match stream.read(&mut header[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(FrameError::Cut),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let [l0, l1, l2, l3, kind, 0, 0, 0, id @ ..] = header else {
            return Err(FrameError::Header);
        };
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let kind = FrameKind::from_byte(kind).ok_or(FrameError::Header)?;
        let wanted = usize::try_from(length).unwrap_or(usize::MAX);
        if wanted > MAX_BODY {
            return Err(FrameError::TooLong(length));
        }
        let mut body = vec![0; wanted];
        stream.read_exact(&mut body).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => FrameError::Cut,
            _ => FrameError::Io(error),
        })?;
        Ok(Some(Self { kind, id: u64::from_le_bytes(id), body }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Call, Failure, GuestPath};
    use proptest::prelude::*;

    fn bytes_of(frame: &Frame) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.write_to(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_frame_comes_back_as_it_was() {
        let call = Call::Lstat { path: GuestPath::of("/etc/fstab") };
        let frame = Frame::encode(7, &call).unwrap();
        let bytes = bytes_of(&frame);
        let mut stream = &bytes[..];
        let back = Frame::read_from(&mut stream).unwrap().unwrap();
        assert_eq!(back, frame);
        assert_eq!(back.decode::<Call>().unwrap(), call);
        assert!(Frame::read_from(&mut stream).unwrap().is_none());
    }

    #[test]
    fn a_cut_frame_is_an_error_at_every_byte() {
        let failure = Failure { errno: 2, message: "gone".into() };
        let bytes = bytes_of(&Frame::encode(1, &failure).unwrap());
        for cut in 1..bytes.len() {
            assert!(matches!(Frame::read_from(&mut &bytes[..cut]), Err(FrameError::Cut)), "{cut}");
        }
    }

    #[test]
    fn a_huge_length_is_refused_before_anything_is_allocated() {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        bytes[4] = 5;
        assert!(matches!(Frame::read_from(&mut &bytes[..]), Err(FrameError::TooLong(u32::MAX))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn any_bytes_decode_or_fail_cleanly(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(Some(frame)) = Frame::read_from(&mut &bytes[..]) {
                let _ = frame.decode::<Call>();
                let _ = frame.decode::<crate::Reply>();
                let _ = frame.decode::<crate::Hello>();
            }
            let frame = Frame { kind: FrameKind::Reply, id: 1, body: bytes };
            let _ = frame.decode::<crate::Reply>();
            let _ = frame.decode::<Call>();
        }
    }
}
