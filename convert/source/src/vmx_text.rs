// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The text of VMX files: `key = "value"`, one a line.

use crate::{Error, Result};
use std::collections::BTreeMap;

const MAX_KEYS: usize = 20_000;

/// The settings of a VMX file, by keys in lower case.
#[derive(Debug, Default)]
pub(crate) struct Settings(BTreeMap<String, String>);

impl Settings {
    /// Parses the bytes of the file; of a key that comes twice, the last counts.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let lines = || bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).enumerate();
        let encoding = lines()
            .find_map(|(_, line)| match key_value(std::str::from_utf8(line).ok()?)? {
                (key, value) if key == ".encoding" => Some(value.to_ascii_lowercase()),
                _ => None,
            })
            .unwrap_or_else(|| "utf-8".to_owned());
        let mut settings = BTreeMap::new();
        for (number, line) in lines() {
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let line = decode(line, &encoding, number.saturating_add(1))?;
            let Some((key, value)) = key_value(&line) else {
                return Err(Error::corrupt(format!(
                    "VMX line {} is not of the form key = \"value\"",
                    number.saturating_add(1)
                )));
            };
            if settings.len() >= MAX_KEYS {
                return Err(Error::corrupt(format!("VMX file has more than {MAX_KEYS} keys")));
            }
            settings.insert(key, unescape(value));
        }
        Ok(Self(settings))
    }

    /// The value of `key`, which is given in lower case; none if it is empty.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Whether `key` is set to `TRUE`.
    pub(crate) fn is_true(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| value.eq_ignore_ascii_case("true"))
    }

    /// Whether `key` is set to `FALSE`.
    pub(crate) fn is_false(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| value.eq_ignore_ascii_case("false"))
    }

    /// All keys in lower case.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

fn key_value(line: &str) -> Option<(String, &str)> {
    let (key, value) = line.split_once('=')?;
    let value = value.trim();
    let value = match value.strip_prefix('"') {
        Some(quoted) => quoted.strip_suffix('"')?,
        None => value,
    };
    let key = key.trim();
    (!key.is_empty()).then(|| (key.to_ascii_lowercase(), value))
}

/// Replaces `|22` by the character with that number.
fn unescape(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    let mut rest = value;
    while let Some((before, after)) = rest.split_once('|') {
        text.push_str(before);
        let code = after.get(..2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        if let Some(code) = code.filter(|code| code.is_ascii() && *code != 0) {
            text.push(char::from(code));
            rest = after.get(2..).unwrap_or_default();
        } else {
            text.push('|');
            rest = after;
        }
    }
    text.push_str(rest);
    text
}

fn decode(line: &[u8], encoding: &str, number: usize) -> Result<String> {
    match std::str::from_utf8(line) {
        Ok(text) if line.is_ascii() || encoding.starts_with("utf") => Ok(text.to_owned()),
        _ if matches!(encoding, "windows-1252" | "iso-8859-1") => {
            Ok(line.iter().map(|byte| char::from(*byte)).collect())
        }
        _ => Err(Error::unsupported(format!(
            "VMX line {number} has other than ASCII characters that are not {encoding}; save the \
             file as UTF-8 with .encoding = \"UTF-8\""
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_all_kinds() {
        let text =
            b".encoding = \"windows-1252\"\r\n# x\r\n\r\nDisplayName = \"a |22b|22 | gr\xfcn\"\r\n\
            memsize=\"64\"\r\nnumvcpus = 2\r\nfloppy0.present = \"TRUE\"\r\nempty = \"\"\r\n";
        let settings = Settings::parse(text).unwrap();
        assert_eq!(settings.get("displayname"), Some("a \"b\" | grün"));
        assert_eq!(settings.get("memsize"), Some("64"));
        assert_eq!(settings.get("numvcpus"), Some("2"));
        assert!(settings.is_true("floppy0.present") && !settings.is_false("floppy0.present"));
        assert_eq!(settings.get("empty"), None);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, expected) in [
            (&b"a = \"b"[..], "VMX line 1 is not of the form"),
            (b"\nnonsense", "VMX line 2 is not of the form"),
            (b"= \"x\"", "VMX line 1 is not of the form"),
            (b"a = \"\xff\"", "VMX line 1 has other than ASCII"),
        ] {
            let error = Settings::parse(text).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
