// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Options with dots in their names, flattened from either syntax.

use serde_json::Value;
use std::collections::BTreeMap;
use tranship_block::{Error, Result};

/// Objects inside objects: QEMU's own names are three deep.
const DEEPEST: usize = 16;

/// Options by their full names: `file.driver`. A JSON `null` has no value.
#[derive(Debug, Default)]
pub(super) struct Nested(BTreeMap<String, Option<String>>);

impl Nested {
    pub(super) fn from_json(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| Error::usage("could not parse the JSON options").because(error))?;
        if !value.is_object() {
            return Err(Error::usage("the JSON options are no object"));
        }
        let mut options = Self::default();
        options.add("", &value, DEEPEST)?;
        Ok(options)
    }

    fn add(&mut self, key: &str, value: &Value, room: usize) -> Result<()> {
        let deeper = room
            .checked_sub(1)
            .ok_or_else(|| Error::usage(format!("option '{key}' is nested too deeply")))?;
        let below =
            |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
        let plain = match value {
            Value::Object(members) => {
                for (name, value) in members {
                    self.add(&below(name), value, deeper)?;
                }
                return Ok(());
            }
            Value::Array(items) => {
                for (number, value) in items.iter().enumerate() {
                    self.add(&below(&number.to_string()), value, deeper)?;
                }
                return Ok(());
            }
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            Value::Bool(true) => Some("on".to_owned()),
            Value::Bool(false) => Some("off".to_owned()),
            Value::Number(number) => Some(number.to_string()),
        };
        self.0.insert(key.to_owned(), plain);
        Ok(())
    }

    /// `a=b,c.d=e`; two commas are one that belongs to the value.
    pub(super) fn from_options(text: &str) -> Result<Self> {
        let mut options = Self::default();
        let mut rest = text;
        while !rest.is_empty() {
            let mut part = String::new();
            loop {
                let Some(comma) = rest.find(',') else {
                    part.push_str(rest);
                    rest = "";
                    break;
                };
                let (before, after) = rest.split_at(comma);
                part.push_str(before);
                if let Some(after) = after.strip_prefix(",,") {
                    part.push(',');
                    rest = after;
                } else {
                    rest = after.strip_prefix(',').unwrap_or_default();
                    break;
                }
            }
            let (key, value) = part.split_once('=').ok_or_else(|| {
                Error::usage(format!("expected '=' after parameter '{part}' in {text:?}"))
            })?;
            options.0.insert(key.to_owned(), Some(value.to_owned()));
        }
        Ok(options)
    }

    /// The value of `key`, which is then gone.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        match self.0.get(key) {
            Some(Some(_)) => self.0.remove(key).flatten(),
            _ => None,
        }
    }

    /// Whether `key` was `null`; it is then gone.
    pub(super) fn take_null(&mut self, key: &str) -> bool {
        let is_null = matches!(self.0.get(key), Some(None));
        if is_null {
            self.0.remove(key);
        }
        is_null
    }

    /// Whether there are options of the node `key`.
    pub(super) fn has_below(&self, key: &str) -> bool {
        let start = format!("{key}.");
        self.0.keys().any(|name| name.starts_with(&start))
    }

    /// The options of the node `key`, without its name in front; they are then gone.
    pub(super) fn take_below(&mut self, key: &str) -> Self {
        let start = format!("{key}.");
        let (below, rest) = std::mem::take(&mut self.0)
            .into_iter()
            .partition::<BTreeMap<_, _>, _>(|(name, _)| name.starts_with(&start));
        self.0 = rest;
        let strip = |(name, value): (String, _)| {
            (name.strip_prefix(&start).unwrap_or(&name).to_owned(), value)
        };
        Self(below.into_iter().map(strip).collect())
    }

    /// An option that nobody took.
    pub(super) fn first_left(&self) -> Option<&str> {
        self.0.keys().next().map(String::as_str)
    }
}
