// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The JSON of LUKS2 (specification, section 3): which key opens which part of the file.

use crate::header::{Header, Kdf, KeyDigest, KeySlot};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;
use tranship_block::{Error, Result};

#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    keyslots: BTreeMap<String, KeyslotObject>,
    segments: BTreeMap<String, SegmentObject>,
    digests: BTreeMap<String, DigestObject>,
    config: ConfigObject,
}

#[derive(Debug, Deserialize)]
struct KeyslotObject {
    #[serde(rename = "type")]
    kind: String,
    key_size: u32,
    #[serde(default)]
    priority: Option<u32>,
    #[serde(default)]
    af: Option<SplitObject>,
    area: AreaObject,
    #[serde(default)]
    kdf: Option<KdfObject>,
}

#[derive(Debug, Deserialize)]
struct SplitObject {
    stripes: u32,
    hash: String,
}

#[derive(Debug, Deserialize)]
struct AreaObject {
    offset: String,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    key_size: u32,
}

#[derive(Debug, Deserialize)]
struct KdfObject {
    #[serde(rename = "type")]
    kind: String,
    salt: String,
    #[serde(default)]
    hash: String,
    #[serde(default)]
    iterations: u32,
    #[serde(default)]
    time: u32,
    /// In KiB.
    #[serde(default)]
    memory: u32,
    #[serde(default)]
    cpus: u32,
}

#[derive(Debug, Deserialize)]
struct SegmentObject {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    iv_tweak: String,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    sector_size: u32,
    #[serde(default)]
    integrity: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct DigestObject {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    hash: String,
    iterations: u32,
    salt: String,
    digest: String,
}

#[derive(Debug, Deserialize)]
struct ConfigObject {
    #[serde(default)]
    requirements: Requirements,
}

#[derive(Debug, Default, Deserialize)]
struct Requirements {
    #[serde(default)]
    mandatory: Vec<String>,
}

impl Metadata {
    /// Parses the JSON area, which is filled up with NULs.
    pub(crate) fn parse(area: &[u8]) -> Result<Self> {
        let end = area.iter().position(|byte| *byte == 0).unwrap_or(area.len());
        serde_json::from_slice(area.get(..end).unwrap_or_default())
            .map_err(|error| Error::corrupt("JSON of the LUKS2 header is not valid").because(error))
    }

    /// The facts; the caller adds what only the binary header has.
    pub(crate) fn into_header(self) -> Result<Header> {
        if !self.config.requirements.mandatory.is_empty() {
            return Err(Error::unsupported(format!(
                "LUKS2 header demands {}",
                self.config.requirements.mandatory.join(", ")
            )));
        }
        let mut segments = self.segments.iter();
        let (Some((name, segment)), None) = (segments.next(), segments.next()) else {
            return Err(Error::unsupported(format!(
                "LUKS2 header has {} segments, expected 1",
                self.segments.len()
            )));
        };
        if segment.kind != "crypt" {
            return Err(Error::unsupported(format!(
                "segment {name} is of type {:?}, expected crypt",
                segment.kind
            )));
        }
        if segment.integrity.is_some() {
            return Err(Error::unsupported(format!("segment {name} has integrity protection")));
        }
        let digest = self.digests.values().find(|digest| digest.segments.contains(name));
        let digest = digest
            .ok_or_else(|| Error::corrupt(format!("no digest tells the key of segment {name}")))?;
        if digest.kind != "pbkdf2" {
            return Err(Error::unsupported(format!(
                "digest is of type {:?}, expected pbkdf2",
                digest.kind
            )));
        }
        let mut slots = Vec::new();
        for slot in &digest.keyslots {
            let object = self.keyslots.get(slot);
            let object = object.ok_or_else(|| {
                Error::corrupt(format!("digest names key slot {slot:?}, which is missing"))
            })?;
            if object.kind == "luks2" {
                slots.push((object.priority.unwrap_or(1), object.slot(slot)?));
            }
        }
        slots.sort_by_key(|(priority, slot)| (std::cmp::Reverse(*priority), slot.number));
        let (cipher, mode) = segment.encryption.split_once('-').unwrap_or_default();
        Ok(Header {
            version: 2,
            cipher: cipher.to_owned(),
            mode: mode.to_owned(),
            hash: digest.hash.clone(),
            uuid: String::new(),
            label: String::new(),
            payload_offset: number("offset of the segment", &segment.offset)?,
            payload_len: match segment.size.as_str() {
                "dynamic" => None,
                size => Some(number("size of the segment", size)?),
            },
            sector_size: segment.sector_size,
            key_bytes: slots.first().map_or(0, |(_, slot)| slot.key_bytes),
            slots: slots.into_iter().map(|(_, slot)| slot).collect(),
            warnings: Vec::new(),
            digest: KeyDigest {
                hash: digest.hash.clone(),
                iterations: digest.iterations,
                salt: base64("salt of the digest", &digest.salt)?,
                digest: base64("digest", &digest.digest)?,
            },
            iv_offset: number("iv_tweak of the segment", &segment.iv_tweak)?,
        })
    }
}

impl KeyslotObject {
    fn slot(&self, name: &str) -> Result<KeySlot> {
        let missing = |what: &str| Error::corrupt(format!("key slot {name:?} has no {what}"));
        let kdf = self.kdf.as_ref().ok_or_else(|| missing("kdf"))?;
        let split = self.af.as_ref().ok_or_else(|| missing("af"))?;
        Ok(KeySlot {
            number: name
                .parse()
                .map_err(|_| Error::corrupt(format!("key slot {name:?} has no number")))?,
            active: true,
            kdf: match kdf.kind.as_str() {
                "pbkdf2" => Kdf::Pbkdf2 { hash: kdf.hash.clone(), iterations: kdf.iterations },
                "argon2i" | "argon2id" => Kdf::Argon2 {
                    variant: kdf.kind.clone(),
                    memory: u64::from(kdf.memory).saturating_mul(1024),
                    passes: kdf.time,
                    lanes: kdf.cpus,
                },
                other => {
                    return Err(Error::unsupported(format!(
                        "kdf of key slot {name} is {other:?}, expected pbkdf2, argon2i or argon2id"
                    )));
                }
            },
            stripes: split.stripes,
            salt: base64("salt of a key slot", &kdf.salt)?,
            key_bytes: self.key_size,
            area_offset: number("offset of a key slot", &self.area.offset)?,
            encryption: self.area.encryption.clone(),
            area_key_bytes: self.area.key_size,
            split_hash: split.hash.clone(),
        })
    }
}

/// 64-bit numbers are decimal text, since JSON's own are no larger than 53 bits.
fn number(what: &str, text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::corrupt(format!("{what} is {text:?}, expected a number")))
}

