// SPDX-License-Identifier: Apache-2.0 OR MIT
//! xz: streams of blocks, each stream with an index at its end.

use crate::open::Builder;
use crate::piece::{MAX_PIECES, Piece, Start};
use crate::source::Source;
use liblzma::bufread::XzDecoder;
use liblzma::stream::Stream;
use std::io::{BufRead, Chain, Cursor};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span};

pub(crate) const MAGIC: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
const HEADER_LEN: u64 = 12;
const MAX_INDEX: u64 = 64 << 20;
const MAX_STREAMS: usize = 1 << 20;
/// Memory for one decompressor: four times what the largest preset needs.
const MEMORY: u64 = 256 << 20;

type Part = Cursor<Vec<u8>>;
pub(crate) type BlockDecoder = XzDecoder<Chain<Chain<Part, Source>, Part>>;

struct Block {
    packed: Span,
    unpadded: u64,
    len: u64,
    flags: [u8; 2],
}

/// A decompressor for one block: the decompressor of the library reads whole streams, so
/// the block gets a stream header, index and footer of its own around it.
pub(crate) fn block_decoder(
    source: Source,
    flags: [u8; 2],
    unpadded: u64,
    len: u64,
) -> Result<BlockDecoder> {
    let mut header = MAGIC.to_vec();
    header.extend(flags);
    header.extend(crc32fast::hash(&flags).to_le_bytes());
    let mut tail = vec![0, 1];
    put_number(&mut tail, unpadded);
    put_number(&mut tail, len);
    tail.resize(tail.len().next_multiple_of(4), 0);
    let index_crc = crc32fast::hash(&tail);
    tail.extend(index_crc.to_le_bytes());
    let backward = u32::try_from(tail.len() / 4).unwrap_or(u32::MAX).saturating_sub(1);
    let mut footer = backward.to_le_bytes().to_vec();
    footer.extend(flags);
    tail.extend(crc32fast::hash(&footer).to_le_bytes());
    tail.extend(footer);
    tail.extend(b"YZ");
    let whole = Cursor::new(header).chain_buffered(source).chain_buffered(Cursor::new(tail));
    let stream = Stream::new_stream_decoder(MEMORY, 0)
        .map_err(|error| Error::unsupported("xz decompressor cannot be set up").because(error))?;
    Ok(XzDecoder::new_stream(whole, stream))
}

/// [`std::io::Read::chain`] by a name that says that both are buffered.
trait ChainBuffered: BufRead + Sized {
    fn chain_buffered<R: BufRead>(self, next: R) -> Chain<Self, R> {
        self.chain(next)
    }
}
impl<R: BufRead> ChainBuffered for R {}

/// Reads the indexes, from the last stream to the first.
pub(crate) fn pieces(file: &Arc<dyn BlockDevice>, builder: &mut Builder) -> Result<()> {
    let mut blocks = Vec::new();
    let mut streams = 0_usize;
    let mut end = skip_padding(file, file.size())?;
    loop {
        end = read_stream(file, end, &mut blocks)?;
        streams = streams.saturating_add(1);
        if streams > MAX_STREAMS {
            return Err(Error::unsupported(format!("xz file has more than {MAX_STREAMS} streams")));
        }
        if end == 0 {
            break;
        }
        end = skip_padding(file, end)?;
    }
    for block in blocks.into_iter().rev() {
        let start = Start::XzBlock { flags: block.flags, unpadded: block.unpadded };
        let packed = block.packed;
        builder.push(block.len, |span| Piece { span, packed, zero: false, start })?;
    }
    Ok(())
}

