// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The disk inside a packed file.

use crate::cache::{Cache, Key, Turn};
use crate::open::{Compression, OpenOptions};
use crate::piece::{Decoder, MAX_WHOLE, Piece};
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Result, Span, Zeroing};

/// Bytes of a large piece that the cursor hands out at a time.
const PART: u64 = 1 << 20;
/// Pieces that one question for an extent looks at.
const MAX_JOINED: usize = 4096;

/// A raw disk inside a compressed file.
#[derive(Debug)]
pub struct Packed {
    file: Arc<dyn BlockDevice>,
    compression: Compression,
    pieces: Vec<Piece>,
    size: u64,
    warnings: Vec<String>,
    salvage: bool,
    cache: Cache,
    /// The only reader of large pieces: number of the piece, and where it is.
    cursor: Mutex<Option<(usize, Decoder)>>,
}

impl Packed {
    /// Opens `file`, whose compression shows in its first bytes.
    ///
    /// This decompresses the file once if its headers do not tell the size of the disk.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if it is none of the known kinds or damaged,
    /// [`tranship_block::ErrorKind::Unsupported`] if the disk exceeds a limit.
    pub fn open(file: Arc<dyn BlockDevice>, options: OpenOptions) -> Result<Self> {
        let mut head = [0; Compression::PROBE];
        let len = usize::try_from(file.size()).unwrap_or(usize::MAX).min(head.len());
        let head = head.get_mut(..len).unwrap_or_default();
        file.read_at(head, 0)?;
        let compression = Compression::probe(head).ok_or_else(|| {
            Error::corrupt("file is not compressed by gzip, xz, zstd or bzip2").at(0)
        })?;
        let builder = compression.pieces(&file, options)?;
        let mut warnings = builder.warnings;
        let largest = builder.pieces.iter().map(|piece| piece.span.len).max().unwrap_or(0);
        if largest > MAX_WHOLE {
            warnings.push(format!(
                "{compression} data has a piece of {largest} bytes that can only be read from \
                 its start: reading in ascending order is fast, random access is slow"
            ));
        }
        if options.salvage {
            warnings.push("damaged pieces, if there are any, read as zeroes".to_owned());
        }
        Ok(Self {
            file,
            compression,
            pieces: builder.pieces,
            size: builder.size,
            warnings,
            salvage: options.salvage,
            cache: Cache::default(),
            cursor: Mutex::new(None),
        })
    }

