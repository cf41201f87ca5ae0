// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Header extensions: typed, length-prefixed pieces after the header's fields.

use crate::geometry::to_u64;
use tranship_block::{BigEndian, Error, Result};

const END: u32 = 0;
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
const LUKS_HEADER: u32 = 0x0537_be77;
pub(crate) const DATA_FILE: u32 = 0x4441_5441;

/// Longest name of a backing format that QEMU accepts.
const LONGEST_FORMAT: usize = 15;

/// The extensions that decide whether and how an image can be opened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extensions {
    pub(crate) backing_format: Option<String>,
    pub(crate) data_file: Option<String>,
    /// Offset and length of the LUKS header.
    pub(crate) luks: Option<(u64, u64)>,
    /// Type (0 incompatible, 1 compatible, 2 autoclear), bit, name.
    feature_names: Vec<(u8, u8, String)>,
}

impl Extensions {
    /// Reads the extensions that start at byte `at` of the header's cluster and end, at
    /// the latest, at byte `end`.
    pub(crate) fn read(cluster: &[u8], at: usize, end: usize) -> Result<Self> {
        let area = cluster.get(..end).unwrap_or(cluster);
        let fields = BigEndian(area, "qcow2 header extensions");
        let mut found = Self::default();
        let mut at = at;
        // The end marker may be missing where the backing name or the cluster's end follows.
        while at.saturating_add(8) <= area.len() {
            let kind = fields.u32("type", at)?;
            let length = fields.u32("length", at.saturating_add(4))?;
            if kind == END {
                break;
            }
            let len = usize::try_from(length).unwrap_or(usize::MAX);
            let data = at.saturating_add(8);
            let content = fields.bytes("data", data, len).map_err(|_| {
                Error::corrupt(format!(
                    "header extension {kind:#010x} has {length} bytes and ends past the \
                     header's area of {} bytes",
                    area.len()
                ))
                .at(to_u64(at))
            })?;
            found.take(kind, content).map_err(|error| error.at(to_u64(at)))?;
            at = data.saturating_add(len.next_multiple_of(8));
        }
        Ok(found)
    }

    fn take(&mut self, kind: u32, content: &[u8]) -> Result<()> {
        match kind {
            BACKING_FORMAT if content.len() > LONGEST_FORMAT => {
                return Err(Error::corrupt(format!(
                    "name of the backing format has {} bytes, expected at most {LONGEST_FORMAT}",
                    content.len()
                )));
            }
            BACKING_FORMAT => self.backing_format = Some(text(content, "backing format")?),
            DATA_FILE => self.data_file = Some(text(content, "data file")?),
            LUKS_HEADER => {
                let fields = BigEndian(content, "LUKS header extension");
                self.luks = Some((fields.u64("offset", 0)?, fields.u64("length", 8)?));
            }
            FEATURE_NAMES => {
                for entry in content.as_chunks::<48>().0 {
                    let [kind, bit, name @ ..] = entry;
                    self.feature_names.push((*kind, *bit, printable(name)));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What the image calls incompatible feature `bit`.
    pub(crate) fn incompatible_name(&self, bit: u32) -> Option<&str> {
        self.feature_names
            .iter()
            .find(|(kind, number, _)| *kind == 0 && u32::from(*number) == bit)
            .map(|(_, _, name)| name.as_str())
            .filter(|name| !name.is_empty())
    }
}

/// A name from the image, which later is compared or opened and so has to be exact.
pub(crate) fn text(bytes: &[u8], name: &str) -> Result<String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| Error::corrupt(format!("name of the {name} is not UTF-8")))?;
    if text.contains('\0') {
        return Err(Error::corrupt(format!("name of the {name} has a NUL byte in it")));
    }
    Ok(text.to_owned())
}

/// A name from the image that is only shown: what could disturb a terminal is replaced.
fn printable(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default())
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}
