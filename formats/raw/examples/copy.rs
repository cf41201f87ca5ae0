// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times the copy engine between two raw files: `copy SOURCE TARGET [KEY=VALUE ...]`.
//!
//! Keys: `threads`, `chunk`, `zero`, `hash`, `ordered`, `drop`, `flush`. Or, with
//! `compare=1`, compares the two.
#![allow(clippy::print_stdout, reason = "it is a program")]

use std::path::Path;
use std::time::Instant;
use tranship_block::{CopyOptions, copy};
use tranship_raw::{Access, RawFile};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [source, target, rest @ ..] = args.as_slice() else {
        return Err("usage: copy SOURCE TARGET [KEY=VALUE ...]".into());
    };
    let source = RawFile::open(Path::new(source), Access::ReadOnly)?;
    let mut options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    for word in rest {
        let (key, value) = word.split_once('=').ok_or("expected KEY=VALUE")?;
        let value: u64 = value.parse()?;
        match key {
            "threads" => options.threads = usize::try_from(value)?,
            "chunk" => options.chunk = value,
            "zero" => options.zero_block = value,
            "hash" => options.hash = Some(value),
            "ordered" => options.ordered = value > 0,
            "drop" => options.drop_cache = value > 0,
            _ => return Err(format!("unknown key {key}").into()),
        }
    }
    let begun = Instant::now();
    let target = RawFile::create(Path::new(target), tranship_block::BlockDevice::size(&source))?;
    let copied = copy(&source, &Unflushed(target), &options, &())?;
    println!("{:.3} s {copied:?}", begun.elapsed().as_secs_f64());
    Ok(())
}

/// `cp` and qemu-img's unsafe cache mode do not flush either.
#[derive(Debug)]
struct Unflushed(RawFile);

impl tranship_block::BlockDevice for Unflushed {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        self.0.is_read_only()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> tranship_block::Result<()> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> tranship_block::Result<()> {
        self.0.write_at(buf, offset)
    }
    fn write_zeroes(
        &self,
        span: tranship_block::Span,
        mode: tranship_block::Zeroing,
    ) -> tranship_block::Result<()> {
        self.0.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> tranship_block::Result<tranship_block::Extent> {
        self.0.extent_at(offset)
    }
    fn flush(&self) -> tranship_block::Result<()> {
        Ok(())
    }
    fn write_from_file(
        &self,
        offset: u64,
        range: &tranship_block::FileRange<'_>,
    ) -> tranship_block::Result<bool> {
        self.0.write_from_file(offset, range)
    }
    fn advise(&self, span: tranship_block::Span, advice: tranship_block::Advice) {
        self.0.advise(span, advice);
    }
}