/// The end of the stream whose padding ends at `end`: groups of four zeroes.
fn skip_padding(file: &Arc<dyn BlockDevice>, mut end: u64) -> Result<u64> {
    let mut buffer = [0; 4096];
    loop {
        let len = end.min(4096);
        let part = buffer.get_mut(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        file.read_at(part, end.saturating_sub(len))?;
        let zeroes = part.iter().rev().take_while(|byte| **byte == 0).count();
        let zeroes = u64::try_from(zeroes).unwrap_or(0);
        end = end.saturating_sub(zeroes & !3);
        if zeroes < len || end == 0 {
            return Ok(end);
        }
    }
}

/// Adds the blocks of the stream that ends at `end`, the last one first; gives its start.
fn read_stream(file: &Arc<dyn BlockDevice>, end: u64, blocks: &mut Vec<Block>) -> Result<u64> {
    let footer_at = end.checked_sub(HEADER_LEN).filter(|at| *at >= HEADER_LEN);
    let footer_at = footer_at.ok_or_else(|| Error::corrupt("xz stream is too short").at(end))?;
    let mut footer = [0; 12];
    file.read_at(&mut footer, footer_at)?;
    let fields = LittleEndian(&footer, "xz stream footer");
    if fields.bytes("magic", 10, 2)? != b"YZ" {
        return Err(Error::corrupt(
            "no xz stream footer at the end: the file is truncated, or something follows it",
        )
        .at(footer_at));
    }
    if fields.u32("CRC32", 0)? != crc32fast::hash(fields.bytes("footer", 4, 6)?) {
        return Err(Error::corrupt("checksum of the xz stream footer is wrong").at(footer_at));
    }
    let index_len = u64::from(fields.u32("Backward Size", 4)?).saturating_add(1).saturating_mul(4);
    let flags = [footer[8], footer[9]];
    let index_at = footer_at.checked_sub(index_len).filter(|_| index_len <= MAX_INDEX);
    let index_at = index_at.ok_or_else(|| {
        Error::corrupt(format!(
            "xz index has {index_len} bytes, expected at most {}",
            footer_at.min(MAX_INDEX)
        ))
        .at(footer_at)
    })?;
    let mut index = vec![0; usize::try_from(index_len).unwrap_or(usize::MAX)];
    file.read_at(&mut index, index_at)?;
    let records = parse_index(&index).map_err(|error| error.at(index_at))?;
    if records.len().saturating_add(blocks.len()) > MAX_PIECES {
        return Err(Error::unsupported(format!("xz file has more than {MAX_PIECES} blocks")));
    }
    let mut at = index_at;
    for (unpadded, len) in records.into_iter().rev() {
        let padded = unpadded.checked_next_multiple_of(4);
        let start = padded.and_then(|padded| at.checked_sub(padded)).ok_or_else(|| {
            Error::corrupt(format!("xz block of {unpadded} bytes does not fit before its index"))
                .at(index_at)
        })?;
        let packed = Span::new(start, at.saturating_sub(start));
        blocks.push(Block { packed, unpadded, len, flags });
        at = start;
    }
    let start = at.checked_sub(HEADER_LEN);
    let start =
        start.ok_or_else(|| Error::corrupt("xz stream has no room for its header").at(at))?;
    let mut header = [0; 12];
    file.read_at(&mut header, start)?;
    let mut expected = MAGIC.to_vec();
    expected.extend(flags);
    expected.extend(crc32fast::hash(&flags).to_le_bytes());
    if header[..] != expected[..] {
        return Err(Error::corrupt("xz stream header does not fit to its footer").at(start));
    }
    Ok(start)
}

/// Unpadded and uncompressed sizes of the blocks (format, section 4).
fn parse_index(index: &[u8]) -> Result<Vec<(u64, u64)>> {
    let damaged = |what: &str| Error::corrupt(format!("xz index is damaged: {what}"));
    let Some((body, crc)) = index.split_last_chunk::<4>() else {
        return Err(damaged("it is too short"));
    };
    if u32::from_le_bytes(*crc) != crc32fast::hash(body) {
        return Err(damaged("its checksum is wrong"));
    }
    let Some((0, mut rest)) = body.split_first() else {
        return Err(damaged("it does not begin with 0"));
    };
    let mut next = || take_number(&mut rest).ok_or_else(|| damaged("a number is too long"));
    let count = next()?;
    // A record has at least two bytes, so the count cannot demand more than there is.
    if count > u64::try_from(body.len() / 2).unwrap_or(0) {
        return Err(damaged("it has fewer records than it says"));
    }
    let mut records = Vec::new();
    for _ in 0..count {
        records.push((next()?, next()?));
    }
    if rest.len() > 3 || rest.iter().any(|byte| *byte != 0) {
        return Err(damaged("something follows the records"));
    }
    Ok(records)
}

/// A number of seven bits per byte, the lowest first.
fn take_number(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for place in 0..9_u32 {
        let (byte, tail) = rest.split_first()?;
        *rest = tail;
        number |= u64::from(byte & 0x7f) << place.saturating_mul(7);
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(u8::try_from(number & 0x7f).unwrap_or(0) | 0x80);
        number >>= 7;
    }
    out.push(u8::try_from(number).unwrap_or(0));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back() {
        for number in [0, 1, 0x7f, 0x80, 0x3fff, 0x4000, u64::MAX >> 1] {
            let mut bytes = Vec::new();
            put_number(&mut bytes, number);
            assert_eq!(take_number(&mut bytes.as_slice()), Some(number));
        }
        assert_eq!(take_number(&mut [0x80_u8; 12].as_slice()), None);
        assert_eq!(take_number(&mut [0x80_u8].as_slice()), None);
    }
}
