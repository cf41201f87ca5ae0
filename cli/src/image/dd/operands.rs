// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `if=`, `of=`, `bs=`, `count=` and `skip=`.

use crate::failure::Failure;
use crate::image::sizes::{self, SizeError};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use tranship_block::Span;

/// The largest block.
const LARGEST_BLOCK: u64 = i32::MAX as u64;

/// What is copied where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Operands {
    /// The image that is read.
    pub(super) input: OsString,
    /// The image that is made.
    pub(super) output: OsString,
    /// Bytes of a block.
    block: u64,
    /// Blocks to copy, if not all.
    count: Option<u64>,
    /// Blocks of the input to leave out first.
    skip: u64,
}

impl Operands {
    /// Of equal operands the last one counts.
    pub(super) fn parse(words: &[OsString]) -> Result<Self, Failure> {
        let (mut input, mut output) = (None, None);
        let (mut block, mut count, mut skip) = (512, None, 0);
        for word in words {
            let bytes = word.as_bytes();
            let end = bytes.iter().position(|byte| *byte == b'=');
            let (name, value) = match end {
                Some(end) => (&bytes[..end], Some(&bytes[end + 1..])),
                None => (bytes, None),
            };
            let text = value.map(String::from_utf8_lossy).unwrap_or_default();
            match (name, value) {
                (b"if", Some(value)) => input = Some(OsString::from_vec(value.to_vec())),
                (b"of", Some(value)) => output = Some(OsString::from_vec(value.to_vec())),
                (b"bs", Some(_)) => block = size(&text)?,
                (b"count", Some(_)) => count = Some(number("count", &text)?),
                (b"skip", Some(_)) => skip = number("skip", &text)?,
                (name, _) => {
                    let name = String::from_utf8_lossy(name);
                    return Err(Failure::usage(format!("unrecognized operand {name}")));
                }
            }
        }
        match (input, output) {
            (Some(input), Some(output)) => Ok(Self { input, output, block, count, skip }),
            _ => Err(Failure::usage("Must specify both input and output files")),
        }
    }

    /// The part of a disk of `size` bytes that is copied; none if all of it is skipped and
    /// there is more to skip.
    ///
    /// As in dd, `skip` is left out first and `count` is what is then copied; qemu-img
    /// takes `count` as the end.
    pub(super) fn part_of(&self, size: u64) -> Option<Span> {
        let start = self.skip.saturating_mul(self.block);
        let left = size.checked_sub(start)?;
        let wanted = self.count.map_or(u64::MAX, |count| count.saturating_mul(self.block));
        Some(Span::new(start, left.min(wanted)))
    }
}

fn size(text: &str) -> Result<u64, Failure> {
    match sizes::parse(text) {
        Ok(size @ 1..=LARGEST_BLOCK) => Ok(size),
        Ok(_) | Err(SizeError::OutOfRange) => Err(Failure::usage(format!(
            "Invalid bs specified. Must be between 1 and {LARGEST_BLOCK}."
        ))),
        Err(SizeError::Invalid) => Err(Failure::usage(format!("Invalid bs specified: '{text}'."))),
    }
}

fn number(name: &str, text: &str) -> Result<u64, Failure> {
    sizes::parse_number(text).map_err(|error| {
        Failure::usage(match error {
            SizeError::Invalid => format!("Invalid {name} specified: '{text}'."),
            SizeError::OutOfRange => {
                format!("Invalid {name} specified. Must be between 0 and {}.", i64::MAX)
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Operands, Failure> {
        Operands::parse(&words.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn skip_counts_blocks_of_the_input_and_count_what_follows() {
        for (words, size, expected) in [
            ("if=a of=b", 5000, Some((0, 5000))),
            ("if=a of=b bs=1k", 5000, Some((0, 5000))),
            ("if=a of=b bs=1k count=2", 5000, Some((0, 2048))),
            ("if=a of=b bs=1k count=2 skip=1", 5000, Some((1024, 2048))),
            ("if=a of=b bs=1k count=2 skip=3", 5000, Some((3072, 1928))),
            ("if=a of=b bs=1k skip=4", 4096, Some((4096, 0))),
            ("if=a of=b bs=1k skip=5", 4096, None),
            ("if=a of=b count=0", 4096, Some((0, 0))),
            ("if=a of=b bs=2147483647 skip=9223372036854775807", 4096, None),
        ] {
            let found = parse(words).unwrap().part_of(size).map(|span| (span.start, span.len));
            assert_eq!(found, expected, "{words}");
        }
    }

    #[test]
    fn mistakes_are_told_as_by_qemu_img() {
        for (words, expected) in [
            ("if=a", "Must specify both input and output files"),
            ("if=a of=b conv=notrunc", "unrecognized operand conv"),
            ("if=a of=b if", "unrecognized operand if"),
            ("if=a of=b bs=0", "Invalid bs specified. Must be between 1 and 2147483647."),
            ("if=a of=b bs=x", "Invalid bs specified: 'x'."),
            ("if=a of=b count=1k", "Invalid count specified: '1k'."),
            (
                "if=a of=b skip=-1",
                "Invalid skip specified. Must be between 0 and 9223372036854775807.",
            ),
        ] {
            assert_eq!(parse(words).unwrap_err().message(), expected);
        }
    }
}
