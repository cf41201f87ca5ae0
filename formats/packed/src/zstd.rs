// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Zstandard: frames one after the other. Where each begins and how large it is stands in
//! the seek table at the end, or follows from the headers of its blocks.

use crate::open::Builder;
use crate::piece::{Piece, Start};
use crate::source::{Source, failure};
use std::io::Read;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span, is_zero};

pub(crate) const MAGIC: u32 = 0xfd2f_b528;
const SKIPPABLE: u32 = 0x184d_2a50;
const SEEK_TABLE: u32 = 0x184d_2a5e;
const SEEK_TABLE_MAGIC: u32 = 0x8f92_eab1;
const SEEK_FOOTER: u64 = 9;
/// Largest window: what the `zstd` tool accepts by itself; it is memory for each reader.
const MAX_WINDOW_LOG: u32 = 27;
/// A walk over block headers jumps over the blocks, so little is read around each.
const WALK_BUFFER: usize = 4096;

pub(crate) type FrameDecoder = ::zstd::stream::read::Decoder<'static, Source>;

pub(crate) fn frame_decoder(source: Source) -> Result<FrameDecoder> {
    let set_up = |source| {
        let mut decoder = ::zstd::stream::read::Decoder::with_buffer(source)?.single_frame();
        decoder.window_log_max(MAX_WINDOW_LOG)?;
        Ok(decoder)
    };
    set_up(source).map_err(|error: std::io::Error| {
        Error::new(tranship_block::ErrorKind::Io, "zstd decompressor cannot be set up")
            .because(error)
    })
}

pub(crate) fn pieces(file: &Arc<dyn BlockDevice>, builder: &mut Builder) -> Result<()> {
    match seek_table(file)? {
        Some(frames) => {
            let mut at = 0_u64;
            for (packed, len) in frames {
                let span = Span::new(at, packed);
                builder.push(len, |disk| plain(disk, span))?;
                at = span.end();
            }
            Ok(())
        }
        None => walk(file, builder),
    }
}

fn plain(span: Span, packed: Span) -> Piece {
    Piece { span, packed, zero: false, start: Start::Plain }
}

/// Compressed and decompressed sizes of all frames, if the file ends with a table of them
/// that agrees with the file's size.
fn seek_table(file: &Arc<dyn BlockDevice>) -> Result<Option<Vec<(u64, u64)>>> {
    let Some(footer_at) = file.size().checked_sub(SEEK_FOOTER) else { return Ok(None) };
    let mut footer = [0; 9];
    file.read_at(&mut footer, footer_at)?;
    let fields = LittleEndian(&footer, "zstd seek table footer");
    let flags = footer[4];
    if fields.u32("magic", 5)? != SEEK_TABLE_MAGIC || flags & 0x7f != 0 {
        return Ok(None);
    }
    let count = u64::from(fields.u32("Number_Of_Frames", 0)?);
    let entry = if flags & 0x80 == 0 { 8_u64 } else { 12 };
    let table = count.saturating_mul(entry);
    let Some(header_at) = footer_at.checked_sub(table).and_then(|at| at.checked_sub(8)) else {
        return Ok(None);
    };
    let mut source = Source::new(file, Span::new(header_at, table.saturating_add(8)));
    let magic = u32::from_le_bytes(source.array()?);
    let len = u64::from(u32::from_le_bytes(source.array()?));
    if magic != SEEK_TABLE || len != table.saturating_add(SEEK_FOOTER) {
        return Ok(None);
    }
    let mut frames = Vec::new();
    let mut end = 0_u64;
    for _ in 0..count {
        let packed = u64::from(u32::from_le_bytes(source.array()?));
        let len = u64::from(u32::from_le_bytes(source.array()?));
        source.skip(entry.saturating_sub(8))?;
        end = end.saturating_add(packed);
        frames.push((packed, len));
        if frames.len() > crate::piece::MAX_PIECES {
            return Ok(None);
        }
    }
    Ok((end == header_at).then_some(frames))
}

