// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The disk inside an unlocked container.

use crate::header::Header;
use crate::limits::Limits;
use crate::unlock::cipher_of;
use std::sync::Arc;
use tranship_block::{
    BlockDevice, Error, Extent, ExtentKind, Result, SectorCipher, Slice, Span, Zeroing,
};

/// An unlocked container: its payload, decrypted as it is read.
#[derive(Debug)]
pub struct Luks {
    header: Header,
    payload: Slice,
    cipher: Arc<dyn SectorCipher>,
    warnings: Vec<String>,
}

impl Luks {
    /// Opens the container in `file` with `passphrase`.
    ///
    /// Time and memory are what the header asks for, up to `limits`.
    ///
    /// # Errors
    ///
    /// Those of [`Header::read`], and [`tranship_block::ErrorKind::Usage`] if no key slot
    /// opens with the passphrase; [`tranship_block::ErrorKind::Unsupported`] if the header
    /// asks for more than `limits` or for an unknown cipher.
    pub fn unlock(file: Arc<dyn BlockDevice>, passphrase: &[u8], limits: &Limits) -> Result<Self> {
        let header = Header::read(&file)?;
        let mut warnings = header.warnings.clone();
        if header.payload_offset == 0 {
            return Err(Error::unsupported(
                "header is detached: the payload is in another file or device",
            ));
        }
        let behind = file.size().checked_sub(header.payload_offset).ok_or_else(|| {
            Error::corrupt(format!("payload starts behind the file's end at byte {}", file.size()))
                .at(header.payload_offset)
        })?;
        let sector = u64::from(header.sector_size).max(1);
        let whole = |len: u64| len.saturating_sub(len.checked_rem(sector).unwrap_or(0));
        let len = match header.payload_len {
            Some(len) if len > behind || whole(len) != len => {
                return Err(Error::corrupt(format!(
                    "payload has {len} bytes, expected whole sectors of {sector} bytes within \
                     the {behind} bytes that the file has for it"
                ))
                .at(header.payload_offset));
            }
            Some(len) => len,
            None => whole(behind),
        };
        if header.payload_len.is_none() && len != behind {
            warnings.push(format!(
                "the file ends with {} bytes that are no whole sector; they are left out",
                behind.saturating_sub(len)
            ));
        }
        let cipher = cipher_of(&header, &file, passphrase, limits)?;
        let payload = Slice::new(file, Span::new(header.payload_offset, len))?;
        Ok(Self { header, payload, cipher, warnings })
    }

    /// What the container says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What was wrong with the container and could be worked around.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn sector(&self) -> u64 {
        u64::from(self.header.sector_size).max(1)
    }

    /// Reads and decrypts whole sectors; `offset` and the length are multiples of them.
    fn read_sectors(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.payload.read_at(buf, offset)?;
        let number = offset.checked_div(self.sector()).unwrap_or(0);
        self.cipher.decrypt(number, buf).map_err(|error| error.at(offset))
    }

    /// Fills `buf` with a part of a sector.
    fn read_part(&self, buf: &mut [u8], start: u64, within: u64) -> Result<()> {
        let mut sector = vec![0; usize::try_from(self.sector()).unwrap_or(4096)];
        self.read_sectors(&mut sector, start)?;
        let within = usize::try_from(within).unwrap_or(usize::MAX);
        let part = sector.get(within..).and_then(|tail| tail.get(..buf.len()));
        buf.copy_from_slice(part.ok_or_else(|| Error::usage("read past a sector").at(start))?);
        Ok(())
    }
}

fn length(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

impl BlockDevice for Luks {
    fn size(&self) -> u64 {
        self.payload.size()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    /// As the kernel shows the container: its sectors are the disk's.
    fn sector_size(&self) -> u32 {
        if self.header.sector_size == 4096 { 4096 } else { 512 }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Span::new(offset, length(buf)).check_within(self.size())?;
        let sector = self.sector();
        let within = offset.checked_rem(sector).unwrap_or(0);
        let (mut rest, mut at) = (buf, offset);
        if within != 0 {
            let left = usize::try_from(sector.saturating_sub(within)).unwrap_or(usize::MAX);
            let (part, tail) = rest.split_at_mut(left.min(rest.len()));
            self.read_part(part, at.saturating_sub(within), within)?;
            at = at.saturating_add(length(part));
            rest = tail;
        }
        let odd = length(rest).checked_rem(sector).unwrap_or(0);
        let middle = rest.len().saturating_sub(usize::try_from(odd).unwrap_or(0));
        let (whole, tail) = rest.split_at_mut(middle);
        if !whole.is_empty() {
            self.read_sectors(whole, at)?;
            at = at.saturating_add(length(whole));
        }
        if tail.is_empty() { Ok(()) } else { self.read_part(tail, at, 0) }
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn discard(&self, span: Span) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    /// All is data: what the file has no storage for decrypts to noise, not to zeroes.
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Span::new(offset, 1).check_within(self.size())?;
        Ok(Extent::new(ExtentKind::Data, self.size().saturating_sub(offset)))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
