// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Values of arguments: lists and booleans.

/// The elements of a list: separated by blanks, with single quotes around blanks.
pub(super) fn list(text: &str) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' if letters.peek() == Some(&'\'') => {
                letters.next();
                word.get_or_insert_default().push('\'');
            }
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' | '\t' if !quoted => found.extend(word.take()),
            letter => word.get_or_insert_default().push(letter),
        }
    }
    if quoted {
        return Err("Runaway quote in string".to_owned());
    }
    found.extend(word);
    Ok(found)
}

/// A boolean in any of guestfish's spellings.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Ok(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Ok(false),
        _ => Err(format!("'{text}': invalid boolean value, use 'true' or 'false'")),
    }
}

/// A device by the API's name: `/dev/vda1` and `/dev/hda1` are `/dev/sda1`.
pub(super) fn device(text: &str) -> String {
    let other = ["/dev/vd", "/dev/hd"].iter().find_map(|prefix| text.strip_prefix(prefix));
    match other {
        Some(rest) if rest.starts_with(|letter: char| letter.is_ascii_lowercase()) => {
            format!("/dev/sd{rest}")
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_quotes_of_their_own() {
        for (text, expected) in [
            ("", &[][..]),
            ("a b  c", &["a", "b", "c"][..]),
            ("sh -c 'echo hi there'", &["sh", "-c", "echo hi there"][..]),
            (r"it\'s ''", &["it's", ""][..]),
            ("a'b c'd", &["ab cd"][..]),
        ] {
            assert_eq!(list(text).unwrap(), expected, "{text}");
        }
        assert_eq!(list("a 'b").unwrap_err(), "Runaway quote in string");
    }

    #[test]
    fn booleans_have_many_names() {
        assert_eq!(boolean("Yes"), Ok(true));
        assert_eq!(boolean("off"), Ok(false));
        assert!(boolean("maybe").is_err());
    }

    #[test]
    fn disks_have_one_name() {
        for (given, expected) in [
            ("/dev/vda1", "/dev/sda1"),
            ("/dev/hdb", "/dev/sdb"),
            ("/dev/sda1", "/dev/sda1"),
            ("/dev/VG/LV", "/dev/VG/LV"),
            ("/dev/vd", "/dev/vd"),
        ] {
            assert_eq!(device(given), expected);
        }
    }
}
