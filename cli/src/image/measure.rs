// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image measure`: how much space an image will take.

mod qcow2;

use super::console::Console;
use super::create;
use super::json::{Json, Object};
use super::metering::Metering;
use super::options::{self, Options};
use super::source::{self, Opening, Output};
use crate::args::image::MeasureArgs;
use crate::failure::Failure;
use crate::stdout;
use std::fmt::Write;
use tranship_block::BlockDevice;
use tranship_formats::Format;

/// Bytes that an image will take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Measured {
    /// With what is known now.
    required: u64,
    /// When the guest has written everything.
    fully_allocated: u64,
    /// For the bitmaps of the source, if they are copied.
    bitmaps: Option<u64>,
}

/// Calculates the size of an image.
pub(crate) fn run(
    args: &MeasureArgs,
    console: Console,
    metering: &Metering,
) -> Result<u8, Failure> {
    let output = source::output(args.output.output.as_deref(), "measure", console)?;
    let lists = options::joined(&args.options)?;
    let size = args.size.as_deref().map(create::parse_size).transpose()?;
    let name = match args.names.as_slice() {
        [] => None,
        [name] => Some(name),
        _ => return Err(Failure::usage("At most one filename argument is allowed.")),
    };
    let needs_name =
        args.naming.image_opts || args.format.format.is_some() || args.snapshot.is_some();
    match (name, size) {
        (None, _) if needs_name => {
            return Err(Failure::usage("--image-opts, -f, and -l require a filename argument."));
        }
        (None, None) => {
            return Err(Failure::usage("Either --size N or one filename must be specified."));
        }
        (Some(_), Some(_)) => {
            return Err(Failure::usage("--size N cannot be used together with a filename."));
        }
        _ => {}
    }
    let target = args.target_format.as_deref().unwrap_or("raw");
    let source = match name {
        Some(name) => {
            let opening = Opening {
                force_share: args.reading.force_share,
                salvage: args.reading.salvage,
                ..Opening::reading(&args.naming, args.format.format.as_deref())
                    .counted(metering, "image")
            };
            Some(opening.open(name, console)?)
        }
        None => None,
    };
    let mut options = Options::new(create::creatable(target, true)?);
    if let Err(failure) = options.add(lists.as_deref().unwrap_or_default()) {
        console.report(failure.message());
        return Err(Failure::usage(format!("Invalid options for file format '{target}'")));
    }
    let format = source::format_named(target)?;
    let device =
        source.as_ref().map(|source| source.device(args.snapshot.as_deref())).transpose()?;
    let device = device.as_deref();
    let measured = match format {
        Format::Raw => {
            let size = device.map_or(size.unwrap_or(0), BlockDevice::size);
            let size = size.next_multiple_of(512);
            Measured { required: size, fully_allocated: size, bitmaps: None }
        }
        Format::Qcow2 => qcow2::measure(source.as_ref(), device, size.unwrap_or(0), &options)?,
        _ => {
            return Err(Failure::usage(format!(
                "Block driver '{target}' does not support size measurement"
            )));
        }
    };
    stdout::print(&match output {
        Output::Human => human(measured),
        Output::Json => json(measured).pretty(),
    })?;
    Ok(0)
}

fn human(measured: Measured) -> String {
    let mut text = format!(
        "required size: {}\nfully allocated size: {}\n",
        measured.required, measured.fully_allocated
    );
    if let Some(bitmaps) = measured.bitmaps {
        let _ = writeln!(text, "bitmaps size: {bitmaps}");
    }
    text
}

fn json(measured: Measured) -> Json {
    let mut object = Object::default();
    object
        .set("required", measured.required)
        .set("fully-allocated", measured.fully_allocated)
        .set_some("bitmaps", measured.bitmaps);
    object.into()
}
