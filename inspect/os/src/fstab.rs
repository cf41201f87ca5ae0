// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables of filesystems and of encrypted volumes: `fstab(5)`, `crypttab(5)`.

use serde::Serialize;
use std::ops::Range;

/// Most lines of a table that are looked at.
const MAX_LINES: usize = 10_000;

/// One line of `/etc/fstab`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Line in the file, counted from 1.
    pub line: usize,
    /// What is mounted: a device, `UUID=`, `LABEL=`, a name on the network.
    pub spec: String,
    /// Where; `none` or `swap` for swap space.
    pub mountpoint: String,
    /// Kind of filesystem.
    pub fstype: String,
    /// Mount options, separated by commas.
    pub options: String,
    /// Whether `dump` saves it.
    pub dump: u32,
    /// In which pass `fsck` checks it.
    pub pass: u32,
    /// Where in the file the spec lies, in bytes.
    #[serde(skip)]
    pub spec_at: Range<usize>,
}

/// One line of `/etc/crypttab`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CryptVolume {
    /// Line in the file, counted from 1.
    pub line: usize,
    /// Name below `/dev/mapper` once it is open.
    pub name: String,
    /// The encrypted device.
    pub device: String,
    /// Key file; `none` where a passphrase is asked for.
    pub key: String,
    /// Options, separated by commas.
    pub options: String,
    /// Where in the file the device lies, in bytes.
    #[serde(skip)]
    pub device_at: Range<usize>,
}

/// The mounts of an `/etc/fstab`.
///
/// Lines with fewer than three fields are skipped, as `mount` does.
pub fn parse_fstab(content: &[u8]) -> Vec<Mount> {
    rows(content)
        .filter_map(|(line, fields)| {
            let field = |n: usize| fields.get(n).map(|at| decoded(content, at));
            Some(Mount {
                line,
                spec: field(0)?,
                mountpoint: field(1)?,
                fstype: field(2)?,
                options: field(3).unwrap_or_else(|| "defaults".to_owned()),
                dump: field(4).and_then(|text| text.parse().ok()).unwrap_or(0),
                pass: field(5).and_then(|text| text.parse().ok()).unwrap_or(0),
                spec_at: fields.first()?.clone(),
            })
        })
        .collect()
}

/// The volumes of an `/etc/crypttab`.
pub fn parse_crypttab(content: &[u8]) -> Vec<CryptVolume> {
    rows(content)
        .filter_map(|(line, fields)| {
            let field = |n: usize| fields.get(n).map(|at| decoded(content, at));
            Some(CryptVolume {
                line,
                name: field(0)?,
                device: field(1)?,
                key: field(2).unwrap_or_else(|| "none".to_owned()),
                options: field(3).unwrap_or_default(),
                device_at: fields.get(1)?.clone(),
            })
        })
        .collect()
}

/// Each line that is no comment: its number and where its fields lie.
fn rows(content: &[u8]) -> impl Iterator<Item = (usize, Vec<Range<usize>>)> {
    let mut start = 0_usize;
    content.split_inclusive(|byte| *byte == b'\n').take(MAX_LINES).enumerate().filter_map(
        move |(index, line)| {
            let fields = fields(line, start);
            start = start.saturating_add(line.len());
            let first = fields.first().and_then(|at| content.get(at.start));
            (first.is_some() && first != Some(&b'#')).then(|| (index.saturating_add(1), fields))
        },
    )
}

fn fields(line: &[u8], start: usize) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut begin = None;
    for (at, byte) in line.iter().enumerate() {
        let at = start.saturating_add(at);
        match (begin, byte.is_ascii_whitespace()) {
            (None, false) => begin = Some(at),
            (Some(from), true) => {
                found.push(from..at);
                begin = None;
            }
            _ => {}
        }
    }
    found.extend(begin.map(|from| from..start.saturating_add(line.len())));
    found
}

/// A field as text, with `\040` and the like turned into what they stand for.
fn decoded(content: &[u8], at: &Range<usize>) -> String {
    let mut rest = content.get(at.clone()).unwrap_or_default();
    let mut bytes = Vec::with_capacity(rest.len());
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.first_chunk::<3>().filter(|digits| byte == b'\\' && is_octal(**digits));
        if let Some(digits) = octal {
            let value = digits.iter().fold(0_u8, |sum, digit| (sum << 3) | (digit & 7));
            bytes.push(value);
            rest = tail.get(3..).unwrap_or_default();
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn is_octal(digits: [u8; 3]) -> bool {
    matches!(digits, [b'0'..=b'3', b'0'..=b'7', b'0'..=b'7'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_their_number_and_the_place_of_the_device() {
        let text = b"# comment\n\n/dev/sda1\t/ ext4  errors=remount-ro 0 1\r\n  LABEL=a\\040b /x\\011y auto";
        let mounts = parse_fstab(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!((mounts[0].line, mounts[0].spec.as_str(), mounts[0].pass), (3, "/dev/sda1", 1));
        assert_eq!(&text[mounts[0].spec_at.clone()], b"/dev/sda1");
        assert_eq!(mounts[1].spec, "LABEL=a b");
        assert_eq!(mounts[1].mountpoint, "/x\ty");
        assert_eq!((mounts[1].options.as_str(), mounts[1].line), ("defaults", 4));
    }

    #[test]
    fn strange_tables_do_not_stop_the_reader() {
        assert_eq!(parse_fstab(b"\xff\xfe /a ext4\none two\n\0\n").len(), 1);
        assert_eq!(parse_fstab(b"\\9 \\04 \\777").len(), 1);
        assert!(parse_fstab(b"").is_empty());
    }

    #[test]
    fn crypttab_lines_need_a_device() {
        let volumes = parse_crypttab(b"root /dev/sda5 none luks,discard\nonly\n");
        assert_eq!(volumes.len(), 1);
        assert_eq!(volumes[0].device, "/dev/sda5");
        assert_eq!(volumes[0].device_at, 5..14);
    }
}
