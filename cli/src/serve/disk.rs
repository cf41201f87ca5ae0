// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens the disks that are served.

use super::encryption;
use super::guard::StaysRaw;
use super::settings::{Named, Settings};
use crate::args::ServeArgs;
use crate::disk::overlay;
use crate::failure::Failure;
use crate::image::console::Console;
use crate::image::secrets;
use crate::image::source::{self, Source};
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, ErrorKind, Meter, Slice, Span};
use tranship_formats::{Format, Locking, OpenOptions, Opened, Spec, Trust};
use tranship_nbd::{DirtyBitmap, ExportedBitmap};
use tranship_qcow2::BitmapContent;

/// How disks are opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening<'a> {
    pub(super) args: &'a ServeArgs,
    pub(super) settings: &'a Settings,
    pub(super) meter: &'a Meter,
    pub(super) console: Console,
}

/// A disk that clients can have.
#[derive(Debug)]
pub(super) struct Offered {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) read_only: bool,
    pub(super) bitmaps: Vec<ExportedBitmap>,
    /// Layers that hide what is below them.
    pub(super) whole_layers: Vec<u32>,
}

/// A bitmap as it was when the disk was opened.
#[derive(Debug)]
struct Kept {
    content: BitmapContent,
    offset: u64,
}

impl DirtyBitmap for Kept {
    fn dirty_at(&self, offset: u64) -> tranship_block::Result<(bool, u64)> {
        match self.content.dirty_at(offset.saturating_add(self.offset)) {
            // The disk is longer than the bitmap knows.
            (_, 0) => Ok((false, u64::MAX)),
            known => Ok(known),
        }
    }
}

/// The layers that have every byte, counted from `above`: QEMU asks no further where its
/// driver of a format knows no backing file.
fn whole_layers(opened: &Opened, above: u32) -> Vec<u32> {
    let is_whole = |format| matches!(format, Format::Raw | Format::Vpc | Format::Vdi);
    let layers = opened.layers.iter().zip(above..);
    layers.filter(|(layer, _)| is_whole(layer.format)).map(|(_, number)| number).collect()
}

impl Opening<'_> {
    /// Opens a disk for clients.
    pub(super) fn open(&self, named: &Named) -> Result<Offered, Failure> {
        let args = self.args;
        let is_kept = args.read_only || args.load_snapshot.is_some();
        let (source, is_guess) = self.image(named, is_kept || args.snapshot)?;
        let bitmaps = self.bitmaps(&source, is_kept)?;
        let device = source.device(args.load_snapshot.as_deref())?;
        let device = match (args.snapshot, is_kept) {
            (true, false) => overlay(device)?,
            (_, true) => device,
            (false, false) if device.is_read_only() => {
                self.console.warn(&format!(
                    "{} can only be read, and so can its export",
                    named.disk.display()
                ));
                device
            }
            (false, false) => {
                let path = Path::new(&named.disk).to_owned();
                let device: Arc<dyn BlockDevice> =
                    if is_guess { Arc::new(StaysRaw::new(device, path)) } else { device };
                self.settings.policy.over(device)
            }
        };
        Ok(Offered {
            name: named.export.clone(),
            description: args.description.clone().unwrap_or_default(),
            bitmaps,
            // A temporary overlay is one more layer.
            whole_layers: whole_layers(&source.opened, u32::from(args.snapshot && !is_kept)),
            read_only: is_kept || device.is_read_only(),
            device: self.part(device)?,
        })
    }

    /// Opens the image with what it is based on; whether its format was guessed to be raw.
    fn image(&self, named: &Named, read_only: bool) -> Result<(Source, bool), Failure> {
        let args = self.args;
        let shown = named.disk.to_string_lossy().into_owned();
        let failed = |failure: Failure| failure.within(format!("Failed to blk_new_open '{shown}'"));
        let format = args.format.as_deref().map(source::format_named).transpose();
        let format = format.map_err(failed)?;
        let spec = match (named.disk.to_str(), args.image_opts) {
            (Some(text), true) => Spec::from_options(text),
            (Some(text), false) => Spec::from_name(text),
            (None, _) => Ok(Spec::from_path(Path::new(&named.disk))),
        };
        let spec = spec.map_err(|error| failed(error.into()))?;
        let meter = self.meter.disk("export", &shown);
        let options = OpenOptions {
            format,
            read_only,
            // Those who write an image do not decide which files of the host are served.
            trust: Trust::Folder,
            allowed: args.allow_path.clone(),
            guess_backing: true,
            without_backing: false,
            salvage: args.salvage,
            locking: Locking::On,
            direct: self.settings.direct,
            direct_below: self.settings.direct,
            secrets: secrets::parse(&encryption::without_servers(&args.object)?)?,
            meter: meter.clone(),
            files: tranship_formats::Files::System,
        };
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
        if is_guess && !read_only {
            Console::warn_of_guessed_raw(&shown);
        }
        self.warn(&opened, is_guess);
        Ok((Source { name: shown, spec, opened, meter }, is_guess))
    }

    /// The bitmaps of the image that clients are to see.
    fn bitmaps(&self, source: &Source, is_kept: bool) -> Result<Vec<ExportedBitmap>, Failure> {
        let layers = &source.opened.layers;
        let layer = layers.first().filter(|layer| layer.format == Format::Qcow2);
        let find = |name: &String| {
            let missing = || Failure::usage(format!("Bitmap '{name}' is not found"));
            let layer = layer.ok_or_else(missing)?;
            let known = tranship_qcow2::bitmaps(&layer.file)?;
            let known = known.into_iter().find(|known| known.name == *name);
            if known.ok_or_else(missing)?.is_enabled && !is_kept && !self.args.snapshot {
                return Err(Failure::usage(format!(
                    "bitmap '{name}' changes with every write, and clients would see it as it \
                     is now"
                ))
                .hint("serve the disk with -r, or disable the bitmap"));
            }
            let content = BitmapContent::read(&layer.file, name)?;
            let bitmap = Arc::new(Kept { content, offset: self.settings.offset });
            Ok(ExportedBitmap { name: name.clone(), bitmap })
        };
        self.args.bitmap.iter().map(find).collect()
    }

    fn warn(&self, opened: &Opened, is_guess: bool) {
        // What was guessed has been told, or does no harm to those who only read.
        let is_told = |text: &&String| is_guess && text.contains("nothing was recognised");
        for warning in opened.warnings.iter().filter(|text| !is_told(text)) {
            self.console.warn(warning);
        }
    }

    /// The disk from its offset on.
    fn part(&self, device: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>, Failure> {
        let offset = self.settings.offset;
        if offset == 0 {
            return Ok(device);
        }
        let size = device.size();
        match size.checked_sub(offset) {
            Some(len) if len > 0 => Ok(Arc::new(Slice::new(device, Span::new(offset, len))?)),
            _ => Err(Failure::usage(format!(
                "Offset ({offset}) has to be smaller than the image size ({size})"
            ))),
        }
    }
}
