// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Passphrases from `--object secret,…`, and clients' credentials for TLS.

use super::options;
use crate::failure::Failure;
use crate::tls::{X509, refuse_other};
use tranship_formats::Secrets;

/// A passphrase is not a disk: more than this is a mistake.
const LARGEST: u64 = 2 << 20;

/// The secrets that these objects are. Messages never contain one.
pub(crate) fn parse(objects: &[String]) -> Result<Secrets, Failure> {
    let mut secrets = Secrets::default();
    for object in objects {
        let (kind, parts) = kind_of(object)?;
        refuse_other(&kind)?;
        match kind.as_str() {
            "secret" => {
                let (id, secret) = one(parts)?;
                secrets.insert(id, secret);
            }
            "tls-creds-x509" => {
                let x509 = X509::parse(parts)?;
                let tls = x509.client()?;
                secrets.insert_tls(x509.id, tls);
            }
            _ => {
                let text = format!("Parameter 'qom-type' does not accept value '{kind}'");
                return Err(Failure::usage(text).hint(
                    "objects are secret,id=ID,file=FILE and \
                     tls-creds-x509,id=ID,endpoint=client,dir=DIR",
                ));
            }
        }
    }
    Ok(secrets)
}

/// The type of an object, and the rest of its words.
pub(crate) fn kind_of(
    object: &str,
) -> Result<(String, impl Iterator<Item = (String, Option<String>)> + use<>), Failure> {
    let mut parts = options::split(object).into_iter();
    match parts.next() {
        Some((kind, None)) => Ok((kind, parts)),
        Some((name, Some(kind))) if name == "qom-type" => Ok((kind, parts)),
        _ => Err(Failure::usage("Parameter 'qom-type' is missing")),
    }
}

fn one(
    parts: impl Iterator<Item = (String, Option<String>)>,
) -> Result<(String, Vec<u8>), Failure> {
    let (mut id, mut data, mut file, mut base64) = (None, None, None, false);
    for (name, value) in parts {
        let value = value.unwrap_or_else(|| "on".to_owned());
        match name.as_str() {
            "id" => id = Some(value),
            "data" => data = Some(value),
            "file" => file = Some(value),
            "format" => {
                base64 = match value.as_str() {
                    "raw" => false,
                    "base64" => true,
                    _ => {
                        return Err(Failure::usage(format!(
                            "Parameter 'format' does not accept value '{value}'"
                        )));
                    }
                }
            }
            "keyid" | "iv" => {
                return Err(Failure::usage("secrets that are encrypted themselves cannot be read")
                    .hint("put the passphrase into a file that only its user can read"));
            }
            _ => return Err(Failure::usage(format!("Parameter '{name}' is unexpected"))),
        }
    }
    let id = id.ok_or_else(|| Failure::usage("Parameter 'id' is missing"))?;
    let bytes = match (data, file) {
        (Some(_), Some(_)) => {
            return Err(Failure::usage("'file' and 'data' are mutually exclusive"));
        }
        (None, None) => return Err(Failure::usage("Either 'file' or 'data' must be provided")),
        (Some(data), None) => data.into_bytes(),
        (None, Some(file)) => read(&file)?,
    };
    let bytes = if base64 {
        decode(&bytes).ok_or_else(|| Failure::usage(format!("secret '{id}' is not in base64")))?
    } else {
        bytes
    };
    Ok((id, bytes))
}

fn read(file: &str) -> Result<Vec<u8>, Failure> {
    use std::io::Read;
    let failed =
        |error: std::io::Error| Failure::usage(format!("Unable to read {file}")).because(&error);
    let mut bytes = Vec::new();
    let open = std::fs::File::open(file).map_err(failed)?;
    open.take(LARGEST + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > LARGEST {
        return Err(Failure::usage(format!("Unable to read {file}: it is too large for a secret")));
    }
    Ok(bytes)
}

/// What base64 text means; spaces and lines do not matter.
fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut held, mut bits, mut padding) = (0_u32, 0, 0);
    for letter in text.iter().filter(|letter| !letter.is_ascii_whitespace()) {
        let six = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                padding += 1;
                continue;
            }
            _ => return None,
        };
        if padding > 0 {
            return None;
        }
        held = (held << 6 | u32::from(six)) & 0xfff;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(held >> bits & 0xff).ok()?);
        }
    }
    (padding <= 2 && bits < 6).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_come_as_text_or_from_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, b"geheim\n").unwrap();
        let cases = [
            ("secret,id=a,data=x,,y".to_owned(), &b"x,y"[..]),
            ("qom-type=secret,id=a,data=x".to_owned(), b"x"),
            ("secret,id=a,data=Z2VoZWlt,format=base64".to_owned(), b"geheim"),
            (format!("secret,id=a,file={}", path.display()), b"geheim\n"),
        ];
        for (object, expected) in cases {
            let secrets = parse(std::slice::from_ref(&object)).unwrap();
            assert_eq!(secrets.get("a").unwrap(), expected, "{object}");
        }
    }

    #[test]
    fn mistakes_are_named_without_the_secret() {
        for (object, expected) in [
            ("foo", "Parameter 'qom-type' does not accept value 'foo'"),
            ("tls-creds-x509,dir=/nowhere", "Parameter 'id' is missing"),
            ("tls-creds-x509,id=a", "Missing 'dir' property value"),
            (
                "tls-creds-x509,id=a,dir=/nowhere,endpoint=server",
                "Expected TLS credentials for a client endpoint",
            ),
            (
                "tls-creds-x509,id=a,dir=x,endpoint=foo",
                "Parameter 'endpoint' does not accept value 'foo'",
            ),
            (
                "tls-creds-x509,id=a,dir=x,verify-peer=foo",
                "Parameter 'verify-peer' expects 'on' or 'off'",
            ),
            ("tls-creds-x509,id=a,dir=x,foo=1", "Parameter 'foo' is unexpected"),
            ("tls-creds-psk,id=a,dir=x", "there are no tls-creds-psk here, but certificates"),
            ("secret", "Parameter 'id' is missing"),
            ("secret,id=a", "Either 'file' or 'data' must be provided"),
            ("secret,id=a,data=geheim,file=y", "'file' and 'data' are mutually exclusive"),
            ("secret,id=a,data=geheim,foo=1", "Parameter 'foo' is unexpected"),
            ("secret,id=a,data=ge?eim,format=base64", "secret 'a' is not in base64"),
            ("secret,id=a,file=/nowhere/key", "Unable to read /nowhere/key"),
        ] {
            let failure = parse(&[object.to_owned()]).unwrap_err();
            assert_eq!(failure.message(), expected);
            assert!(!failure.render("p").contains("geheim"), "{object}");
        }
    }
}
