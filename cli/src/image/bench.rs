// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image bench`: requests to an image, one behind the other or at once, and how long they
//! take.

mod load;

use super::console::Console;
use super::metering::Metering;
use super::sizes::{self, SizeError};
use super::source::{self, Opening};
use crate::args::image::BenchArgs;
use crate::failure::Failure;
use crate::stdout;
use load::Load;
use std::time::Instant;

/// The most of everything that is counted.
const MOST: u64 = i32::MAX as u64;

/// Runs the requests.
pub(crate) fn run(args: &BenchArgs, console: Console, metering: &Metering) -> Result<u8, Failure> {
    let (load, depth) = load(args)?;
    let name = source::one(&args.names, "bench", console)?;
    let cache = args.cache.as_deref();
    let direct = source::cache(cache, "").map_err(|_| Failure::usage("Invalid cache mode"))?;
    let is_native = args.native || args.aio.as_deref() == Some("native");
    if is_native && !direct {
        return Err(Failure::usage(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        )
        .within(format!("Could not open '{}'", name.to_string_lossy())));
    }
    let opening = Opening {
        writable: args.write,
        force_share: args.force_share,
        direct,
        ..Opening::reading(&args.naming, args.format.format.as_deref()).counted(metering, "image")
    };
    let opened = opening.open(name, console)?.opened;
    let aio = if args.native { Some("native") } else { args.aio.as_deref() };
    if let Some(aio @ ("native" | "io_uring")) = aio {
        console.warn(&format!("requests are made by threads, not by {aio}"));
    }
    // Printed with --quiet as well: there is nothing else to run this for.
    stdout::print(&format!(
        "Sending {} {} requests, {} bytes each, {depth} in parallel (starting at offset {}, step \
         size {})\n",
        load.count,
        if args.write { "write" } else { "read" },
        load.len,
        load.start,
        load.step
    ))?;
    if load.flush_interval > 0 {
        stdout::print(&format!("Sending flush every {} requests\n", load.flush_interval))?;
    }
    let begun = Instant::now();
    load.run(&opened.device, depth)
        .map_err(|error| Failure::from(error).within("Failed request"))?;
    let seconds = begun.elapsed().as_secs_f64();
    stdout::print(&format!("Run completed in {seconds:.3} seconds.\n"))?;
    Ok(0)
}

/// What is asked for, and how many requests may be under way.
fn load(args: &BenchArgs) -> Result<(Load, u64), Failure> {
    let number = |value: &Option<String>, what: &str, least: u64, most: u64, default: u64| {
        limited(value.as_deref().map(|text| (text, sizes::parse_number(text))), what, least, most)
            .map(|number| number.unwrap_or(default))
    };
    let size = |value: &Option<String>, what: &str, least: u64, most: u64| {
        limited(value.as_deref().map(|text| (text, sizes::parse(text))), what, least, most)
    };
    let count = number(&args.count, "request count", 1, MOST, 75_000)?;
    let depth = number(&args.depth, "queue depth", 1, MOST, 64)?;
    let start = size(&args.offset, "offset", 0, i64::MAX as u64)?.unwrap_or(0);
    let len = size(&args.buffer_size, "buffer size", 1, MOST)?.unwrap_or(4096);
    let step = size(&args.step_size, "step size", 0, MOST)?.filter(|step| *step > 0);
    let pattern = number(&args.pattern, "pattern byte", 0, 255, 0)?;
    let flush_interval = number(&args.flush_interval, "flush interval", 0, MOST, 0)?;
    match args.aio.as_deref() {
        None | Some("threads" | "native" | "io_uring") => {}
        Some(other) => return Err(Failure::usage(format!("Invalid aio option: {other}"))),
    }
    if flush_interval > 0 && !args.write {
        return Err(Failure::usage("--flush-interval is only available in write tests"));
    }
    if flush_interval > 0 && flush_interval < depth {
        return Err(Failure::usage("Flush interval can't be smaller than depth"));
    }
    let load = Load {
        count,
        start,
        len,
        step: step.unwrap_or(len),
        pattern: args.write.then(|| u8::try_from(pattern).unwrap_or(u8::MAX)),
        flush_interval,
        drains: !args.no_drain,
    };
    Ok((load, depth))
}

/// A number that has to be within limits.
fn limited(
    value: Option<(&str, Result<u64, SizeError>)>,
    what: &str,
    least: u64,
    most: u64,
) -> Result<Option<u64>, Failure> {
    match value {
        None => Ok(None),
        Some((_, Ok(number))) if (least..=most).contains(&number) => Ok(Some(number)),
        Some((text, Err(SizeError::Invalid))) => {
            Err(Failure::usage(format!("Invalid {what} specified: '{text}'.")))
        }
        Some(_) => Err(Failure::usage(format!(
            "Invalid {what} specified. Must be between {least} and {most}."
        ))),
    }
}
