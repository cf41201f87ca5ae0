// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The two headers of LUKS2: 4 KiB of binary fields, then JSON (specification, section 2).

use crate::derive::Hash;
use crate::header::{Header, MAGIC, text};
use crate::metadata::Metadata;
use tranship_block::{BigEndian, BlockDevice, Error, Result, Span};

const SECOND_MAGIC: &[u8; 6] = b"SKUL\xba\xbe";
const BINARY_LEN: usize = 4096;
const CHECKSUM: std::ops::Range<usize> = 448..512;
/// Where the second header can lie: right after the first, whose size is one of these.
const HEADER_SIZES: std::ops::RangeInclusive<u32> = 14..=22;

/// One of the two headers, its checksum verified.
struct Copy {
    sequence: u64,
    uuid: String,
    label: String,
    json: Vec<u8>,
}

/// Reads the newer of the headers whose checksum is right; none if there is no header.
pub(crate) fn read(file: &dyn BlockDevice) -> Result<Option<Header>> {
    let mut warnings = Vec::new();
    let first = read_copy(file, 0, MAGIC);
    let mut second = Ok(None);
    for bits in HEADER_SIZES {
        let at = 1_u64 << bits;
        second = read_copy(file, at, SECOND_MAGIC);
        if !matches!(second, Ok(None)) {
            break;
        }
    }
    let mut choose = |result: Result<Option<Copy>>, name: &str| match result {
        Ok(Some(copy)) => Some(copy),
        Ok(None) => {
            warnings.push(format!("{name} header of LUKS2 is missing"));
            None
        }
        Err(error) => {
            warnings.push(format!("{name} header of LUKS2 is damaged: {error}"));
            None
        }
    };
    let copy = match (choose(first, "first"), choose(second, "second")) {
        (Some(first), Some(second)) if second.sequence > first.sequence => {
            warnings.push(format!(
                "second header of LUKS2 is newer than the first: sequence {} and {}",
                second.sequence, first.sequence
            ));
            second
        }
        (Some(copy), _) | (None, Some(copy)) => copy,
        (None, None) => return Ok(None),
    };
    let metadata = Metadata::parse(&copy.json)?;
    let mut header = metadata.into_header()?;
    header.uuid = copy.uuid;
    header.label = copy.label;
    header.warnings = warnings;
    header.check().map(Some)
}

/// The header at `at`; none if there is no magic.
fn read_copy(file: &dyn BlockDevice, at: u64, magic: &[u8]) -> Result<Option<Copy>> {
    if Span::new(at, 4096).check_within(file.size()).is_err() {
        return Ok(None);
    }
    let mut bytes = vec![0; BINARY_LEN];
    file.read_at(&mut bytes, at)?;
    let fields = BigEndian(&bytes, "LUKS2 header");
    if fields.bytes("magic", 0, 6)? != magic {
        return Ok(None);
    }
    let version = fields.u16("version", 6)?;
    if version != 2 {
        return Err(Error::corrupt(format!("version is {version}, expected 2")).at(at));
    }
    let size = fields.u64("hdr_size", 8)?;
    if !HEADER_SIZES.map(|bits| 1_u64 << bits).any(|allowed| allowed == size) {
        return Err(Error::corrupt(format!(
            "hdr_size is {size}, expected a power of two from 16 KiB to 4 MiB"
        ))
        .at(at));
    }
    let offset = fields.u64("hdr_offset", 256)?;
    if offset != at {
        return Err(Error::corrupt(format!("hdr_offset is {offset}, expected {at}")).at(at));
    }
    if Span::new(at, size).check_within(file.size()).is_err() {
        return Err(Error::corrupt(format!(
            "header of {size} bytes ends past the file's size of {} bytes",
            file.size()
        ))
        .at(at));
    }
    let hash = Hash::named(&text("csum_alg", fields.bytes("csum_alg", 72, 32)?)?)?;
    let expected = fields.bytes("csum", CHECKSUM.start, hash.len())?.to_vec();
    let (sequence, uuid) = (fields.u64("seqid", 16)?, fields.bytes("uuid", 168, 40)?);
    let uuid = text("uuid", uuid)?;
    let label = text("label", fields.bytes("label", 24, 48)?)?;
    let len = usize::try_from(size).unwrap_or(usize::MAX);
    bytes.resize(len, 0);
    file.read_at(bytes.get_mut(BINARY_LEN..).unwrap_or_default(), at.saturating_add(4096))?;
    bytes.get_mut(CHECKSUM).unwrap_or_default().fill(0);
    if *hash.of(&[&bytes]) != expected {
        return Err(Error::corrupt("checksum of the header is wrong").at(at));
    }
    let json = bytes.split_off(BINARY_LEN);
    Ok(Some(Copy { sequence, uuid, label, json }))
}
