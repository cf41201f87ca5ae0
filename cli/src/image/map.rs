// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image map`: where an image keeps its data.

use super::console::Console;
use super::metering::Metering;
use super::sizes::{self, SizeError};
use super::source::{self, Opening, Output, Source};
use crate::args::image::MapArgs;
use crate::failure::Failure;
use crate::stdout;
use std::fmt::Write;
use tranship_block::{Extent, ExtentKind};
use tranship_formats::{Disk, Format, Layer};

/// Bytes of text that are printed at once.
const PIECE: usize = 64 << 10;

/// Bytes of the disk that are in the same state.
// The same facts as in the output.
#[allow(clippy::struct_excessive_bools)]
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    start: u64,
    length: u64,
    depth: u32,
    is_present: bool,
    is_zero: bool,
    is_data: bool,
    is_compressed: bool,
    offset: Option<u64>,
    /// The file that the offset is in.
    file: Option<String>,
}

impl Entry {
    /// Whether `next` only goes on with what this one says.
    fn continues_in(&self, next: &Self) -> bool {
        let follows = match (self.offset, next.offset) {
            (Some(offset), Some(next)) => offset.checked_add(self.length) == Some(next),
            (None, None) => true,
            _ => false,
        };
        follows
            && self.depth == next.depth
            && self.is_present == next.is_present
            && self.is_zero == next.is_zero
            && self.is_data == next.is_data
            && self.is_compressed == next.is_compressed
            && self.file == next.file
    }
}

/// Shows where the data is.
pub(crate) fn run(args: &MapArgs, console: Console, metering: &Metering) -> Result<u8, Failure> {
    let output = source::output(args.output.output.as_deref(), "map", console)?;
    let start = size(args.start_offset.as_deref(), "start offset")?.unwrap_or(0);
    let length = size(args.max_length.as_deref(), "max length")?.unwrap_or(u64::MAX);
    let name = source::one(&args.names, "map", console)?;
    let opening = Opening {
        force_share: args.reading.force_share,
        salvage: args.reading.salvage,
        ..Opening::reading(&args.naming, args.format.format.as_deref()).counted(metering, "image")
    };
    let source = opening.open(name, console)?;
    let size = source.opened.device.size().next_multiple_of(512);
    let end = start.saturating_add(length).min(size);
    let mut printer = Printer::start(output)?;
    let mut last: Option<Entry> = None;
    let mut at = start;
    while at < end {
        let entry = entry_at(&source, at, end)?;
        at = at.saturating_add(entry.length);
        last = Some(match last.take() {
            Some(mut last) if last.continues_in(&entry) => {
                last.length = last.length.saturating_add(entry.length);
                last
            }
            Some(last) => {
                printer.entry(&last)?;
                entry
            }
            None => entry,
        });
    }
    printer.last(&last.unwrap_or_else(|| nothing(start)))?;
    Ok(0)
}

fn size(text: Option<&str>, what: &str) -> Result<Option<u64>, Failure> {
    let Some(text) = text else { return Ok(None) };
    sizes::parse(text).map(Some).map_err(|error| {
        Failure::usage(match error {
            SizeError::Invalid => format!("Invalid {what} specified: '{text}'."),
            SizeError::OutOfRange => {
                format!("Invalid {what} specified. Must be between 0 and {}.", i64::MAX)
            }
        })
    })
}

/// What is said about a place behind the end.
fn nothing(start: u64) -> Entry {
    Entry {
        start,
        length: 0,
        depth: 0,
        is_present: false,
        is_zero: false,
        is_data: false,
        is_compressed: false,
        offset: None,
        file: None,
    }
}

