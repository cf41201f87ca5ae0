// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens the images that the command line names.

use super::console::Console;
use super::metering::Metering;
use super::options;
use super::secrets;
use crate::args::image::Naming;
use crate::failure::Failure;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, DiskMeter, ErrorKind};
use tranship_formats::{Format, Layer, Locking, Member, OpenOptions, Opened, Spec, Trust};
use tranship_qcow2::{Qcow2, Snapshot};

/// How an image is opened.
// Every one of them is a switch of its own on the command line.
#[allow(clippy::struct_excessive_bools)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opening<'a> {
    /// What all images of the command have in common.
    pub(crate) naming: &'a Naming,
    /// The name of its format, if it was given.
    pub(crate) format: Option<&'a str>,
    /// It is to be changed.
    pub(crate) writable: bool,
    /// Open it alone, without what it is based on.
    pub(crate) alone: bool,
    /// Open it although others may write to it.
    pub(crate) force_share: bool,
    /// Give zeroes for what is damaged.
    pub(crate) salvage: bool,
    /// Go past the page cache.
    pub(crate) direct: bool,
    /// The same for what the image is based on, if that is not to be as the image.
    pub(crate) direct_below: Option<bool>,
    /// What counts the disk, and what it is for.
    pub(crate) metering: Option<(&'a Metering, &'static str)>,
}

/// An open image as its user named it.
#[derive(Debug)]
pub(crate) struct Source {
    /// The name as it was given, for messages.
    pub(crate) name: String,
    /// What the name means.
    pub(crate) spec: Spec,
    /// The disk and its layers.
    pub(crate) opened: Opened,
    /// What counts the disk; who works on a layer instead of the disk goes through it.
    pub(crate) meter: DiskMeter,
}

impl Source {
    /// The disk, or what one of its snapshots has kept of it.
    ///
    /// A snapshot is named by itself, by `snapshot.id=ID` or by `snapshot.name=NAME`.
    ///
    /// # Errors
    ///
    /// Formats without snapshots, and names that no snapshot has.
    pub(crate) fn device(&self, snapshot: Option<&str>) -> Result<Arc<dyn BlockDevice>, Failure> {
        let Some(wanted) = snapshot else { return Ok(Arc::clone(&self.opened.device)) };
        let missing = |why: &str| Failure::usage(format!("Failed to load snapshot: {why}"));
        let mut layers = self.opened.layers.iter();
        let first = layers.next().filter(|layer| layer.format == Format::Qcow2);
        let first = first.ok_or_else(|| missing("the format has none"))?;
        let (mut id, mut name) = (None, None);
        for (key, value) in options::split(wanted) {
            match (key.as_str(), value) {
                ("snapshot.id", Some(value)) => id = Some(value),
                ("snapshot.name", Some(value)) => name = Some(value),
                _ => {
                    return self
                        .snapshot(first, |known| known.id == wanted || known.name == wanted);
                }
            }
        }
        self.snapshot(first, |known| {
            id.as_ref().is_none_or(|id| *id == known.id)
                && name.as_ref().is_none_or(|name| *name == known.name)
        })
    }

    /// A copy onto one of its own sources would read what it has just written.
    ///
    /// # Errors
    ///
    /// `target` is one of the files that this disk consists of.
    pub(crate) fn refuse_as_target(&self, target: &Path) -> Result<(), Failure> {
        let Ok(target) = target.canonicalize() else { return Ok(()) };
        let mut layers = self.opened.chain.iter();
        if layers.any(|(path, _)| path.canonicalize().is_ok_and(|path| path == target)) {
            let question = format!("Is another process using the image [{}]?", target.display());
            return Err(Failure::usage("Failed to get \"write\" lock").hint(question));
        }
        Ok(())
    }

    fn snapshot(
        &self,
        layer: &Layer,
        is_wanted: impl Fn(&Snapshot) -> bool,
    ) -> Result<Arc<dyn BlockDevice>, Failure> {
        let snapshots = tranship_qcow2::snapshots(&layer.file)?;
        let found = snapshots.iter().find(|snapshot| is_wanted(snapshot)).ok_or_else(|| {
            Failure::usage("Failed to load snapshot: Can't find snapshot")
                .hint("`snapshot -l` lists those of an image")
        })?;
        let options = tranship_qcow2::OpenOptions {
            backing: self.opened.layers.get(1).map(|layer| layer.disk.device()),
            ..Default::default()
        };
        let disk = Qcow2::open_snapshot(Arc::clone(&layer.file), &found.id, options)?;
        Ok(self.meter.device(Arc::new(disk)))
    }
}

