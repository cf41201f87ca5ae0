// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The property list: an XML of keys and values, in it the tables as base64.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use roxmltree::{Document, Node, ParsingOptions};
use tranship_block::{Error, Result};

const MAX_NODES: u32 = 1_000_000;

/// The tables of all parts of the disk, in the order of the list.
pub(crate) fn tables(text: &[u8]) -> Result<Vec<Vec<u8>>> {
    let text =
        std::str::from_utf8(text).map_err(|_| Error::corrupt("property list is not UTF-8"))?;
    // Every property list names its document type; the parser bounds what entities make.
    let options =
        ParsingOptions { allow_dtd: true, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text.trim_end_matches('\0'), options)
        .map_err(|error| Error::corrupt("property list is not valid XML").because(error))?;
    let top = document.root_element().first_element_child();
    let blocks = top
        .and_then(|top| value(top, "resource-fork"))
        .and_then(|fork| value(fork, "blkx"))
        .ok_or_else(|| Error::corrupt("property list has no resource-fork with blkx"))?;
    blocks.children().filter(Node::is_element).map(table).collect()
}

fn table(entry: Node) -> Result<Vec<u8>> {
    let data = value(entry, "Data");
    let data = data.ok_or_else(|| Error::corrupt("entry of blkx has no Data"))?;
    let mut text = data.text().unwrap_or_default().as_bytes().to_vec();
    text.retain(|byte| !byte.is_ascii_whitespace());
    STANDARD.decode(text).map_err(|_| Error::corrupt("Data of a blkx entry is not base64"))
}

/// What `key` stands for in a dictionary: the element that follows it.
fn value<'a, 'd>(dictionary: Node<'a, 'd>, key: &str) -> Option<Node<'a, 'd>> {
    dictionary
        .children()
        .find(|node| node.has_tag_name("key") && node.text() == Some(key))?
        .next_sibling_element()
}
