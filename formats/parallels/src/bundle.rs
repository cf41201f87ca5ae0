// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A whole disk: the files of all its parts, layer on layer.

use crate::descriptor::{Descriptor, ImageFile, ImageType, StorageFiles};
use crate::image::{Image, OpenOptions};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Extent, Gate, Request, Result, Span, Zeroing};

/// How to open a bundle.
#[derive(Clone, Debug, Default)]
pub struct BundleOptions {
    /// The state to show, by its GUID; the current one without.
    pub state: Option<String>,
    /// Gives zeroes for clusters that lie behind the end of truncated growing files.
    pub salvage: bool,
}

/// A disk of Parallels, open for reading.
#[derive(Debug)]
pub struct Bundle {
    descriptor: Descriptor,
    state: String,
    parts: Vec<Part>,
    warnings: Vec<String>,
}

/// A part of the disk with all that it consists of.
#[derive(Debug)]
struct Part {
    span: Span,
    file: String,
    device: Arc<dyn BlockDevice>,
}

impl Bundle {
    /// Opens the disk whose `DiskDescriptor.xml` has this text. Files are asked of `gate`
    /// by the names that the descriptor has for them.
    ///
    /// # Errors
    ///
    /// Those of [`Descriptor::parse`], of [`Descriptor::chain`], of the gate and of the
    /// images; [`tranship_block::ErrorKind::Corrupt`] if a file is too short for its part.
    pub fn open(text: &str, gate: &dyn Gate, options: &BundleOptions) -> Result<Self> {
        let descriptor = Descriptor::parse(text)?;
        let state = options.state.clone().unwrap_or_else(|| descriptor.top.clone()).to_lowercase();
        // A disk without snapshots need not list its only state.
        let chain = if descriptor.shots.is_empty() {
            vec![state.as_str()]
        } else {
            descriptor.chain(&state)?
        };
        let mut warnings = Vec::new();
        let mut parts = Vec::new();
        for storage in &descriptor.storages {
            let mut opener = Opener { gate, salvage: options.salvage, warnings: &mut warnings };
            parts.push(opener.part(storage, &chain)?);
        }
        Ok(Self { state: state.clone(), parts, warnings, descriptor })
    }

    /// What the descriptor says.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The state that is shown.
    pub fn state(&self) -> &str {
        &self.state
    }

    /// What was wrong with the disk and could be worked around.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn part_at(&self, offset: u64) -> Result<&Part> {
        let behind = self.parts.partition_point(|part| part.span.start <= offset);
        behind
            .checked_sub(1)
            .and_then(|index| self.parts.get(index))
            .filter(|part| offset < part.span.end())
            .ok_or_else(|| Error::usage("offset past the end of the disk").at(offset))
    }
}

struct Opener<'a> {
    gate: &'a dyn Gate,
    salvage: bool,
    warnings: &'a mut Vec<String>,
}

impl Opener<'_> {
    /// Opens the files of `storage` for `chain`, the newest state first.
    fn part(&mut self, storage: &StorageFiles, chain: &[&str]) -> Result<Part> {
        let mut layers = Vec::new();
        for guid in chain {
            let image = storage.images.iter().find(|image| image.guid == *guid);
            let image = image.ok_or_else(|| {
                Error::corrupt(format!(
                    "part of the disk at byte {} has no file for state {guid}",
                    storage.span.start
                ))
            })?;
            layers.push(image);
            // Nothing shows through a plain file.
            if image.kind == ImageType::Plain {
                break;
            }
        }
        let mut below: Option<Arc<dyn BlockDevice>> = None;
        let mut file = String::new();
        for image in layers.into_iter().rev() {
            below = Some(self.layer(image, below).map_err(|error| error.in_file(&image.file))?);
            file.clone_from(&image.file);
        }
        let device = below.ok_or_else(|| Error::corrupt("disk has no state"))?;
        if device.size() < storage.span.len {
            return Err(Error::corrupt(format!(
                "image has {} bytes, but its part of the disk {}",
                device.size(),
                storage.span.len
            ))
            .in_file(&file));
        }
        Ok(Part { span: storage.span, file, device })
    }

    fn layer(
        &mut self,
        image: &ImageFile,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Arc<dyn BlockDevice>> {
        let role = "Parallels image";
        let file = self.gate.open(Request { name: &image.file, role, writable: false })?;
        match image.kind {
            ImageType::Plain => Ok(file),
            ImageType::Compressed => {
                let options = OpenOptions { parent, salvage: self.salvage };
                let opened = Image::open_read_only(file, options)?;
                let named = |warning: &String| format!("{}: {warning}", image.file);
                self.warnings.extend(opened.warnings().iter().map(named));
                Ok(Arc::new(opened))
            }
        }
    }
}

impl BlockDevice for Bundle {
    fn size(&self) -> u64 {
        self.descriptor.size
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn preferred_block(&self) -> u32 {
        self.parts.iter().map(|part| part.device.preferred_block()).max().unwrap_or(4096)
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let wanted = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        Span::new(offset, wanted).check_within(self.size())?;
        while !buf.is_empty() {
            let part = self.part_at(offset)?;
            let left = usize::try_from(part.span.end().saturating_sub(offset));
            let (piece, rest) = buf.split_at_mut(left.unwrap_or(usize::MAX).min(buf.len()));
            part.device
                .read_at(piece, offset.saturating_sub(part.span.start))
                .map_err(|error| error.in_file(&part.file))?;
            offset = offset.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
            buf = rest;
        }
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn discard(&self, span: Span) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let part = self.part_at(offset)?;
        let extent = part.device.extent_at(offset.saturating_sub(part.span.start));
        let extent = extent.map_err(|error| error.in_file(&part.file))?;
        Ok(extent.limited_to(part.span.end().saturating_sub(offset)))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