impl<'a> Opening<'a> {
    /// To be read, with all that the image is based on.
    pub(crate) fn reading(naming: &'a Naming, format: Option<&'a str>) -> Self {
        Self {
            naming,
            format,
            writable: false,
            alone: false,
            force_share: false,
            salvage: false,
            direct: false,
            direct_below: None,
            metering: None,
        }
    }

    /// The same, counted by `metering` as what the disk is for.
    #[must_use]
    pub(crate) fn counted(self, metering: &'a Metering, role: &'static str) -> Self {
        Self { metering: Some((metering, role)), ..self }
    }

    /// To be changed.
    pub(crate) fn writing(naming: &'a Naming, format: Option<&'a str>) -> Self {
        Self { writable: true, ..Self::reading(naming, format) }
    }

    /// Opens the image called `name`.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the name, the image, or what it is based on.
    pub(crate) fn open(&self, name: &OsStr, console: Console) -> Result<Source, Failure> {
        self.check_options()?;
        let shown = name.to_string_lossy().into_owned();
        let failed = |failure: Failure| failure.within(format!("Could not open '{shown}'"));
        let format = self.format.map(format_named).transpose().map_err(failed)?;
        let spec = self.spec(name).map_err(failed)?;
        self.open_spec(shown, spec, format, console)
    }

    /// Opens the file of the image called `name`, and finds out its format, without opening
    /// the disk in it: for commands that need no passphrase, data file or parent.
    ///
    /// The only layer is the file with the image's format.
    ///
    /// # Errors
    ///
    /// As [`Self::open`], but nothing about the disk.
    pub(crate) fn open_file(&self, name: &OsStr, console: Console) -> Result<Source, Failure> {
        let shown = name.to_string_lossy().into_owned();
        let failed = |failure: Failure| failure.within(format!("Could not open '{shown}'"));
        self.check_options()?;
        let given = self.format.map(format_named).transpose().map_err(failed)?;
        let mut spec = self.spec(name).map_err(failed)?;
        let given = spec.format.or(given);
        let bytes_of = |spec: &Spec| Spec { format: Some(Format::Raw), ..spec.clone() };
        let mut source = self.open_spec(shown.clone(), bytes_of(&spec), None, console)?;
        let is_archive = given.is_none()
            && spec.member.is_none()
            && spec.slice.is_none()
            && tranship_formats::is_tar(&*source.opened.device).map_err(|e| failed(e.into()))?;
        if is_archive {
            drop(source);
            spec.member = Some(Member::OnlyDisk);
            source = self.open_spec(shown.clone(), bytes_of(&spec), None, console)?;
        }
        source.spec = spec;
        let Some(layer) = source.opened.layers.first_mut() else { return Ok(source) };
        layer.format = match given {
            Some(format) => format,
            None => tranship_formats::probe(&layer.file, &layer.path)
                .map_err(|error| failed(Failure::from(error)))?,
        };
        source.opened.format = layer.format;
        // The file is what its user works with, not the disk in it.
        layer.file = source.meter.device(Arc::clone(&layer.file));
        layer.storage = layer.storage.take().map(|storage| source.meter.storage(storage));
        if self.writable && given.is_none() && layer.format == Format::Raw {
            Console::warn_of_guessed_raw(&shown);
        }
        Ok(source)
    }

    fn check_options(&self) -> Result<(), Failure> {
        if self.naming.image_opts && self.format.is_some() {
            return Err(Failure::usage("--image-opts and --format are mutually exclusive"));
        }
        Ok(())
    }

