// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Results as JSON and as indented text, byte for byte as scripts get them from qemu-img.
//!
//! Keys come in the order that qemu-img's hash table gives them: some readers of the text
//! look for a line after another.

use std::fmt::Write;

/// Keys in the order in which they are printed. Others follow, in the order of insertion.
#[rustfmt::skip]
const ORDER: &[&str] = &[
    "ivgen-alg", "compat", "icount", "flags", "vm-clock-nsec", "detached-header",
    "image-end-offset", "name", "active", "port", "compressed-clusters", "hash-alg", "iters",
    "compression-type", "compressed", "cid", "lazy-refcounts", "date-sec", "bitmaps",
    "cipher-alg", "refcount-bits", "parent-cid", "uuid", "total-clusters", "offset",
    "corruptions", "data-file", "ivgen-hash-alg", "corruptions-fixed", "check-errors",
    "children", "backing-filename-format", "host", "date-nsec", "driver", "granularity",
    "required", "leaks", "create-type", "path", "snapshots", "key-offset", "leaks-fixed",
    "allocated-clusters", "virtual-size", "filename", "cluster-size", "size", "export",
    "fully-allocated", "format", "encrypt", "server", "actual-size", "data-file-raw",
    "format-specific", "full-backing-filename", "cipher-mode", "stripes", "slots",
    "vm-clock-sec", "payload-offset", "encrypted", "type", "extents", "master-key-iters",
    "file", "backing-filename", "corrupt", "fragmented-clusters", "id", "vm-state-size",
    "info", "key-secret", "dirty-flag", "extended-l2", "data",
];

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(i128),
    /// Text.
    Text(String),
    /// Values in a row.
    List(Vec<Json>),
    /// Values with names.
    Object(Object),
}

/// Values with names, in the order in which they are printed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Object(Vec<(&'static str, Json)>);

impl Object {
    /// Adds a value.
    pub(crate) fn set(&mut self, key: &'static str, value: impl Into<Json>) -> &mut Self {
        let place = |key: &str| ORDER.iter().position(|known| *known == key).unwrap_or(ORDER.len());
        let at = self.0.partition_point(|(other, _)| place(other) <= place(key));
        self.0.insert(at, (key, value.into()));
        self
    }

    /// Adds a value if there is one.
    pub(crate) fn set_some(
        &mut self,
        key: &'static str,
        value: Option<impl Into<Json>>,
    ) -> &mut Self {
        if let Some(value) = value {
            self.set(key, value);
        }
        self
    }
}

impl From<bool> for Json {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u64> for Json {
    fn from(value: u64) -> Self {
        Self::Number(value.into())
    }
}

impl From<u32> for Json {
    fn from(value: u32) -> Self {
        Self::Number(value.into())
    }
}

impl From<&str> for Json {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Json {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<Object> for Json {
    fn from(value: Object) -> Self {
        Self::Object(value)
    }
}

impl From<Vec<Json>> for Json {
    fn from(value: Vec<Json>) -> Self {
        Self::List(value)
    }
}

impl Json {
    /// As JSON, four spaces deep a level, with a newline at the end.
    pub(crate) fn pretty(&self) -> String {
        let mut text = String::new();
        self.write(&mut text, Some(0));
        text.push('\n');
        text
    }

    /// As JSON on one line.
    pub(crate) fn line(&self) -> String {
        let mut text = String::new();
        self.write(&mut text, None);
        text
    }

    fn write(&self, text: &mut String, depth: Option<usize>) {
        match self {
            Self::Bool(value) => {
                let _ = write!(text, "{value}");
            }
            Self::Number(value) => {
                let _ = write!(text, "{value}");
            }
            Self::Text(value) => quote(text, value),
            Self::List(values) => {
                text.push('[');
                for (at, value) in values.iter().enumerate() {
                    separate(text, at, depth);
                    value.write(text, depth.map(|depth| depth + 1));
                }
                close(text, depth, ']');
            }
            Self::Object(Object(values)) => {
                text.push('{');
                for (at, (key, value)) in values.iter().enumerate() {
                    separate(text, at, depth);
                    quote(text, key);
                    text.push_str(": ");
                    value.write(text, depth.map(|depth| depth + 1));
                }
                close(text, depth, '}');
            }
        }
    }

