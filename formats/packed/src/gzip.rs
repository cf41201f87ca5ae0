// SPDX-License-Identifier: Apache-2.0 OR MIT
//! gzip: a stream of deflate blocks without any index. One pass over the file notes the
//! state of the inflater at some of the blocks' borders; from there it can begin again.

use crate::open::Builder;
use crate::piece::{Piece, Start};
use crate::source::Source;
use crc32fast::Hasher;
use miniz_oxide::deflate::compress_to_vec;
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{
    BlockBoundaryState, DecompressorOxide, decompress, inflate_flags,
};
use miniz_oxide::inflate::decompress_to_vec_with_limit;
use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result, Span, is_zero};

/// How far back a deflate stream can refer (RFC 1951, section 2).
const WINDOW: usize = 32 << 10;
/// What the inflater writes into: a ring, a power of two.
const RING: usize = 256 << 10;
/// Bytes of the disk between two access points, to begin with.
const SPACING: u64 = 4 << 20;
/// Memory for all access points; when it is used up, every second one goes.
const MAX_POINTS: usize = 64 << 20;
/// What a point takes besides its window.
const POINT: usize = 160;

/// The state of the inflater between two blocks.
pub(crate) struct Point {
    /// The last 32 KiB, compressed.
    window: Vec<u8>,
    bits: u8,
    bit_buffer: u8,
    /// Whether the header of a member comes next.
    member: bool,
}

impl fmt::Debug for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Point").field("member", &self.member).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A member's header comes next, or the end.
    Member,
    /// Blocks.
    Body,
    /// Nothing more.
    End,
}

/// Inflates member after member.
pub(crate) struct Decoder {
    source: Source,
    inflater: Box<DecompressorOxide>,
    ring: Vec<u8>,
    /// Bytes of the ring that have been inflated, but not been given out.
    start: usize,
    end: usize,
    state: State,
    /// Stop between blocks, and whether it did.
    stops: bool,
    at_border: bool,
    /// Checksum and length of the member, if it was read from its beginning.
    check: Option<(Hasher, u32)>,
    /// Bytes at the end of the file that are no member.
    garbage: u64,
    members: u64,
    /// What the inflater found behind the bytes that it has made.
    failure: Option<Error>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Decoder {
    fn new(source: Source) -> Self {
        Self {
            source,
            inflater: Box::default(),
            ring: vec![0; RING],
            start: 0,
            end: 0,
            state: State::Member,
            stops: false,
            at_border: false,
            check: None,
            garbage: 0,
            members: 0,
            failure: None,
        }
    }

    /// Begins at an access point, to which `source` belongs.
    pub(crate) fn resume(source: Source, point: &Point) -> Result<Self> {
        let mut decoder = Self::new(source);
        decoder.members = 1;
        if !point.member {
            let window = decompress_to_vec_with_limit(&point.window, WINDOW)
                .map_err(|_| Error::corrupt("window of a gzip access point is damaged"))?;
            for (to, from) in decoder.ring.iter_mut().zip(&window) {
                *to = *from;
            }
            decoder.start = window.len();
            decoder.end = window.len();
            let state = BlockBoundaryState {
                num_bits: point.bits,
                bit_buf: point.bit_buffer,
                ..BlockBoundaryState::default()
            };
            *decoder.inflater = DecompressorOxide::from_block_boundary_state(&state);
            decoder.state = State::Body;
        }
        Ok(decoder)
    }

    /// The state, if it is one from which reading can begin again.
    fn point(&self) -> Option<Point> {
        if self.start != self.end {
            return None;
        }
        if self.state == State::Member {
            return Some(Point { window: Vec::new(), bits: 0, bit_buffer: 0, member: true });
        }
        let border = self.at_border.then(|| self.inflater.block_boundary_state())??;
        let (new, old) = self.ring.split_at_checked(self.end)?;
        let mut window = Vec::with_capacity(WINDOW);
        let missing = WINDOW.saturating_sub(new.len());
        window.extend(old.get(old.len().saturating_sub(missing)..).unwrap_or_default());
        window.extend(new.get(new.len().saturating_sub(WINDOW)..).unwrap_or_default());
        let window = compress_to_vec(&window, 1);
        Some(Point { window, bits: border.num_bits, bit_buffer: border.bit_buf, member: false })
    }

    /// Fills `out` as far as one call of the inflater goes; 0 at the end, or at a border.
    fn step(&mut self, out: &mut [u8]) -> Result<usize> {
        while self.start == self.end {
            match self.state {
                State::End => return Ok(0),
                State::Member => self.begin_member()?,
                State::Body => self.inflate()?,
            }
            if self.start == self.end && self.stops && self.is_between() {
                return Ok(0);
            }
        }
        let ready = self.ring.get(self.start..self.end).unwrap_or_default();
        let len = ready.len().min(out.len());
        for (to, from) in out.iter_mut().zip(ready) {
            *to = *from;
        }
        self.start = self.start.saturating_add(len);
        Ok(len)
    }

    fn is_between(&self) -> bool {
        self.at_border || self.state == State::Member
    }

    fn inflate(&mut self) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        if self.end >= RING {
            self.end = 0;
        }
        self.start = self.end;
        let at = self.source.position();
        let input = self.source.fill()?;
        let mut flags = if input.is_empty() { 0 } else { inflate_flags::TINFL_FLAG_HAS_MORE_INPUT };
        if self.stops {
            flags |= inflate_flags::TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY;
        }
        let (status, read, written) =
            decompress(&mut self.inflater, input, &mut self.ring, self.end, flags);
        self.source.skip_buffered(read);
        self.end = self.end.saturating_add(written).min(RING);
        self.at_border = false;
        if let Some((hasher, len)) = &mut self.check {
            hasher.update(self.ring.get(self.start..self.end).unwrap_or_default());
            *len = len.wrapping_add(u32::try_from(written).unwrap_or(0));
        }
        match status {
            TINFLStatus::HasMoreOutput | TINFLStatus::NeedsMoreInput => Ok(()),
            TINFLStatus::BlockBoundary => {
                self.at_border = true;
                Ok(())
            }
            TINFLStatus::Done => self.end_member(),
            TINFLStatus::FailedCannotMakeProgress => self.fail(written, self.source.truncated()),
            _ => {
                let damaged = Error::corrupt("compressed data of gzip member is damaged").at(at);
                self.fail(written, damaged)
            }
        }
    }

