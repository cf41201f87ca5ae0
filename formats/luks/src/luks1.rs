// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header of LUKS1: 592 bytes with eight key slots (specification, section 2.3).

use crate::SECTOR;
use crate::header::{Header, Kdf, KeyDigest, KeySlot, read_within, text};
use tranship_block::{BigEndian, BlockDevice, Error, Result};

const HEADER_LEN: usize = 592;
const SLOTS_AT: usize = 208;
const SLOT_LEN: usize = 48;
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;

pub(crate) fn read(file: &dyn BlockDevice) -> Result<Header> {
    let mut bytes = [0; HEADER_LEN];
    read_within(file, &mut bytes, 0, "LUKS1 header")?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Result<Header> {
    let fields = BigEndian(bytes, "LUKS1 header");
    let cipher = text("cipher-name", fields.bytes("cipher-name", 8, 32)?)?;
    let mode = text("cipher-mode", fields.bytes("cipher-mode", 40, 32)?)?;
    let hash = text("hash-spec", fields.bytes("hash-spec", 72, 32)?)?;
    let key_bytes = fields.u32("key-bytes", 108)?;
    let encryption = format!("{cipher}-{mode}");
    let slots = bytes.get(SLOTS_AT..).unwrap_or_default().chunks_exact(SLOT_LEN);
    let slots = (0..)
        .zip(slots)
        .map(|(number, slot)| parse_slot(number, slot, &hash, key_bytes, &encryption))
        .collect::<Result<Vec<_>>>()?;
    Header {
        version: 1,
        cipher,
        mode,
        uuid: text("uuid", fields.bytes("uuid", 168, 40)?)?,
        label: String::new(),
        payload_offset: u64::from(fields.u32("payload-offset", 104)?).saturating_mul(SECTOR),
        payload_len: None,
        sector_size: 512,
        key_bytes,
        slots,
        warnings: Vec::new(),
        digest: KeyDigest {
            hash: hash.clone(),
            iterations: fields.u32("mk-digest-iter", 164)?,
            salt: fields.bytes("mk-digest-salt", 132, 32)?.to_vec(),
            digest: fields.bytes("mk-digest", 112, 20)?.to_vec(),
        },
        iv_offset: 0,
        hash,
    }
    .check()
}

fn parse_slot(
    number: u32,
    bytes: &[u8],
    hash: &str,
    key_bytes: u32,
    encryption: &str,
) -> Result<KeySlot> {
    let fields = BigEndian(bytes, "LUKS1 key slot");
    let active = match fields.u32("active", 0)? {
        ENABLED => true,
        DISABLED => false,
        other => {
            return Err(Error::corrupt(format!(
                "state of key slot {number} is {other:#x}, expected {ENABLED:#x} or {DISABLED:#x}"
            )));
        }
    };
    Ok(KeySlot {
        number,
        active,
        kdf: Kdf::Pbkdf2 { hash: hash.to_owned(), iterations: fields.u32("iterations", 4)? },
        stripes: fields.u32("stripes", 44)?,
        salt: fields.bytes("salt", 8, 32)?.to_vec(),
        key_bytes,
        area_offset: u64::from(fields.u32("key-material-offset", 40)?).saturating_mul(SECTOR),
        encryption: encryption.to_owned(),
        area_key_bytes: key_bytes,
        split_hash: hash.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
        bytes[8..11].copy_from_slice(b"aes");
        bytes[40..51].copy_from_slice(b"xts-plain64");
        bytes[72..78].copy_from_slice(b"sha256");
        bytes[104..108].copy_from_slice(&4096_u32.to_be_bytes());
        bytes[108..112].copy_from_slice(&64_u32.to_be_bytes());
        for slot in bytes[SLOTS_AT..].chunks_exact_mut(SLOT_LEN) {
            slot[..4].copy_from_slice(&DISABLED.to_be_bytes());
        }
        bytes
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let header = parse(&header()).unwrap();
        assert_eq!(header.encryption(), "aes-xts-plain64");
        assert_eq!(header.hash, "sha256");
        assert_eq!(header.payload_offset, 2 << 20);
        assert_eq!(header.key_bytes, 64);
        assert_eq!(header.slots.len(), 8);
        assert!(header.slots.iter().all(|slot| !slot.active));
    }

    #[test]
    fn wrong_fields_are_named() {
        let cases: [(usize, &[u8], &str); 3] = [
            (SLOTS_AT, &[1, 2, 3, 4], "state of key slot 0 is 0x1020304"),
            (72, b"md5\0\0\0", "hash is \"md5\""),
            (40, &[0xff], "cipher-mode of the LUKS header is not text"),
        ];
        for (at, new, expected) in cases {
            let mut bytes = header();
            bytes[at..at + new.len()].copy_from_slice(new);
            let error = parse(&bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
