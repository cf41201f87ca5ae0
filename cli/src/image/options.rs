// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lists such as `cluster_size=64k,lazy_refcounts=on`, and what the formats take in them.

mod tables;

pub(crate) use tables::{Described, Kind, amendable, creatable};

use super::sizes;
use crate::failure::Failure;
use std::fmt::Write;

/// What is said about a size that is none.
pub(crate) const NO_SIZE: &str = "expects a non-negative number below 2^64";
/// What helps then.
pub(crate) const SUFFIXES: &str = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, \
                                   tera-, peta-\nand exabytes, respectively.";

/// The value of an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// Any text.
    Text(String),
    /// `on` or `off`.
    Switch(bool),
    /// A number, of bytes or of anything else.
    Number(u64),
}

/// Options that were given, checked against what a format takes.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    known: Vec<&'static Described>,
    given: Vec<(&'static str, Value)>,
}

/// The names and values in `text`; commas that belong to a value are doubled.
///
/// A name without a value means `on`; with `no` in front that is not part of a known name,
/// `off`.
pub(crate) fn split(text: &str) -> Vec<(String, Option<String>)> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(letter);
        }
    }
    parts
        .into_iter()
        .map(|part| match part.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (part, None),
        })
        .collect()
}

/// All values of a repeated `-o` as one list.
///
/// # Errors
///
/// A list that starts or ends with a comma: the next one would become part of it.
pub(crate) fn joined(lists: &[String]) -> Result<Option<String>, Failure> {
    for list in lists {
        let doubled = list.strip_suffix(',').is_some_and(|rest| rest.ends_with(','));
        if list.is_empty() || list.starts_with(',') || list.ends_with(',') && !doubled {
            return Err(Failure::usage(format!("Invalid option list: {list}")));
        }
    }
    Ok((!lists.is_empty()).then(|| lists.join(",")))
}

/// Whether a list asks for help instead of setting anything.
pub(crate) fn asks_for_help(list: &str) -> bool {
    split(list).iter().any(|(name, value)| value.is_none() && matches!(name.as_str(), "help" | "?"))
}

impl Options {
    /// No options yet, of those in `known`.
    pub(crate) fn new(known: Vec<&'static Described>) -> Self {
        Self { known, given: Vec::new() }
    }

    /// Adds those in `list`; of equal names the last one counts.
    ///
    /// # Errors
    ///
    /// Unknown names, and values of the wrong type.
    pub(crate) fn add(&mut self, list: &str) -> Result<(), Failure> {
        for (name, value) in split(list) {
            if name.is_empty() && value.is_none() {
                continue;
            }
            let found = self.known.iter().find(|known| known.name == name);
            let (known, value) = match (found, value) {
                (Some(known), value) => (*known, value.unwrap_or_else(|| "on".to_owned())),
                (None, None) => match name.strip_prefix("no").and_then(|name| self.find(name)) {
                    Some(known) => (known, "off".to_owned()),
                    None => return Err(unknown(&name)),
                },
                (None, Some(_)) => return Err(unknown(&name)),
            };
            let value = known.kind.parse(known.name, value)?;
            self.set(known.name, value);
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Option<&'static Described> {
        self.known.iter().find(|known| known.name == name).copied()
    }

    /// Sets an option that the format knows; others are left out.
    pub(crate) fn set(&mut self, name: &'static str, value: Value) {
        if self.find(name).is_some() {
            self.given.retain(|(given, _)| *given != name);
            self.given.push((name, value));
        }
    }

    /// Whether the format takes this option.
    pub(crate) fn knows(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// The value that was given.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.given.iter().find(|(given, _)| *given == name).map(|(_, value)| value)
    }

    /// The text that was given.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The number that was given.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        match self.get(name)? {
            Value::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// Whether it was switched on.
    pub(crate) fn switch(&self, name: &str) -> Option<bool> {
        match self.get(name)? {
            Value::Switch(on) => Some(*on),
            _ => None,
        }
    }

    /// The names that were given.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.given.iter().map(|(name, _)| *name)
    }

    /// What an image is made with: given options and those with a default.
    pub(crate) fn shown(&self) -> String {
        let mut text = String::new();
        for known in &self.known {
            let value = match (self.get(known.name), known.default) {
                (Some(Value::Text(text)), _) => text.replace(',', ",,"),
                (Some(Value::Switch(on)), _) => (if *on { "on" } else { "off" }).to_owned(),
                (Some(Value::Number(number)), _) => number.to_string(),
                (None, Some(default)) => default.to_owned(),
                (None, None) => continue,
            };
            let space = if text.is_empty() { "" } else { " " };
            let _ = write!(text, "{space}{}={value}", known.name);
        }
        text
    }
}

fn unknown(name: &str) -> Failure {
    Failure::usage(format!("Invalid parameter '{name}'"))
}