    /// Fails now, or after the `written` bytes have been given out.
    fn fail(&mut self, written: usize, error: Error) -> Result<()> {
        if written == 0 {
            return Err(error);
        }
        self.failure = Some(error);
        Ok(())
    }

    /// Reads a member's header (RFC 1952, section 2.3), or finds that there is none.
    fn begin_member(&mut self) -> Result<()> {
        let at = self.source.position();
        let (first, whole) = (self.members == 0, self.source.fill()?.len());
        if whole == 0 && !first {
            self.state = State::End;
            return Ok(());
        }
        let magic = match self.source.array::<2>() {
            Ok(magic) => magic,
            Err(error) if first => return Err(error),
            Err(_) => [0; 2],
        };
        if magic != [0x1f, 0x8b] {
            if first {
                return Err(Error::corrupt("no gzip header").at(at));
            }
            // Tapes and downloads leave padding behind the last member.
            self.garbage = self.source.remaining_from(at);
            self.state = State::End;
            return Ok(());
        }
        let [method, flags, ..] = self.source.array::<8>()?;
        if method != 8 || flags & 0xe0 != 0 {
            return Err(Error::unsupported(format!(
                "gzip member has method {method} and flags {flags:#x}, expected method 8 and \
                 flags up to 0x1f"
            ))
            .at(at));
        }
        if flags & 4 != 0 {
            let len = u16::from_le_bytes(self.source.array()?);
            self.source.skip(u64::from(len))?;
        }
        for present in [flags & 8 != 0, flags & 16 != 0] {
            while present && self.source.array()? != [0] {}
        }
        if flags & 2 != 0 {
            self.source.skip(2)?;
        }
        *self.inflater = DecompressorOxide::default();
        self.check = Some((Hasher::new(), 0));
        self.members = self.members.saturating_add(1);
        self.state = State::Body;
        Ok(())
    }