    /// As text for people: one line a value, `depth` levels deep.
    pub(crate) fn describe(&self, text: &mut String, depth: usize) {
        match self {
            Self::Bool(value) => {
                let _ = write!(text, "{value}");
            }
            Self::Number(value) => {
                let _ = write!(text, "{value}");
            }
            Self::Text(value) => text.push_str(value),
            Self::List(values) => {
                for (at, value) in values.iter().enumerate() {
                    describe_item(text, &format!("[{at}]"), value, depth);
                }
            }
            Self::Object(Object(values)) => {
                for (key, value) in values {
                    describe_item(text, &key.replace('-', " "), value, depth);
                }
            }
        }
    }
}

fn describe_item(text: &mut String, name: &str, value: &Json, depth: usize) {
    let is_nested = matches!(value, Json::List(_) | Json::Object(_));
    let end = if is_nested { "\n" } else { " " };
    let _ = write!(text, "{:indent$}{name}:{end}", "", indent = depth * 4);
    value.describe(text, depth + 1);
    if !is_nested {
        text.push('\n');
    }
}

fn separate(text: &mut String, at: usize, depth: Option<usize>) {
    if at > 0 {
        text.push_str(if depth.is_some() { "," } else { ", " });
    }
    if let Some(depth) = depth {
        let _ = write!(text, "\n{:indent$}", "", indent = (depth + 1) * 4);
    }
}

fn close(text: &mut String, depth: Option<usize>, bracket: char) {
    if let Some(depth) = depth {
        let _ = write!(text, "\n{:indent$}", "", indent = depth * 4);
    }
    text.push(bracket);
}

fn quote(text: &mut String, value: &str) {
    text.push('"');
    for letter in value.chars() {
        match letter {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            ' '..='~' => text.push(letter),
            _ => {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    let _ = write!(text, "\\u{unit:04X}");
                }
            }
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Json {
        let mut inner = Object::default();
        inner
            .set("name", "bm0")
            .set("flags", vec![Json::from("auto")])
            .set("granularity", 65_536_u32);
        let mut outer = Object::default();
        outer
            .set("zebra", "last")
            .set("data", Object::default())
            .set("bitmaps", vec![Json::from(inner)])
            .set("compat", "1.1")
            .set("children", Vec::new())
            .set_some("corrupt", None::<bool>);
        outer.into()
    }

    #[test]
    fn json_is_indented_and_ordered_as_by_qemu_img() {
        let expected = r#"{
    "compat": "1.1",
    "bitmaps": [
        {
            "flags": [
                "auto"
            ],
            "name": "bm0",
            "granularity": 65536
        }
    ],
    "children": [
    ],
    "data": {
    },
    "zebra": "last"
}
"#;
        assert_eq!(example().pretty(), expected);
        let line = r#"{"compat": "1.1", "bitmaps": [{"flags": ["auto"], "name": "bm0", "granularity": 65536}], "children": [], "data": {}, "zebra": "last"}"#;
        assert_eq!(example().line(), line);
    }

    #[test]
    fn people_get_lines() {
        let mut text = String::new();
        example().describe(&mut text, 1);
        let expected = "    compat: 1.1\n    bitmaps:\n        [0]:\n            flags:\n                \
                        [0]: auto\n            name: bm0\n            granularity: 65536\n    \
                        children:\n    data:\n    zebra: last\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn only_plain_letters_are_left_as_they_are() {
        let text = Json::from("a\"\\\n\u{1}é𝄞\u{7f}").line();
        assert_eq!(text, r#""a\"\\\n\u0001\u00E9\uD834\uDD1E\u007F""#);
    }
}