impl Kind {
    fn parse(self, name: &str, text: String) -> Result<Value, Failure> {
        let number = || Failure::usage(format!("Parameter '{name}' {NO_SIZE}")).hint(SUFFIXES);
        match self {
            Self::Text => Ok(Value::Text(text)),
            Self::Switch => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Value::Switch(true)),
                "off" | "no" | "false" | "n" => Ok(Value::Switch(false)),
                _ => Err(Failure::usage(format!("Parameter '{name}' expects 'on' or 'off'"))),
            },
            Self::Number => text
                .parse()
                .map(Value::Number)
                .map_err(|_| Failure::usage(format!("Parameter '{name}' expects a number"))),
            Self::Size => sizes::parse(&text).map(Value::Number).map_err(|_| number()),
        }
    }
}

/// The options of `known`, one a line, sorted by name.
pub(crate) fn listed(known: &[&'static Described]) -> String {
    let mut known = known.to_vec();
    known.sort_by_key(|option| option.name);
    let mut text = String::new();
    for option in known {
        let kind = match option.kind {
            Kind::Text => "str",
            Kind::Switch => "bool (on/off)",
            Kind::Number => "num",
            Kind::Size => "size",
        };
        let name = format!("{}=<{kind}>", option.name);
        let _ = writeln!(text, "  {name:<22} - {}", option.help);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_formats::Format;

    fn qcow2(list: &str) -> Result<Options, String> {
        let mut options = Options::new(creatable(Format::Qcow2, true).unwrap());
        options.add(list).map_err(|failure| failure.message().to_owned())?;
        Ok(options)
    }

    #[test]
    fn lists_are_split_at_single_commas() {
        let pair = |name: &str, value: &str| (name.to_owned(), Some(value.to_owned()));
        assert_eq!(split("a=b,c=d"), [pair("a", "b"), pair("c", "d")]);
        assert_eq!(split("a=b,,c,d="), [pair("a", "b,c"), pair("d", "")]);
        assert_eq!(split("a=,,,b=c"), [pair("a", ","), pair("b", "c")]);
        assert_eq!(split("a=b=c"), [pair("a", "b=c")]);
        assert_eq!(split("on"), [("on".to_owned(), None)]);
        assert!(asks_for_help("a=b,help") && asks_for_help("?") && !asks_for_help("help=me"));
    }

    #[test]
    fn lists_that_would_run_into_the_next_are_refused() {
        let given = |lists: &[&str]| lists.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(joined(&[]).unwrap(), None);
        assert_eq!(joined(&given(&["a=b", "c=d"])).unwrap().as_deref(), Some("a=b,c=d"));
        assert_eq!(joined(&given(&["a=b,,"])).unwrap().as_deref(), Some("a=b,,"));
        for wrong in ["", ",", "a=b,", ",a=b"] {
            let failure = joined(&given(&[wrong])).unwrap_err();
            assert_eq!(failure.message(), format!("Invalid option list: {wrong}"));
        }
    }

    #[test]
    fn what_an_image_is_made_with_is_shown_in_qemu_imgs_order() {
        let mut options = qcow2("lazy_refcounts,size=5M,size=6M,data_file=d,,x").unwrap();
        options.set("backing_file", Value::Text("a.q".to_owned()));
        assert_eq!(
            options.shown(),
            "cluster_size=65536 extended_l2=off compression_type=zlib size=6291456 \
             backing_file=a.q data_file=d,,x lazy_refcounts=on refcount_bits=16"
        );
        assert_eq!(qcow2("nolazy_refcounts").unwrap().switch("lazy_refcounts"), Some(false));
    }

    #[test]
    fn wrong_names_and_values_are_named() {
        for (list, expected) in [
            ("foo=1", "Invalid parameter 'foo'"),
            ("foo", "Invalid parameter 'foo'"),
            ("=a", "Invalid parameter ''"),
            ("lazy_refcounts=maybe", "Parameter 'lazy_refcounts' expects 'on' or 'off'"),
            ("encrypt.iter-time=x", "Parameter 'encrypt.iter-time' expects a number"),
            ("size=foo", "Parameter 'size' expects a non-negative number below 2^64"),
            ("cluster_size=", "Parameter 'cluster_size' expects a non-negative number below 2^64"),
        ] {
            assert_eq!(qcow2(list).unwrap_err(), expected, "{list}");
        }
    }

    #[test]
    fn help_is_aligned_and_sorted() {
        let text = listed(&creatable(Format::Vpc, false).unwrap());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("  azure=<bool (on/off)>  - "), "{text}");
        assert!(lines[3].starts_with("  force_size=<bool (on/off)> - "), "{text}");
        assert!(lines[4].starts_with("  size=<size>            - "), "{text}");
        assert!(lines[5].starts_with("  subformat=<str>        - "), "{text}");
    }
}