    fn end_member(&mut self) -> Result<()> {
        let at = self.source.position();
        let crc = u32::from_le_bytes(self.source.array()?);
        let len = u32::from_le_bytes(self.source.array()?);
        self.state = State::Member;
        if let Some((hasher, found)) = self.check.take() {
            let found_crc = hasher.finalize();
            if (found_crc, found) != (crc, len) {
                return Err(Error::corrupt(format!(
                    "gzip member has checksum {found_crc:#x} and {found} bytes modulo 2^32, \
                     expected {crc:#x} and {len}"
                ))
                .at(at));
            }
        }
        Ok(())
    }
}

impl Read for Decoder {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.step(out).map_err(io::Error::other)
    }
}

/// Inflates everything once and notes access points.
pub(crate) fn pieces(file: &Arc<dyn BlockDevice>, builder: &mut Builder) -> Result<()> {
    let all = Span::new(0, file.size());
    let mut decoder = Decoder::new(Source::new(file, all));
    decoder.stops = true;
    let mut stretches = Stretches::new();
    let mut buffer = vec![0; RING];
    let mut done = 0_u64;
    loop {
        if done >= stretches.next_at
            && let Some(point) = decoder.point()
        {
            stretches.add(done, decoder.source.position(), point);
        }
        let len = match decoder.step(&mut buffer) {
            Ok(len) => len,
            Err(error) => {
                builder.forgive(error)?;
                break;
            }
        };
        if len == 0 && decoder.state == State::End {
            break;
        }
        stretches.see(buffer.get(..len).unwrap_or_default());
        done = done.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        builder.check_size(done)?;
    }
    if decoder.garbage > 0 {
        builder
            .warnings
            .push(format!("{} bytes behind the gzip data are left out", decoder.garbage));
    }
    let mut stretches = stretches.list.into_iter().peekable();
    while let Some(stretch) = stretches.next() {
        let end = stretches.peek().map_or(done, |next| next.at);
        let packed = Span::new(stretch.packed, all.end().saturating_sub(stretch.packed));
        let (zero, start) = (stretch.zero, Start::Gzip(Arc::new(stretch.point)));
        let len = end.saturating_sub(stretch.at);
        builder.push(len, |span| Piece { span, packed, zero, start })?;
    }
    Ok(())
}

/// The bytes of the disk from an access point to the next.
struct Stretch {
    at: u64,
    packed: u64,
    point: Point,
    zero: bool,
}

struct Stretches {
    list: Vec<Stretch>,
    spacing: u64,
    next_at: u64,
    memory: usize,
}

impl Stretches {
    fn new() -> Self {
        Self { list: Vec::new(), spacing: SPACING, next_at: 0, memory: 0 }
    }

    fn add(&mut self, at: u64, packed: u64, point: Point) {
        self.memory = self.memory.saturating_add(point.window.len()).saturating_add(POINT);
        self.list.push(Stretch { at, packed, point, zero: true });
        if self.memory > MAX_POINTS {
            self.thin();
        }
        self.next_at = at.saturating_add(self.spacing);
    }

    /// Drops every second point.
    fn thin(&mut self) {
        self.spacing = self.spacing.saturating_mul(2);
        let mut kept: Vec<Stretch> = Vec::new();
        for (number, stretch) in std::mem::take(&mut self.list).into_iter().enumerate() {
            match kept.last_mut() {
                Some(last) if number % 2 == 1 => last.zero = last.zero && stretch.zero,
                _ => kept.push(stretch),
            }
        }
        let memory = kept.iter().map(|stretch| stretch.point.window.len().saturating_add(POINT));
        self.memory = memory.fold(0, usize::saturating_add);
        self.list = kept;
    }

    /// Looks at bytes that belong to the last stretch.
    fn see(&mut self, bytes: &[u8]) {
        if let Some(last) = self.list.last_mut() {
            last.zero = last.zero && is_zero(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_thinned_when_they_take_too_much_memory() {
        let mut stretches = Stretches::new();
        let window = vec![0; 20 << 20];
        for at in 0..4_u64 {
            let point = Point { window: window.clone(), bits: 0, bit_buffer: 0, member: false };
            stretches.add(at, at, point);
            stretches.see(&[u8::from(at == 1)]);
        }
        // The fourth one went over the limit.
        let kept: Vec<_> = stretches.list.iter().map(|one| (one.at, one.zero)).collect();
        assert_eq!(kept, [(0, false), (2, true)]);
        assert_eq!((stretches.spacing, stretches.next_at), (8 << 20, 3 + (8 << 20)));
    }
}