fn entry_at(source: &Source, at: u64, end: u64) -> Result<Entry, Failure> {
    let device = &source.opened.device;
    // The rest of the last sector of a raw disk: no file has it.
    let extent = match device.size().checked_sub(at) {
        None | Some(0) => Extent::new(ExtentKind::Hole, end.saturating_sub(at)),
        Some(_) => device.extent_at(at)?,
    };
    let extent = extent.limited_to(end.saturating_sub(at));
    if extent.len == 0 {
        return Err(Failure::usage(format!("the image has an empty extent at offset {at:#x}")));
    }
    let depth = usize::try_from(extent.depth).unwrap_or(usize::MAX);
    let layer = source.opened.layers.get(depth);
    let is_raw = layer.is_some_and(|layer| layer.format == Format::Raw);
    let keeps_all =
        layer.is_some_and(|layer| matches!(layer.format, Format::Raw | Format::Vpc | Format::Vdi));
    let is_data = extent.kind == ExtentKind::Data;
    let shift = source.spec.slice.filter(|_| depth == 0).map_or(0, |slice| slice.offset);
    // A hole in a raw disk has its place in the file like everything else.
    let offset = extent.offset.or_else(|| is_raw.then(|| at.saturating_add(shift)));
    Ok(Entry {
        start: at,
        length: extent.len,
        depth: extent.depth,
        is_present: extent.kind != ExtentKind::Hole || keeps_all,
        is_zero: !is_data,
        is_data,
        is_compressed: extent.compressed,
        offset: offset.filter(|_| !extent.compressed),
        file: layer.filter(|_| offset.is_some()).map(|layer| file_of(layer, at)),
    })
}

/// The file of the layer that has what is at this byte of the disk.
fn file_of(layer: &Layer, at: u64) -> String {
    let mut path = source::shown(layer);
    if let Disk::Vmdk(disk) = &layer.disk {
        let mut start = 0_u64;
        for extent in disk.extents() {
            let end = start.saturating_add(extent.len);
            if let Some(name) = extent.name.filter(|_| (start..end).contains(&at)) {
                path = source::beside(&layer.path, &name);
            }
            start = end;
        }
    }
    path.display().to_string()
}

struct Printer {
    output: Output,
    text: String,
    is_first: bool,
}

impl Printer {
    fn start(output: Output) -> Result<Self, Failure> {
        let mut printer = Self { output, text: String::new(), is_first: true };
        if output == Output::Human {
            let [offset, length, place] = ["Offset", "Length", "Mapped to"];
            let _ = writeln!(printer.text, "{offset:<16}{length:<16}{place:<16}File");
        }
        printer.flush()?;
        Ok(printer)
    }

    fn entry(&mut self, entry: &Entry) -> Result<(), Failure> {
        match self.output {
            Output::Human => self.line(entry)?,
            Output::Json => self.json(entry),
        }
        if self.text.len() >= PIECE { self.flush() } else { Ok(()) }
    }

    fn last(mut self, entry: &Entry) -> Result<(), Failure> {
        self.entry(entry)?;
        if self.output == Output::Json {
            self.text.push_str("]\n");
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Failure> {
        stdout::print(&std::mem::take(&mut self.text))
    }

    fn line(&mut self, entry: &Entry) -> Result<(), Failure> {
        if !entry.is_data {
            return Ok(());
        }
        let Some(offset) = entry.offset else {
            self.flush()?;
            return Err(Failure::usage(
                "File contains external, encrypted or compressed clusters.",
            )
            .hint("--output json shows all of them"));
        };
        let [start, length, offset] = [entry.start, entry.length, offset].map(hexadecimal);
        let file = entry.file.as_deref().unwrap_or_default();
        let _ = writeln!(self.text, "{start:<16}{length:<16}{offset:<16}{file}");
        Ok(())
    }

    fn json(&mut self, entry: &Entry) {
        self.text.push_str(if self.is_first { "[" } else { ",\n" });
        self.is_first = false;
        let _ = write!(
            self.text,
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
             \"data\": {}, \"compressed\": {}",
            entry.start,
            entry.length,
            entry.depth,
            entry.is_present,
            entry.is_zero,
            entry.is_data,
            entry.is_compressed
        );
        if let Some(offset) = entry.offset {
            let _ = write!(self.text, ", \"offset\": {offset}");
        }
        self.text.push('}');
    }
}

/// C's `%#x`, which leaves zero alone.
fn hexadecimal(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}