    /// The kind of compression.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Parts of the file that can be decompressed independently of each other.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Bytes of the disk in the largest of these parts.
    pub fn largest_piece(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.span.len).max().unwrap_or(0)
    }

    /// What was odd about the file, and what reading it will cost.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn piece_at(&self, offset: u64) -> Result<(usize, &Piece)> {
        let behind = self.pieces.partition_point(|piece| piece.span.start <= offset);
        behind
            .checked_sub(1)
            .and_then(|number| Some((number, self.pieces.get(number)?)))
            .filter(|(_, piece)| offset < piece.span.end())
            .ok_or_else(|| Error::usage("offset past the end of the disk").at(offset))
    }

    /// The bytes of a piece that is decompressed whole.
    fn whole(&self, number: usize, piece: &Piece) -> Result<Arc<Vec<u8>>> {
        let key = (number, 0);
        loop {
            match self.cache.turn(key) {
                Turn::Ready(bytes) => return Ok(bytes),
                Turn::Mine => return self.load(key, piece),
                Turn::Theirs => {
                    // Several readers in one piece mostly means that the disk is read from
                    // start to end: time to decompress what they will want next.
                    self.read_ahead(number.saturating_add(1));
                    self.cache.wait(key);
                }
            }
        }
    }

    /// Decompresses a piece that is this reader's turn.
    fn load(&self, key: Key, piece: &Piece) -> Result<Arc<Vec<u8>>> {
        let mut turn = self.cache.taken(key);
        let bytes = Arc::new(self.decompress(piece)?);
        turn.bytes = Some(Arc::clone(&bytes));
        Ok(bytes)
    }

    fn decompress(&self, piece: &Piece) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(piece.span.len).unwrap_or(usize::MAX)];
        piece.decoder(&self.file, self.compression, self.salvage)?.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Decompresses the first piece from `number` onward that nobody has begun with,
    /// if it is near. A failure is for the reader who will really want it.
    fn read_ahead(&self, number: usize) {
        for (number, piece) in self.pieces.iter().enumerate().skip(number).take(3) {
            if piece.zero || piece.span.len > MAX_WHOLE {
                continue;
            }
            if matches!(self.cache.turn((number, 0)), Turn::Mine) {
                let _ = self.load((number, 0), piece);
                return;
            }
        }
    }

    /// Part `part` of a large piece: the cursor goes forward to it.
    fn part(&self, number: usize, piece: &Piece, part: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(bytes) = self.cache.get((number, part)) {
            return Ok(bytes);
        }
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have come by while this reader waited.
        if let Some(bytes) = self.cache.get((number, part)) {
            return Ok(bytes);
        }
        let wanted = part.saturating_mul(PART);
        let here =
            cursor.take().filter(|(at, decoder)| *at == number && decoder.position <= wanted);
        let mut decoder = match here {
            Some((_, decoder)) => decoder,
            None => piece.decoder(&self.file, self.compression, self.salvage)?,
        };
        loop {
            let at = decoder.position;
            let len = piece.span.len.saturating_sub(at).min(PART);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            decoder.read(&mut bytes)?;
            let bytes = Arc::new(bytes);
            self.cache.put((number, at / PART), Some(Arc::clone(&bytes)));
            if at >= wanted {
                *cursor = Some((number, decoder));
                return Ok(bytes);
            }
        }
    }

    /// Fills the start of `buf` from `offset` onward; gives the number of bytes.
    fn read_some(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let (number, piece) = self.piece_at(offset)?;
        let within = offset.saturating_sub(piece.span.start);
        if piece.zero {
            let left = usize::try_from(piece.span.len.saturating_sub(within));
            let len = left.unwrap_or(usize::MAX).min(buf.len());
            buf.get_mut(..len).unwrap_or_default().fill(0);
            return Ok(len);
        }
        let (bytes, skip) = if piece.span.len <= MAX_WHOLE {
            (self.whole(number, piece)?, within)
        } else {
            (self.part(number, piece, within / PART)?, within % PART)
        };
        let skip = usize::try_from(skip).unwrap_or(usize::MAX);
        let there = bytes.get(skip..).unwrap_or_default();
        let len = there.len().min(buf.len());
        let (to, from) = (buf.get_mut(..len), there.get(..len));
        to.unwrap_or_default().copy_from_slice(from.unwrap_or_default());
        Ok(len)
    }
}

impl BlockDevice for Packed {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn preferred_block(&self) -> u32 {
        u32::try_from(self.largest_piece().min(PART)).unwrap_or(4096).max(4096)
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let wanted = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        Span::new(offset, wanted).check_within(self.size)?;
        while !buf.is_empty() {
            let len = self.read_some(buf, offset)?;
            if len == 0 {
                return Err(Error::corrupt("packed file gives no bytes").at(offset));
            }
            offset = offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
            buf = buf.get_mut(len..).unwrap_or_default();
        }
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn discard(&self, span: Span) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let (number, first) = self.piece_at(offset)?;
        let run = self.pieces.iter().skip(number).take(MAX_JOINED);
        let last = run.take_while(|piece| piece.zero == first.zero).last().unwrap_or(first);
        let len = last.span.end().saturating_sub(offset);
        Ok(if first.zero {
            Extent::new(ExtentKind::Hole, len)
        } else {
            Extent { compressed: true, ..Extent::new(ExtentKind::Data, len) }
        })
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
