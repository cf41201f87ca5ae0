// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The name in a certificate, as text that rules can be written for.
//!
//! The text is the one that GnuTLS makes and QEMU's rules have: the parts in the order of
//! the certificate, as in `C=GB,O=Example,CN=host`, escaped as RFC 4514 has it.

use std::fmt::Write;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
/// The context-specific tag of a certificate's version.
const VERSION: u8 = 0xa0;

/// What comes after the first two numbers, 2.5.4, of usual attributes.
const USUAL: &[(u8, &str)] = &[
    (3, "CN"),
    (4, "surName"),
    (5, "serialNumber"),
    (6, "C"),
    (7, "L"),
    (8, "ST"),
    (9, "STREET"),
    (10, "O"),
    (11, "OU"),
    (12, "title"),
    (42, "givenName"),
];

/// Other attributes by their whole identifier.
const OTHERS: &[(&[u8], &str)] = &[
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x01], "EMAIL"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x01, 0x19], "DC"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x01, 0x01], "UID"),
];

/// The distinguished name of the subject of a certificate in DER; `None` if the bytes are no
/// certificate.
pub(super) fn of(certificate: &[u8]) -> Option<String> {
    let mut whole = Der(certificate);
    let mut certificate = Der(whole.take(SEQUENCE)?);
    let mut fields = Der(certificate.take(SEQUENCE)?);
    if fields.tag() == Some(VERSION) {
        fields.next()?;
    }
    // Serial number, algorithm, issuer and validity come before it.
    for _ in 0..4 {
        fields.next()?;
    }
    let mut subject = Der(fields.take(SEQUENCE)?);
    let mut text = String::new();
    while subject.tag().is_some() {
        if !text.is_empty() {
            text.push(',');
        }
        let mut together = Der(subject.take(SET)?);
        let mut is_first = true;
        while together.tag().is_some() {
            if !is_first {
                text.push('+');
            }
            is_first = false;
            let mut attribute = Der(together.take(SEQUENCE)?);
            push_kind(&mut text, attribute.take(OBJECT_IDENTIFIER)?)?;
            text.push('=');
            let encoded = attribute.0;
            let (tag, value) = attribute.next()?;
            if let Some(value) = readable(tag, value) {
                push_escaped(&mut text, &value);
            } else {
                text.push('#');
                push_hex(&mut text, encoded)?;
            }
        }
    }
    Some(text)
}

/// Values one after the other, in DER.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    fn tag(&self) -> Option<u8> {
        self.0.first().copied()
    }

    /// Tag and content of the next value.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[tag, short], rest) = self.0.split_first_chunk::<2>()?;
        let (len, rest) = if short < 0x80 {
            (usize::from(short), rest)
        } else {
            let (digits, rest) = rest.split_at_checked(usize::from(short & 0x7f))?;
            if digits.is_empty() || digits.len() > 4 {
                return None;
            }
            let len = digits.iter().fold(0_u64, |len, digit| len << 8 | u64::from(*digit));
            (usize::try_from(len).ok()?, rest)
        };
        let (content, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some((tag, content))
    }

    /// Content of the next value, which has to have this tag.
    fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        let (found, content) = self.next()?;
        (found == tag).then_some(content)
    }
}

fn push_kind(text: &mut String, identifier: &[u8]) -> Option<()> {
    let usual = match identifier {
        [0x55, 0x04, last] => USUAL.iter().find(|(number, _)| number == last),
        _ => None,
    };
    let other = || OTHERS.iter().find(|(known, _)| *known == identifier).map(|(_, name)| *name);
    match usual.map(|(_, name)| *name).or_else(other) {
        Some(name) => text.push_str(name),
        None => push_dotted(text, identifier)?,
    }
    Some(())
}

/// An identifier as numbers with dots in between.
fn push_dotted(text: &mut String, identifier: &[u8]) -> Option<()> {
    let (mut number, mut is_first) = (0_u64, true);
    for byte in identifier {
        number = number.checked_mul(128)?.checked_add(u64::from(byte & 0x7f))?;
        if byte & 0x80 != 0 {
            continue;
        }
        if is_first {
            let first = (number / 40).min(2);
            let second = number.checked_sub(first.checked_mul(40)?)?;
            write!(text, "{first}.{second}").ok()?;
        } else {
            write!(text, ".{number}").ok()?;
        }
        (number, is_first) = (0, false);
    }
    Some(())
}

