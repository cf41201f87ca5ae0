// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image create`: a new, empty image.

mod build;
mod file;
mod others;

use super::console::Console;
use super::options::{self, Options, Value};
use super::sizes::{self, SizeError};
use super::source::{self, Opening};
use crate::args::image::{CreateArgs, Naming};
use crate::failure::Failure;
use crate::stdout;
pub(crate) use build::{preallocation, qcow2_preallocation, qcow2_shape};
use std::ffi::OsString;
use std::path::Path;
use tranship_formats::{Format, Spec, WhenEmpty};

/// Creates the image that the options describe.
pub(crate) fn run(args: &CreateArgs, console: Console) -> Result<u8, Failure> {
    let lists = options::joined(&args.options)?;
    if lists.as_deref().is_some_and(options::asks_for_help) {
        return help(args);
    }
    let (name, size) = match args.names.as_slice() {
        [] => return Err(source::usage(console, "create", "Expecting image file name")),
        [name] => (name, None),
        [name, size] => (name, Some(parse_size(&size.to_string_lossy())?)),
        [_, _, extra, ..] => {
            let message = format!("Unexpected argument: {}", extra.to_string_lossy());
            return Err(source::usage(console, "create", message));
        }
    };
    let shown = name.to_string_lossy().into_owned();
    let wish = Wish {
        name,
        format: args.format.as_deref().unwrap_or("raw"),
        lists: lists.as_deref(),
        size,
        backing: args.backing.as_deref(),
        backing_format: args.backing_format.as_deref(),
        is_unsafe: args.backing_unsafe,
        naming: &args.naming,
    };
    let named = |failure: Failure| failure.about(&shown);
    let plan = wish.plan(console).map_err(named)?;
    if !args.quiet {
        stdout::print(&plan.announcement(&shown))?;
    }
    plan.carry_out(console).map_err(named)?;
    Ok(0)
}

/// The size that a new image is to have.
pub(crate) fn parse_size(text: &str) -> Result<u64, Failure> {
    sizes::parse(text).map_err(|error| {
        Failure::usage(match error {
            SizeError::Invalid => format!("Invalid image size specified: '{text}'."),
            SizeError::OutOfRange => {
                format!("Invalid image size specified. Must be between 0 and {}.", i64::MAX)
            }
        })
    })
}

fn help(args: &CreateArgs) -> Result<u8, Failure> {
    print_help(args.format.as_deref().unwrap_or("raw"), !args.names.is_empty())
}

/// Lists what can be chosen for a new image; `with_file` adds what its file takes.
pub(crate) fn print_help(format: &str, with_file: bool) -> Result<u8, Failure> {
    let known = creatable(format, with_file)?;
    let list = options::listed(&known);
    let text = if with_file {
        format!("Supported options:\n{list}")
    } else {
        format!(
            "Supported {format} options:\n{list}\nThe protocol level may support further \
             options.\nSpecify the target filename to include those options.\n"
        )
    };
    stdout::print(&text)?;
    Ok(0)
}

/// What can be chosen for an image of the format of this name.
pub(crate) fn creatable(
    name: &str,
    with_file: bool,
) -> Result<Vec<&'static options::Described>, Failure> {
    let format: Format =
        name.parse().map_err(|_| Failure::usage(format!("Unknown file format '{name}'")))?;
    options::creatable(format, with_file).ok_or_else(|| {
        Failure::usage(format!("Format driver '{name}' does not support image creation"))
    })
}

/// A new image as its user wants it.
pub(crate) struct Wish<'a> {
    /// The name of the new image.
    pub(crate) name: &'a OsString,
    /// The name of its format.
    pub(crate) format: &'a str,
    /// What was given with `-o`.
    pub(crate) lists: Option<&'a str>,
    /// Bytes, if not given in another way.
    pub(crate) size: Option<u64>,
    /// What it is based on.
    pub(crate) backing: Option<&'a str>,
    /// The name of the format of that.
    pub(crate) backing_format: Option<&'a str>,
    /// Whether that is not looked at.
    pub(crate) is_unsafe: bool,
    /// How images are named.
    pub(crate) naming: &'a Naming,
}

/// A new image that can be made.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Where it is made.
    pub(crate) spec: Spec,
    format: Format,
    options: Options,
}

