// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables: which bytes of the disk are in which chunk.

use crate::SECTOR;
use crate::codec::Codec;
use crate::trailer::Trailer;
use tranship_block::{BigEndian, Error, Result, Span};

const MAGIC: &[u8; 4] = b"mish";
const RUNS_AT: usize = 204;
const RUN: usize = 40;
/// Largest chunk that is decompressed, and most bytes that it may take: it is memory.
const MAX_CHUNK: u64 = 64 << 20;

const ZERO: u32 = 0;
const RAW: u32 = 1;
const IGNORED: u32 = 2;
const COMMENT: u32 = 0x7fff_fffe;
const END: u32 = 0xffff_ffff;

/// A part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) span: Span,
    pub(crate) content: Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Zeroes that the writer has seen.
    Zero,
    /// Free space that the writer has left out.
    Ignored,
    /// The bytes, from this place of the file onward.
    Raw(u64),
    /// Compressed, in these bytes of the file.
    Packed(Codec, Span),
}

/// Reads a table and adds its chunks.
pub(crate) fn parse(table: &[u8], trailer: &Trailer, chunks: &mut Vec<Chunk>) -> Result<()> {
    let fields = BigEndian(table, "mish table");
    let magic = fields.bytes("magic", 0, 4)?;
    if magic != MAGIC {
        return Err(Error::corrupt(format!("magic of a table is {magic:02x?}, expected mish")));
    }
    let first = fields.u64("FirstSector", 8)?;
    let data = fields.u64("DataOffset", 24)?;
    let count = usize::try_from(fields.u32("NumberOfRuns", 200)?).unwrap_or(usize::MAX);
    let runs = table.get(RUNS_AT..).unwrap_or_default().chunks_exact(RUN);
    if runs.len() < count {
        return Err(Error::corrupt(format!(
            "mish table has {} runs, expected NumberOfRuns of {count}",
            runs.len()
        )));
    }
    for run in runs.take(count) {
        if let Some(chunk) = parse_run(&BigEndian(run, "run"), first, data, trailer)? {
            chunks.push(chunk);
        }
    }
    Ok(())
}

fn parse_run(
    fields: &BigEndian,
    first: u64,
    data: u64,
    trailer: &Trailer,
) -> Result<Option<Chunk>> {
    let kind = fields.u32("type", 0)?;
    if matches!(kind, COMMENT | END) {
        return Ok(None);
    }
    let (sector, count) = (fields.u64("sector", 8)?, fields.u64("sector count", 16)?);
    let span = first
        .checked_add(sector)
        .and_then(|sector| Some(Span::new(sector.checked_mul(SECTOR)?, count.checked_mul(SECTOR)?)))
        .filter(|span| span.check_within(trailer.size).is_ok())
        .ok_or_else(|| {
            Error::corrupt(format!(
                "chunk of {count} sectors at {first} + {sector} ends past the disk's size of {} \
                 bytes",
                trailer.size
            ))
        })?;
    if span.is_empty() {
        return Ok(None);
    }
    let codec = match kind {
        ZERO => return Ok(Some(Chunk { span, content: Content::Zero })),
        IGNORED => return Ok(Some(Chunk { span, content: Content::Ignored })),
        RAW => None,
        _ => Some(Codec::of(kind)?),
    };
    let (offset, len) = (fields.u64("offset", 24)?, fields.u64("length", 32)?);
    let within = data.saturating_add(offset);
    if Span::new(within, len).check_within(trailer.data_fork.len).is_err() {
        return Err(Error::corrupt(format!(
            "chunk for byte {} has {len} bytes at {within}, but the data fork has {} bytes",
            span.start, trailer.data_fork.len
        )));
    }
    let stored = Span::new(trailer.data_fork.start.saturating_add(within), len);
    let content = match codec {
        // What is missing at the end of a plain chunk would be other chunks' bytes.
        None if len < span.len => {
            return Err(Error::corrupt(format!(
                "plain chunk for byte {} has {len} bytes, expected {}",
                span.start, span.len
            )));
        }
        None => Content::Raw(stored.start),
        Some(_) if span.len > MAX_CHUNK || len > MAX_CHUNK => {
            return Err(Error::unsupported(format!(
                "chunk for byte {} has {} bytes in {len}, expected at most {MAX_CHUNK}",
                span.start, span.len
            )));
        }
        Some(codec) => Content::Packed(codec, stored),
    };
    Ok(Some(Chunk { span, content }))
}

/// Sorts the chunks of all tables; what none of them has is free space.
pub(crate) fn arrange(mut chunks: Vec<Chunk>, size: u64) -> Result<Vec<Chunk>> {
    chunks.sort_by_key(|chunk| chunk.span.start);
    let mut arranged = Vec::with_capacity(chunks.len());
    let mut covered = 0_u64;
    let end = Chunk { span: Span::new(size, 0), content: Content::Ignored };
    for chunk in chunks.into_iter().chain([end]) {
        let start = chunk.span.start;
        if start < covered {
            return Err(Error::corrupt(format!(
                "two chunks have byte {start} of the disk: one ends at byte {covered}"
            )));
        }
        if start > covered {
            let span = Span::new(covered, start.saturating_sub(covered));
            arranged.push(Chunk { span, content: Content::Ignored });
        }
        covered = chunk.span.end();
        if !chunk.span.is_empty() {
            arranged.push(chunk);
        }
    }
    Ok(arranged)
}