    /// Opens the image that `spec` names, which is called `shown` in messages.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub(crate) fn open_spec(
        &self,
        shown: String,
        spec: Spec,
        format: Option<Format>,
        console: Console,
    ) -> Result<Source, Failure> {
        let failed = |failure: Failure| failure.within(format!("Could not open '{shown}'"));
        let meter = self.metering.map_or_else(DiskMeter::default, |(metering, role)| {
            metering.meter().disk(role, &shown)
        });
        let options = OpenOptions {
            format,
            read_only: !self.writable,
            trust: Trust::Parents,
            allowed: self.naming.allow_path.clone(),
            guess_backing: true,
            without_backing: self.alone,
            salvage: self.salvage,
            locking: if self.force_share { Locking::Shared } else { Locking::On },
            direct: self.direct,
            direct_below: self.direct_below.unwrap_or(self.direct),
            secrets: secrets::parse(&self.naming.object)?,
            meter: meter.clone(),
            files: tranship_formats::Files::System,
        };
        if self.writable && self.force_share {
            return Err(failed(Failure::usage(
                "force-share=on can only be used with read-only images",
            )));
        }
        let opened = tranship_formats::open_spec(&spec, &options).map_err(|error| {
            let kind = error.kind();
            let failure = failed(Failure::from(error));
            match kind {
                ErrorKind::Busy if spec.path().is_some() => {
                    failure.hint(format!("Is another process using the image [{shown}]?"))
                }
                ErrorKind::Denied => failure.hint(
                    "--allow-path DIR lets images open what lies below DIR, and --allow-path \
                     URI what they ask a server for",
                ),
                _ => failure,
            }
        })?;
        let is_guess = spec.format.is_none() && format.is_none() && opened.format == Format::Raw;
        if is_guess && self.writable {
            Console::warn_of_guessed_raw(&shown);
        }
        // Whoever only reads a raw disk is not bothered, as by qemu-img.
        let is_bother = |text: &&String| is_guess && text.contains("nothing was recognised");
        for warning in opened.warnings.iter().filter(|text| !is_bother(text)) {
            console.warn(warning);
        }
        Ok(Source { name: shown, spec, opened, meter })
    }

    /// What `name` means.
    pub(crate) fn spec(&self, name: &OsStr) -> Result<Spec, Failure> {
        let spec = match (name.to_str(), self.naming.image_opts) {
            (Some(text), true) => Spec::from_options(text)?,
            (Some(text), false) => Spec::from_name(text)?,
            (None, _) => Spec::from_path(Path::new(name)),
        };
        Ok(spec)
    }
}

/// The format of this name.
pub(crate) fn format_named(name: &str) -> Result<Format, Failure> {
    name.parse().map_err(|_| Failure::usage(format!("Unknown driver '{name}'")))
}

/// The only image name of a command.
pub(crate) fn one<'a>(
    names: &'a [std::ffi::OsString],
    command: &str,
    console: Console,
) -> Result<&'a OsStr, Failure> {
    match names {
        [name] => Ok(name),
        _ => Err(usage(console, command, "Expecting one image file name")),
    }
}

/// A mistake in the words of a command.
pub(crate) fn usage(console: Console, command: &str, message: impl Into<String>) -> Failure {
    use crate::personality::Personality;
    let hint = match console.personality() {
        Personality::QemuImg => format!("Try 'qemu-img {command} --help' for more info"),
        _ => format!("see `tranship image {command} --help`"),
    };
    Failure::usage(message).hint(hint)
}

/// Where the name that an image has for another one leads.
pub(crate) fn beside(image: &Path, name: &str) -> PathBuf {
    let is_protocol = name.split('/').next().is_some_and(|start| start.contains(':'));
    if is_protocol || name.starts_with('/') {
        return PathBuf::from(name);
    }
    match image.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.join(name),
        _ => PathBuf::from(name),
    }
}

/// The path of a layer, as short as its name allows.
pub(crate) fn shown(layer: &Layer) -> PathBuf {
    match layer.path.strip_prefix("./") {
        Ok(short) if !layer.name.starts_with("./") => short.to_owned(),
        _ => layer.path.clone(),
    }
}

/// How a result is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// For people.
    Human,
    /// For programs.
    Json,
}

/// The value of `--output`.
pub(crate) fn output(
    value: Option<&str>,
    command: &str,
    console: Console,
) -> Result<Output, Failure> {
    match value {
        None | Some("human") => Ok(Output::Human),
        Some("json") => Ok(Output::Json),
        Some(other) => Err(usage(
            console,
            command,
            format!("--output expects 'human' or 'json' not '{other}'"),
        )),
    }
}

/// Whether a way to cache goes past the page cache; all others are the same here, since
/// nothing is reported as done before it is on the disk.
pub(crate) fn cache(value: Option<&str>, what: &str) -> Result<bool, Failure> {
    match value {
        None | Some("writeback" | "unsafe" | "writethrough") => Ok(false),
        Some("none" | "off" | "directsync") => Ok(true),
        Some(other) => Err(Failure::usage(format!("Invalid {what}cache option: {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_the_images_folder() {
        for (image, name, expected) in [
            ("a.q", "b.q", "b.q"),
            ("x/a.q", "b.q", "x/b.q"),
            ("x/a.q", "../b.q", "x/../b.q"),
            ("/x/a.q", "b.q", "/x/b.q"),
            ("x/a.q", "/b.q", "/b.q"),
            ("x/a.q", "nbd://h/x", "nbd://h/x"),
            ("x/a.q", "json:{}", "json:{}"),
        ] {
            assert_eq!(beside(Path::new(image), name), Path::new(expected), "{image} {name}");
        }
    }
}