/// Finds the frames by the headers of their blocks.
fn walk(file: &Arc<dyn BlockDevice>, builder: &mut Builder) -> Result<()> {
    let all = Span::new(0, file.size());
    let mut source = Source::with_buffer(file, all, WALK_BUFFER);
    while source.position() < all.end() {
        let start = source.position();
        let magic = u32::from_le_bytes(source.array()?);
        if magic & !0xf == SKIPPABLE {
            let len = u32::from_le_bytes(source.array()?);
            source.skip(u64::from(len))?;
            continue;
        }
        if magic != MAGIC {
            if start == 0 {
                return Err(Error::corrupt(format!(
                    "magic is {magic:#x}, expected that of zstd ({MAGIC:#x})"
                ))
                .at(0));
            }
            builder.warnings.push(format!(
                "{} bytes behind the zstd frames are left out",
                all.end().saturating_sub(start)
            ));
            return Ok(());
        }
        let frame = match frame_header(&mut source) {
            Ok(frame) => frame,
            Err(error) => return builder.forgive(error),
        };
        let whole = skip_blocks(&mut source, &frame);
        let next = if whole.is_ok() { source.position() } else { all.end() };
        let packed = Span::new(start, next.saturating_sub(start));
        if let Err(error) = whole {
            builder.forgive(error)?;
            source.skip(next.saturating_sub(source.position()))?;
        }
        let (len, zero) = match frame.size {
            Some(len) => (len, false),
            None => measure(file, packed, builder)?,
        };
        builder.push(len, |span| Piece { zero, ..plain(span, packed) })?;
    }
    Ok(())
}

/// What the header of a frame tells.
struct Frame {
    /// Bytes of the content, if they are there.
    size: Option<u64>,
    checksum: bool,
}

/// Reads the header of the frame whose magic has been read (RFC 8878, section 3.1.1.1).
fn frame_header(source: &mut Source) -> Result<Frame> {
    let [descriptor] = source.array()?;
    let single_segment = descriptor & 0x20 != 0;
    if !single_segment {
        source.skip(1)?;
    }
    source.skip(match descriptor & 3 {
        0 => 0,
        1 => 1,
        2 => 2,
        _ => 4,
    })?;
    let size = match descriptor >> 6 {
        0 if single_segment => Some(u64::from(u8::from_le_bytes(source.array()?))),
        0 => None,
        1 => Some(u64::from(u16::from_le_bytes(source.array()?)).saturating_add(256)),
        2 => Some(u64::from(u32::from_le_bytes(source.array()?))),
        _ => Some(u64::from_le_bytes(source.array()?)),
    };
    Ok(Frame { size, checksum: descriptor & 4 != 0 })
}

/// Goes to the end of the frame, from block header to block header.
fn skip_blocks(source: &mut Source, frame: &Frame) -> Result<()> {
    loop {
        let at = source.position();
        let [low, middle, high] = source.array()?;
        let header = u32::from_le_bytes([low, middle, high, 0]);
        let len = u64::from(header >> 3);
        source.skip(match (header >> 1) & 3 {
            1 => 1,
            3 => return Err(Error::corrupt("type of a zstd block is 3, expected 0 to 2").at(at)),
            _ => len,
        })?;
        if header & 1 != 0 {
            break;
        }
    }
    source.skip(if frame.checksum { 4 } else { 0 })
}

/// Size of a frame that does not tell it, and whether all is zero: by decompressing it.
fn measure(
    file: &Arc<dyn BlockDevice>,
    packed: Span,
    builder: &mut Builder,
) -> Result<(u64, bool)> {
    let mut stream = frame_decoder(Source::new(file, packed))?;
    let mut buffer = vec![0; 64 << 10];
    let (mut len, mut zero) = (0_u64, true);
    loop {
        let got = match stream.read(&mut buffer) {
            Ok(0) => return Ok((len, zero)),
            Ok(got) => got,
            Err(error) => {
                builder.forgive(failure(error, "zstd frame").at(packed.start))?;
                return Ok((len, zero));
            }
        };
        zero = zero && is_zero(buffer.get(..got).unwrap_or_default());
        len = len.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
        builder.check_size(len)?;
    }
}
