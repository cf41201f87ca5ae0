// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking at a server's exports without using one.

use super::ClientOptions;
use super::facts::Facts;
use super::handshake::{Greeted, MOST_REPLIES, endless};
use super::option::{answer, ask};
use super::stream::{Address, Socket};
use crate::wire::{MAX_STRING, option, option_reply};
use tranship_block::{BigEndian, Error, ErrorKind, Result};

/// What a server offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Its exports, in its own order.
    pub exports: Vec<ListedExport>,
    /// The connection was encrypted.
    pub tls: bool,
    /// The server can reply in chunks.
    pub structured: bool,
    /// The server knows 64-bit lengths.
    pub extended: bool,
}

/// One export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: String,
    /// A text for people, often empty.
    pub description: String,
    /// More about it, if the server tells.
    pub facts: Option<Facts>,
    /// All its metadata contexts.
    pub contexts: Vec<String>,
}

/// Asks the server at `address` for all its exports; the name in `options` plays no part.
///
/// # Errors
///
/// As [`super::Remote::connect`], and [`ErrorKind::Denied`] if the server does not list.
pub fn list_exports(address: &Address, options: &ClientOptions) -> Result<Listing> {
    let mut greeted = greet(address, options)?;
    let names = names(&mut greeted)?;
    let exports = names
        .into_iter()
        .map(|(name, text)| look(&mut greeted, name, text))
        .collect::<Result<_>>()?;
    let listing = Listing {
        exports,
        tls: greeted.tls,
        structured: greeted.structured,
        extended: greeted.extended,
    };
    greeted.abort();
    Ok(listing)
}

/// Asks the server at `address` about the export that `options` name, whether or not it is
/// in its list.
///
/// # Errors
///
/// As [`super::Remote::connect`].
pub fn describe_export(address: &Address, options: &ClientOptions) -> Result<ListedExport> {
    let mut greeted = greet(address, options)?;
    let facts = greeted.info(option::INFO, &options.export)?;
    let contexts = contexts(&mut greeted, &options.export)?;
    greeted.abort();
    Ok(ListedExport {
        name: options.export.clone(),
        description: facts.description.clone().unwrap_or_default(),
        facts: Some(facts),
        contexts,
    })
}

fn greet(address: &Address, options: &ClientOptions) -> Result<Greeted> {
    let socket = Socket::connect(address, options.timeout)?;
    let greeted = Greeted::over(&socket, address.host(), options)?;
    if !greeted.fixed {
        return Err(Error::unsupported(
            "the NBD server knows nothing but the name of an export: its handshake is too old",
        ));
    }
    Ok(greeted)
}

fn names(greeted: &mut Greeted) -> Result<Vec<(String, String)>> {
    ask(&mut greeted.stream, option::LIST, &[])?;
    let mut names = Vec::new();
    for _ in 0..MOST_REPLIES {
        let reply = answer(&mut greeted.stream, option::LIST)?;
        match reply.kind {
            option_reply::SERVER => names.push(name_and_text(&reply.data)?),
            option_reply::ACK => return Ok(names),
            _ => return Err(reply.refusal("a list of its exports")),
        }
    }
    Err(endless())
}

fn name_and_text(data: &[u8]) -> Result<(String, String)> {
    let len = BigEndian(data, "name of an export").u32("length", 0)?;
    let rest = data.get(4..).unwrap_or_default();
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    match rest.split_at_checked(len) {
        Some((name, text)) if len <= MAX_STRING => Ok((
            String::from_utf8_lossy(name).into_owned(),
            String::from_utf8_lossy(text).into_owned(),
        )),
        _ => Err(Error::corrupt(format!(
            "name of an export has {len} bytes, and {} have come with it",
            rest.len()
        ))),
    }
}

fn look(greeted: &mut Greeted, name: String, text: String) -> Result<ListedExport> {
    let facts = match greeted.info(option::INFO, &name) {
        Ok(facts) => Some(facts),
        // It may be gone by now, be hidden, or the server does not know how to tell.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::Unsupported | ErrorKind::Denied
            ) =>
        {
            None
        }
        Err(error) => return Err(error),
    };
    let contexts = if facts.is_some() { contexts(greeted, &name)? } else { Vec::new() };
    let description = match &facts {
        Some(Facts { description: Some(longer), .. }) if text.is_empty() => longer.clone(),
        _ => text,
    };
    Ok(ListedExport { name, description, facts, contexts })
}

/// Without a query, a server tells all that it has.
fn contexts(greeted: &mut Greeted, export: &str) -> Result<Vec<String>> {
    if !greeted.structured {
        return Ok(Vec::new());
    }
    let found = greeted.contexts(option::LIST_META_CONTEXT, export, &[])?;
    Ok(found.into_iter().map(|(_, name)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_names_are_not_believed() {
        let entry = |len: u32, rest: &[u8]| [&len.to_be_bytes()[..], rest].concat();
        let found = name_and_text(&entry(3, b"vdaa disk")).unwrap();
        assert_eq!(found, ("vda".to_owned(), "a disk".to_owned()));
        let long = vec![b'a'; 5000];
        for data in [entry(4, b"vda"), entry(u32::MAX, b"vda"), entry(4097, &long), vec![0, 0, 0]] {
            name_and_text(&data).unwrap_err();
        }
    }
}