impl Wish<'_> {
    /// Decides everything about the new image without touching it.
    pub(crate) fn plan(&self, console: Console) -> Result<Plan, Failure> {
        let known = creatable(self.format, true)?;
        let format = source::format_named(self.format)?;
        let spec = self.spec()?;
        let mut options = Options::new(known);
        options.add(self.lists.unwrap_or_default())?;
        if self.size.is_some() && options.number("size").is_some() {
            return Err(Failure::usage("The image size must be specified only once"));
        }
        if let Some(size) = self.size {
            options.set("size", Value::Number(size));
        }
        self.add_backing(&mut options)?;
        if let Some(size) = self.look_at_backing(&options, &spec, console)? {
            options.set("size", Value::Number(size));
        }
        if options.number("size").is_none() {
            return Err(Failure::usage("Image creation needs a size parameter"));
        }
        Ok(Plan { spec, format, options })
    }

    /// The same for an image that a disk is going to be copied into: it has that disk's
    /// size, whatever the options say.
    pub(crate) fn plan_for_copy(&self, console: Console) -> Result<Plan, Failure> {
        let whole = Self { size: None, ..*self };
        let known = creatable(self.format, true)?;
        let format = source::format_named(self.format)?;
        let spec = self.spec()?;
        let mut options = Options::new(known);
        options.add(self.lists.unwrap_or_default())?;
        if let Some(size) = self.size {
            options.set("size", Value::Number(size));
        }
        whole.add_backing(&mut options)?;
        whole.look_at_backing(&options, &spec, console)?;
        Ok(Plan { spec, format, options })
    }

    fn spec(&self) -> Result<Spec, Failure> {
        let Some(text) = self.name.to_str() else {
            return Ok(Spec::from_path(Path::new(self.name)));
        };
        // An image is made in a file, or in an export that is there already.
        if text.starts_with("json:") {
            return Err(Failure::usage("Unknown protocol 'json'"));
        }
        Ok(Spec::from_name(text)?)
    }

    fn add_backing(&self, options: &mut Options) -> Result<(), Failure> {
        if let Some(backing) = self.backing {
            if !options.knows("backing_file") {
                return Err(Failure::usage(format!(
                    "Backing file not supported for file format '{}'",
                    self.format
                )));
            }
            options.set("backing_file", Value::Text(backing.to_owned()));
        }
        if let Some(format) = self.backing_format {
            if !options.knows("backing_fmt") {
                return Err(Failure::usage(format!(
                    "Backing file format not supported for file format '{}'",
                    self.format
                )));
            }
            options.set("backing_fmt", Value::Text(format.to_owned()));
        }
        match options.text("backing_file") {
            Some("") => Err(Failure::usage("Expected backing file name, got empty string")),
            Some(backing) if self.name == backing => Err(Failure::usage(
                "Error: Trying to create an image with the same filename as the backing file",
            )),
            _ => Ok(()),
        }
    }

    /// Opens what the new image is based on; its size, if there is no other.
    fn look_at_backing(
        &self,
        options: &Options,
        spec: &Spec,
        console: Console,
    ) -> Result<Option<u64>, Failure> {
        let Some(backing) = options.text("backing_file") else { return Ok(None) };
        let format = options.text("backing_fmt");
        let missing = || Failure::usage("Backing file specified without backing format");
        if self.is_unsafe {
            return if format.is_some() { Ok(None) } else { Err(missing()) };
        }
        let path = source::beside(spec.path().unwrap_or(Path::new("")), backing);
        let naming = Naming { image_opts: false, ..self.naming.clone() };
        let opened = Opening::reading(&naming, format)
            .open(path.as_os_str(), console)
            .map_err(|failure| failure.hint("Could not open backing image."))?;
        if format.is_none() {
            let found = opened.opened.format;
            return Err(missing().hint(format!("Detected format of {found}.")));
        }
        let size = opened.opened.device.size().next_multiple_of(512);
        Ok(options.number("size").is_none().then_some(size))
    }
}

impl Plan {
    /// What is said before anything happens.
    pub(crate) fn announcement(&self, name: &str) -> String {
        format!("Formatting '{name}', fmt={} {}\n", self.format, self.options.shown())
    }

    /// What is to be made.
    pub(crate) fn what(&self) -> Result<tranship_formats::Create, Failure> {
        build::build(self.format, &self.options, &self.spec)
    }

    /// Makes the file at `path` an empty one, if its filesystem is to be told something about
    /// it before there is anything in it.
    pub(crate) fn prepare(&self, path: &Path, console: Console) -> Result<(), Failure> {
        file::prepare(path, &self.options, console)
    }

    /// Makes the image.
    pub(crate) fn carry_out(&self, console: Console) -> Result<(), Failure> {
        let what = self.what()?;
        let hints = file::Hints::of(&self.options)?;
        let when_empty: WhenEmpty = Box::new(move |file| hints.tell(file, console));
        tranship_formats::create(&self.spec, &what, Some(when_empty))
            .map_err(|error| Failure::from(error).within("Could not create the image"))
    }
}
