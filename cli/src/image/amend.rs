// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image amend`: what an image was created with.

use super::console::{Console, Progress};
use super::options::{self, Options};
use super::resize::{self, Change};
use super::source::{self, Opening, Source};
use crate::args::image::AmendArgs;
use crate::failure::Failure;
use crate::stdout;
use tranship_formats::{Format, Layer};
use tranship_qcow2::{Amendments, Header};

/// Changes what the options name.
pub(crate) fn run(args: &AmendArgs, console: Console) -> Result<u8, Failure> {
    let lists = options::joined(&args.options)?;
    let Some(list) = lists else {
        return Err(source::usage(console, "amend", "Must specify options (-o)"));
    };
    let format = args.format.format.as_deref();
    let asks = options::asks_for_help(&list);
    if let (true, Some(format), []) = (asks, format, args.names.as_slice()) {
        return help(source::format_named(format)?);
    }
    let [name] = args.names.as_slice() else {
        return Err(Failure::usage("Expecting one image file name"));
    };
    let direct = source::cache(args.cache.as_deref(), "")?;
    let opening = Opening { direct, ..Opening::writing(&args.naming, format) };
    let source = opening.open_file(name, console)?;
    let format = source.opened.format;
    if asks {
        return help(format);
    }
    let mut options = Options::new(amendable(format)?);
    options.add(&list).map_err(|failure| for_creation(failure, &list, format))?;
    let progress = Progress::start(args.progress && !args.quiet);
    let outcome = amend(&source, &options, args, console);
    if outcome.is_ok() {
        progress.finish();
    } else {
        progress.end();
    }
    outcome.map(|()| 0)
}

fn amendable(format: Format) -> Result<Vec<&'static options::Described>, Failure> {
    options::amendable(format).ok_or_else(|| {
        Failure::usage(format!("Format driver '{format}' does not support option amendment"))
    })
}

fn help(format: Format) -> Result<u8, Failure> {
    let list = options::listed(&amendable(format)?);
    stdout::print(&format!("Amend options for '{format}':\n{list}"))?;
    Ok(0)
}

/// Says it of options that images are only made with.
fn for_creation(failure: Failure, list: &str, format: Format) -> Failure {
    let creatable = options::creatable(format, true).unwrap_or_default();
    let is_wrong = |name: &str| failure.message() == format!("Invalid parameter '{name}'");
    let known = options::split(list)
        .iter()
        .any(|(name, _)| is_wrong(name) && creatable.iter().any(|option| option.name == *name));
    if known { failure.hint("This option is only supported for image creation") } else { failure }
}

fn amend(
    source: &Source,
    options: &Options,
    args: &AmendArgs,
    console: Console,
) -> Result<(), Failure> {
    let Some(Layer { storage: Some(storage), .. }) = source.opened.layers.first() else {
        return Err(Failure::usage("the image cannot be written"));
    };
    let header = Header::read(&**storage)?;
    check_backing(options, &header)?;
    if options.names().any(|name| name.starts_with("encrypt.")) {
        return Err(Failure::usage(match header.encryption() {
            None => "Can't amend encryption options - encryption not present",
            Some(_) => "passphrases of images cannot be changed",
        }));
    }
    let version = match options.text("compat") {
        None => None,
        Some("v2" | "0.10") => Some(2),
        Some("v3" | "1.1") => Some(3),
        Some(other) => {
            return Err(Failure::usage(format!("Unknown compatibility level {other}")));
        }
    };
    let refcount_bits = options.number("refcount_bits");
    if refcount_bits.is_some_and(|bits| !bits.is_power_of_two() || bits > 64) {
        return Err(Failure::usage(
            "Refcount width must be a power of two and may not exceed 64 bits",
        ));
    }
    if options.text("data_file").is_some() && !header.has_data_file() {
        return Err(Failure::usage(
            "data-file can only be set for images that use an external data file",
        ));
    }
    let amendments = Amendments {
        version,
        lazy_refcounts: options.switch("lazy_refcounts"),
        refcount_bits: refcount_bits.and_then(|bits| u32::try_from(bits).ok()),
        backing: None,
        data_file: options.text("data_file").map(ToOwned::to_owned),
        data_file_raw: options.switch("data_file_raw"),
    };
    // Version 2 lacks what the other changes may need: it comes last.
    let (first, last) = match version {
        Some(2) => (Amendments { version: None, ..amendments.clone() }, Some(2)),
        _ => (amendments, None),
    };
    tranship_qcow2::amend(&**storage, &first)?;
    if let Some(new) = options.number("size") {
        let change = Change { old: header.size, new, mode: "off" };
        resize::resize(source, &args.naming, change, console)?;
    }
    if last.is_some() {
        tranship_qcow2::amend(&**storage, &Amendments { version: last, ..Amendments::default() })?;
    }
    Ok(())
}

/// The backing file is what it is: contents would have to be compared for another one.
fn check_backing(options: &Options, header: &Header) -> Result<(), Failure> {
    let now = header.backing.as_ref();
    let is_same =
        |given: Option<&str>, now: Option<&str>| given.is_none_or(|given| Some(given) == now);
    let name = now.map(|backing| backing.name.as_str());
    let format = now.and_then(|backing| backing.format.as_deref());
    if is_same(options.text("backing_file"), name) && is_same(options.text("backing_fmt"), format) {
        return Ok(());
    }
    Err(Failure::usage("Cannot amend the backing file")
        .hint("You can use 'qemu-img rebase' instead."))
}
