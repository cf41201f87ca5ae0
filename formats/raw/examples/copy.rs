// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times the copy engine between two raw files: `copy SOURCE TARGET [KEY=VALUE ...]`.
//!
//! Keys: `threads`, `chunk`, `zero`, `hash`, `ordered`, `drop`, `direct` (both files),
//! `flush` (which `cp` and qemu-img's unsafe cache mode do not do). `compare=1` compares
//! the two instead.
#![allow(clippy::print_stdout, reason = "it is a program")]

use std::path::Path;
use std::time::Instant;
use tranship_block::{
    Advice, BlockDevice, CompareOptions, CopyOptions, Error, Extent, FileRange, Result, Span,
    Zeroing, compare, copy,
};
use tranship_raw::{Access, Preallocation, RawFile};

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [source, target, rest @ ..] = args.as_slice() else {
        return Err("usage: copy SOURCE TARGET [KEY=VALUE ...]".into());
    };
    let mut options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    let (mut direct, mut flush, mut comparing) = (false, false, false);
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
            "direct" => direct = value > 0,
            "flush" => flush = value > 0,
            "compare" => comparing = value > 0,
            _ => return Err(format!("unknown key {key}").into()),
        }
    }
    let begun = Instant::now();
    let ready = |file: RawFile| if direct { file.into_direct() } else { Ok(file) };
    let source = ready(RawFile::open(Path::new(source), Access::ReadOnly)?)?;
    let target = Path::new(target);
    if comparing {
        let other = ready(RawFile::open(target, Access::ReadOnly)?)?;
        let options = CompareOptions { threads: options.threads, ..CompareOptions::default() };
        let found = compare(&source, &other, &options, &()).map_err(Error::from)?;
        println!("{:.3} s {found:?}", begun.elapsed().as_secs_f64());
        return Ok(());
    }
    let target = RawFile::create_or_replace(target, source.size(), Preallocation::Off)?;
    let copied = copy(&source, &Target(ready(target)?, flush), &options, &())?;
    println!("{:.3} s {copied:?}", begun.elapsed().as_secs_f64());
    Ok(())
}

/// A file whose flushes may count for nothing.
#[derive(Debug)]
struct Target(RawFile, bool);

impl BlockDevice for Target {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        self.0.is_read_only()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.0.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.0.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        if self.1 { self.0.flush() } else { Ok(()) }
    }
    fn write_from_file(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
        self.0.write_from_file(offset, range)
    }
    fn advise(&self, span: Span, advice: Advice) {
        self.0.advise(span, advice);
    }
}
