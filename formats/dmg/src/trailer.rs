// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The 512 bytes at the end of the file.

use crate::SECTOR;
use tranship_block::{BigEndian, BlockDevice, Error, Result, Span};

const LEN: u64 = 512;
const MAGIC: &[u8; 4] = b"koly";
/// Most bytes of padding behind the trailer that are looked through for it.
const SEARCHED: u64 = 512;

/// Where the parts of the image lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Virtual size in bytes.
    pub size: u64,
    /// The bytes of the chunks.
    pub data_fork: Span,
    /// The property list with the tables.
    pub property_list: Span,
}

impl Trailer {
    /// Finds and checks the trailer of `file`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if there is none,
    /// [`tranship_block::ErrorKind::Unsupported`] for encrypted and split images, sparse
    /// images, and those that have their tables in a resource fork.
    pub fn read(file: &dyn BlockDevice) -> Result<Self> {
        refuse_others(file)?;
        let len = file.size().min(LEN.saturating_add(SEARCHED));
        let start = file.size().saturating_sub(len);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(&mut bytes, start)?;
        let whole = usize::try_from(LEN).unwrap_or(0);
        let found = bytes.windows(whole).rposition(|window| window.starts_with(MAGIC));
        let (Some(within), true) = (found, bytes.len() >= whole) else {
            return Err(Error::corrupt("no koly trailer at the end of the file")
                .at(file.size().saturating_sub(LEN)));
        };
        let at = start.saturating_add(u64::try_from(within).unwrap_or(0));
        let fields = bytes.get(within..).unwrap_or_default();
        Self::parse(fields, at).map_err(|error| error.at(at))
    }

    fn parse(bytes: &[u8], end: u64) -> Result<Self> {
        let fields = BigEndian(bytes, "koly trailer");
        let version = fields.u32("Version", 4)?;
        if version != 4 {
            return Err(Error::unsupported(format!("version of UDIF is {version}, expected 4")));
        }
        let segments = fields.u32("SegmentCount", 60)?;
        if segments > 1 {
            return Err(Error::unsupported(format!(
                "image is split into {segments} files (.dmgpart)"
            )));
        }
        let span = |name: &str, at: usize| -> Result<Span> {
            let span = Span::new(fields.u64(name, at)?, fields.u64(name, at.saturating_add(8))?);
            if span.check_within(end).is_err() {
                return Err(Error::corrupt(format!(
                    "{name} has {} bytes at byte {}, but the trailer is at byte {end}",
                    span.len, span.start
                )));
            }
            Ok(span)
        };
        let property_list = span("property list", 216)?;
        if property_list.is_empty() {
            return Err(Error::unsupported("image has no property list, only a resource fork"));
        }
        let sectors = fields.u64("SectorCount", 492)?;
        let size = sectors.checked_mul(SECTOR).ok_or_else(|| {
            Error::corrupt(format!("SectorCount is {sectors}, more than an offset can tell"))
        })?;
        Ok(Self { size, data_fork: span("data fork", 24)?, property_list })
    }
}

/// Names what has another layout under the same file name.
fn refuse_others(file: &dyn BlockDevice) -> Result<()> {
    let mut head = [0; 8];
    if file.size() < 8 {
        return Ok(());
    }
    file.read_at(&mut head, 0)?;
    let mut tail = [0; 8];
    file.read_at(&mut tail, file.size().saturating_sub(8))?;
    if head == *b"encrcdsa" || tail == *b"cdsaencr" {
        return Err(Error::unsupported("image is encrypted; remedy: decrypt it with hdiutil"));
    }
    if head.starts_with(b"sprs") {
        return Err(Error::unsupported(
            "image is a sparse image (.sparseimage); remedy: convert it with hdiutil",
        ));
    }
    Ok(())
}