fn base64(what: &str, text: &str) -> Result<Vec<u8>> {
    STANDARD.decode(text).map_err(|_| Error::corrupt(format!("{what} is not base64")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::ErrorKind;

    const GOOD: &str = r#"{"keyslots":{"1":{"type":"luks2","key_size":64,
        "af":{"type":"luks1","stripes":4000,"hash":"sha256"},
        "area":{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64","key_size":64},
        "kdf":{"type":"argon2id","time":4,"memory":65536,"cpus":2,"salt":"AAAA"}}},
        "tokens":{},"segments":{"0":{"type":"crypt","offset":"16777216","size":"dynamic","iv_tweak":"0",
        "encryption":"aes-xts-plain64","sector_size":4096}},
        "digests":{"0":{"type":"pbkdf2","keyslots":["1"],"segments":["0"],"hash":"sha256",
        "iterations":1000,"salt":"AAAA","digest":"AAAA"}},"config":{"json_size":"12288"}}"#;

    #[test]
    fn facts_are_read() {
        let header = Metadata::parse(GOOD.as_bytes()).unwrap().into_header().unwrap();
        assert_eq!(header.encryption(), "aes-xts-plain64");
        assert_eq!((header.payload_offset, header.sector_size), (16 << 20, 4096));
        let [slot] = header.slots.as_slice() else { panic!("{:?}", header.slots) };
        let kdf =
            Kdf::Argon2 { variant: "argon2id".to_owned(), memory: 64 << 20, passes: 4, lanes: 2 };
        assert_eq!((slot.number, &slot.kdf, slot.stripes), (1, &kdf, 4000));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let cases = [
            (
                r#""config":{"#,
                r#""config":{"requirements":{"mandatory":["online-reencrypt"]},"#,
                ErrorKind::Unsupported,
                "LUKS2 header demands online-reencrypt",
            ),
            (
                r#""type":"crypt""#,
                r#""type":"linear""#,
                ErrorKind::Unsupported,
                "segment 0 is of type \"linear\", expected crypt",
            ),
            (
                r#""sector_size":4096"#,
                r#""sector_size":4096,"integrity":{}"#,
                ErrorKind::Unsupported,
                "segment 0 has integrity protection",
            ),
            (
                r#""keyslots":["1"]"#,
                r#""keyslots":["2"]"#,
                ErrorKind::Corrupt,
                "digest names key slot \"2\", which is missing",
            ),
            (
                r#""argon2id""#,
                r#""scrypt""#,
                ErrorKind::Unsupported,
                "kdf of key slot 1 is \"scrypt\", expected pbkdf2, argon2i or argon2id",
            ),
            (
                r#""segments":["0"]"#,
                r#""segments":[]"#,
                ErrorKind::Corrupt,
                "no digest tells the key of segment 0",
            ),
            (
                r#""16777216""#,
                r#""-1""#,
                ErrorKind::Corrupt,
                "offset of the segment is \"-1\", expected a number",
            ),
            (
                r#""time":4"#,
                r#""time":-4"#,
                ErrorKind::Corrupt,
                "JSON of the LUKS2 header is not valid",
            ),
        ];
        for (from, to, kind, expected) in cases {
            let text = GOOD.replacen(from, to, 1);
            assert_ne!(text, GOOD, "{from}");
            let error =
                Metadata::parse(text.as_bytes()).and_then(Metadata::into_header).unwrap_err();
            assert_eq!((error.kind(), error.to_string().as_str()), (kind, expected));
        }
    }
}
