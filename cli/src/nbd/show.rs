// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a server and its exports are, as text and as JSON.

use super::asking::{Export, Protocol};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// An export with what was found out besides.
#[derive(Debug)]
pub(super) struct Shown<'a> {
    pub(super) export: &'a Export,
    pub(super) uri: Option<String>,
    pub(super) content: Option<String>,
}

/// What an export can do, by the names that are shown, in that order.
const FEATURES: [(&str, u16); 10] = [
    ("is_rotational", 1 << 4),
    ("is_read_only", 1 << 1),
    ("can_cache", 1 << 10),
    ("can_df", 1 << 7),
    ("can_fast_zero", 1 << 11),
    ("can_flush", 1 << 2),
    ("can_fua", 1 << 3),
    ("can_multi_conn", 1 << 8),
    ("can_trim", 1 << 5),
    ("can_zero", 1 << 6),
];

/// The value of a feature by the name that `--can` and `--is` have for it; `None` for
/// names that mean nothing.
pub(super) fn feature(name: &str, protocol: Protocol, flags: u16) -> Option<bool> {
    let has = |bit: u16| flags & (1 << bit) != 0;
    let is_writable = !has(1);
    Some(match name.replace('_', "-").as_str() {
        "connect" | "read" => true,
        "tls" => protocol.tls,
        "structured-reply" | "structured" => protocol.structured || protocol.extended,
        "extended-headers" | "extended" => protocol.extended,
        "read-only" | "readonly" | "ro" => !is_writable,
        "write" => is_writable,
        "rotational" => has(4),
        "cache" => has(10),
        "df" => has(7),
        "fast-zero" => has(11),
        "flush" => has(2),
        "fua" => has(3),
        "multi-conn" => has(8),
        "trim" => has(5),
        "zero" => has(6),
        "block-status-payload" => has(12),
        _ => return None,
    })
}

/// How client and server speak, in a line.
pub(super) fn protocol_line(protocol: Protocol) -> String {
    let packets = match protocol {
        Protocol { extended: true, .. } => "extended",
        Protocol { structured: true, .. } => "structured",
        _ => "simple",
    };
    let with = if protocol.tls { "with" } else { "without" };
    format!("protocol: newstyle-fixed {with} TLS, using {packets} packets\n")
}

/// An export as text.
pub(super) fn text(shown: &Shown<'_>) -> String {
    let Shown { export, uri, content } = shown;
    let mut text = format!("export={}:\n", Value::from(export.name.as_str()));
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "\t{name}: {value}");
    };
    if !export.description.is_empty() {
        line("description", &printable(&export.description));
    }
    line("export-size", &sized(export.size));
    if let Some(content) = content {
        line("content", content);
    }
    if let Some(uri) = uri {
        line("uri", uri);
    }
    if !export.contexts.is_empty() {
        let _ = writeln!(text, "\tcontexts:");
        for context in &export.contexts {
            let _ = writeln!(text, "\t\t{}", printable(context));
        }
    }
    for (name, is_set) in features(export) {
        let _ = writeln!(text, "\t{name}: {is_set}");
    }
    for (name, value) in blocks(export) {
        let _ = writeln!(text, "\t{name}: {value}");
    }
    text
}

/// An export as JSON.
pub(super) fn json(shown: &Shown<'_>) -> Value {
    let Shown { export, uri, content } = shown;
    let mut all = Map::new();
    let mut put = |name: &str, value: Value| {
        all.insert(name.to_owned(), value);
    };
    put("export-name", json!(export.name));
    if !export.description.is_empty() {
        put("description", json!(export.description));
    }
    if let Some(content) = content {
        put("content", json!(content));
    }
    if let Some(uri) = uri {
        put("uri", json!(uri));
    }
    put("contexts", json!(export.contexts));
    for (name, is_set) in features(export) {
        put(name, json!(is_set));
    }
    for (name, value) in blocks(export) {
        put(name, json!(value));
    }
    put("export-size", json!(export.size));
    if let Some(short) = short(export.size) {
        put("export-size-str", json!(short));
    }
    Value::Object(all)
}

fn features(export: &Export) -> impl Iterator<Item = (&'static str, bool)> {
    let flags = export.flags;
    FEATURES.into_iter().map(move |(name, bit)| (name, flags & bit != 0))
}

fn blocks(export: &Export) -> Vec<(&'static str, u32)> {
    let Some([minimum, preferred, maximum]) = export.blocks else { return Vec::new() };
    vec![
        ("block_size_minimum", minimum),
        ("block_size_preferred", preferred),
        ("block_size_maximum", maximum),
    ]
}

fn sized(size: u64) -> String {
    match short(size) {
        Some(short) => format!("{size} ({short})"),
        None => size.to_string(),
    }
}

/// The size in the largest unit of which there is a whole number, if that is not a byte.
fn short(size: u64) -> Option<String> {
    let units = ["", "K", "M", "G", "T", "P", "E"];
    let power = match size {
        0 => 0,
        size => usize::try_from(size.trailing_zeros() / 10).ok()?,
    };
    let unit = units.get(power).filter(|unit| !unit.is_empty())?;
    Some(format!("{}{unit}", size >> (10 * power)))
}

/// The text as far as a terminal may have it: it comes from a stranger.
fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shortened_where_nothing_is_lost() {
        for (size, expected) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1024 (1K)"),
            (67_108_864, "67108864 (64M)"),
            (1_049_600, "1049600 (1025K)"),
            (1 << 60, "1152921504606846976 (1E)"),
        ] {
            assert_eq!(sized(size), expected);
        }
    }

    #[test]
    fn features_have_both_spellings() {
        let protocol = Protocol { tls: false, structured: true, extended: false };
        for (name, flags, expected) in [
            ("multi-conn", 1 << 8, Some(true)),
            ("multi_conn", 0, Some(false)),
            ("write", 1 << 1, Some(false)),
            ("read-only", 1 << 1, Some(true)),
            ("structured-reply", 0, Some(true)),
            ("extended-headers", 0, Some(false)),
            ("nonsense", 0xffff, None),
        ] {
            assert_eq!(feature(name, protocol, flags), expected, "{name}");
        }
    }
}