fn push_hex(text: &mut String, bytes: &[u8]) -> Option<()> {
    bytes.iter().try_for_each(|byte| write!(text, "{byte:02X}").ok())
}

/// The text of a value whose type has text.
fn readable(tag: u8, value: &[u8]) -> Option<String> {
    match tag {
        // UTF8String; NumericString, PrintableString and IA5String have nothing but ASCII.
        0x0c | 0x12 | 0x13 | 0x16 => String::from_utf8(value.to_vec()).ok(),
        // TeletexString is Latin-1 for everybody who ever used it.
        0x14 => Some(value.iter().copied().map(char::from).collect()),
        // BMPString.
        0x1e => {
            let (units, []) = value.as_chunks::<2>() else { return None };
            let units: Vec<u16> = units.iter().map(|unit| u16::from_be_bytes(*unit)).collect();
            String::from_utf16(&units).ok()
        }
        _ => None,
    }
}

fn push_escaped(text: &mut String, value: &str) {
    let last = value.chars().count().saturating_sub(1);
    for (at, letter) in value.chars().enumerate() {
        let is_outer_space = letter == ' ' && (at == 0 || at == last);
        match letter {
            '\0' => text.push_str("\\00"),
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => text.extend(['\\', letter]),
            '#' if at == 0 => text.push_str("\\#"),
            _ if is_outer_space => text.push_str("\\ "),
            _ => text.push(letter),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, content: &[u8]) -> Vec<u8> {
        let len = u8::try_from(content.len()).unwrap();
        let head = if len < 0x80 { vec![tag, len] } else { vec![tag, 0x81, len] };
        [&head, content].concat()
    }

    fn attribute(kind: &[u8], tag: u8, value: &[u8]) -> Vec<u8> {
        der(SEQUENCE, &[der(OBJECT_IDENTIFIER, kind), der(tag, value)].concat())
    }

    fn certificate(parts: &[Vec<u8>]) -> Vec<u8> {
        let parts: Vec<u8> = parts.iter().flat_map(|part| der(SET, part)).collect();
        let fields = [
            der(VERSION, &der(2, &[2])),
            der(2, &[1]),
            der(SEQUENCE, &[]),
            der(SEQUENCE, &[]),
            der(SEQUENCE, &[]),
            der(SEQUENCE, &parts),
        ];
        der(SEQUENCE, &der(SEQUENCE, &fields.concat()))
    }

    #[test]
    fn names_are_told_in_the_order_of_the_certificate() {
        let both =
            [attribute(&[0x55, 4, 3], 0x0c, b"a"), attribute(&[0x55, 4, 11], 0x13, b"b")].concat();
        let cases: [(&[Vec<u8>], &str); 6] = [
            (&[], ""),
            (
                &[attribute(&[0x55, 4, 6], 0x13, b"GB"), attribute(&[0x55, 4, 3], 0x0c, b"host")],
                "C=GB,CN=host",
            ),
            (&[both], "CN=a+OU=b"),
            (&[attribute(&[0x55, 4, 10], 0x0c, b" #a, b+\"c\" ")], "O=\\ #a\\, b\\+\\\"c\\\"\\ "),
            (&[attribute(&[0x55, 4, 3], 0x1e, &[0, b'x', 0x20, 0xac])], "CN=x\u{20ac}"),
            (&[attribute(&[0x2a, 0x86, 0x48, 5], 2, &[7])], "1.2.840.5=#020107"),
        ];
        for (parts, expected) in cases {
            assert_eq!(of(&certificate(parts)).as_deref(), Some(expected));
        }
    }

    #[test]
    fn broken_certificates_have_no_name() {
        let good = certificate(&[attribute(&[0x55, 4, 3], 0x0c, b"host")]);
        for len in 0..good.len() {
            assert_eq!(of(&good[..len]), None, "{len} bytes");
        }
        for at in 0..good.len() {
            // Whatever comes out, nothing breaks.
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            let _ = of(&bad);
        }
    }
}
