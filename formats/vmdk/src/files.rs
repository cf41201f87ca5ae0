// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The extents of a disk that is being opened.

use crate::disk::Backing;
use crate::extents::{OpenFile, Source};
use crate::header::{self, MAX_DIRECTORY_ENTRIES};
use crate::layout::Layout;
use crate::line::{Access, ExtentLine, ExtentType};
use crate::open::{File, file_kind, read_head};
use crate::sparse::SparseExtent;
use crate::writer::Writer;
use crate::{SECTOR, cowd, sesparse};
use std::collections::HashMap;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Slice, Span};

/// The extent in `file`, ready to be written if the file can be.
pub(crate) fn sparse(
    file: OpenFile,
    layout: Layout,
    salvage: bool,
    warnings: &mut Vec<String>,
) -> Result<SparseExtent> {
    if layout.unclean {
        warnings.push("the last writer did not close the disk".to_owned());
    }
    let is_stream = layout.compressed || layout.has_footer;
    if file.storage.is_some() && (is_stream || layout.kind == ExtentType::SeSparse) {
        return Err(Error::unsupported(if is_stream {
            "a stream-optimized disk is written once: convert it to another kind to change it"
        } else {
            "seSparse extents are read only: convert the disk to another kind to change it"
        }));
    }
    let (mut extent, found) = SparseExtent::open(file.device, layout, salvage)?;
    warnings.extend(found);
    if let Some(storage) = file.storage {
        let end = extent.end_of_last_grain();
        extent.writer = Some(Writer::new(storage, &extent.layout, &extent.tables, end));
    }
    Ok(extent)
}

/// The files of a disk, each opened once.
pub(crate) struct Files<'a> {
    source: Source<'a>,
    writable: bool,
    salvage: bool,
    opened: HashMap<String, OpenFile>,
    flat: Vec<Arc<dyn BlockDevice>>,
    directory_entries: u64,
}

impl<'a> Files<'a> {
    pub(crate) fn new(source: Source<'a>, writable: bool, salvage: bool) -> Self {
        let (opened, flat) = (HashMap::new(), Vec::new());
        Self { source, writable, salvage, opened, flat, directory_entries: 0 }
    }

    /// The files of flat extents that may be written.
    pub(crate) fn flat(self) -> Vec<Arc<dyn BlockDevice>> {
        self.flat
    }

    /// What the extent of `line` consists of: a second part is what is missing.
    pub(crate) fn open(
        &mut self,
        line: &ExtentLine,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<(u64, Backing)>> {
        let opened = match line.kind {
            _ if line.access == Access::None => {
                warnings.push("an extent is marked NOACCESS: it reads as zeroes".to_owned());
                return Ok(vec![(line.len, Backing::Zero)]);
            }
            ExtentType::Zero => return Ok(vec![(line.len, Backing::Zero)]),
            ExtentType::Sparse | ExtentType::VmfsSparse | ExtentType::SeSparse => {
                self.sparse(line, warnings).map(|backing| vec![(line.len, backing)])
            }
            _ => self.flat_extent(line, warnings),
        };
        match opened {
            Err(error) if self.salvage && error.kind() != ErrorKind::Denied => {
                warnings.push(format!("{}: {error}: it reads as zeroes", line.name));
                Ok(vec![(line.len, Backing::Zero)])
            }
            other => other.map_err(|error| error.in_file(&line.name)),
        }
    }

    fn file(&mut self, line: &ExtentLine) -> Result<OpenFile> {
        if let Some(file) = self.opened.get(&line.name) {
            return Ok(file.clone());
        }
        let writable = self.writable && line.access == Access::ReadWrite;
        let file = self.source.open(&line.name, writable)?;
        self.opened.insert(line.name.clone(), file.clone());
        Ok(file)
    }

    fn flat_extent(
        &mut self,
        line: &ExtentLine,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<(u64, Backing)>> {
        let is_new = !self.opened.contains_key(&line.name);
        let file = self.file(line)?;
        if is_new && file.storage.is_some() {
            self.flat.push(Arc::clone(&file.device));
        }
        let size = file.device.size();
        let there = size.saturating_sub(line.offset).min(line.len);
        if there == line.len {
            let slice = Slice::new(file.device, Span::new(line.offset, line.len))?;
            return Ok(vec![(line.len, Backing::Flat(slice))]);
        }
        let error = Error::corrupt(format!(
            "flat extent of {} bytes ends past the file's size of {size} bytes",
            line.len
        ))
        .at(line.offset);
        if !self.salvage || there == 0 {
            return Err(error);
        }
        warnings.push(format!("{}: {error}: what is missing reads as zeroes", line.name));
        let slice = Slice::new(file.device, Span::new(line.offset, there))?;
        let missing = line.len.saturating_sub(there);
        Ok(vec![(there, Backing::Flat(slice)), (missing, Backing::Zero)])
    }

    fn sparse(&mut self, line: &ExtentLine, warnings: &mut Vec<String>) -> Result<Backing> {
        if self.opened.contains_key(&line.name) {
            return Err(Error::corrupt(format!("sparse extent {:?} is listed twice", line.name)));
        }
        let file = self.file(line)?;
        let layout = match file_kind(&read_head(&file.device)?) {
            Some(File::Hosted) => header::read(&file.device)?,
            Some(File::Cowd) => cowd::read(&file.device)?,
            Some(File::SeSparse) => sesparse::read(&file.device, self.salvage)?,
            Some(File::Text) | None => {
                return Err(Error::corrupt("the file is no sparse extent of a VMDK disk"));
            }
        };
        if layout.capacity < line.len {
            return Err(Error::corrupt(format!(
                "sparse extent has a capacity of {} sectors, the descriptor says {}",
                layout.capacity / SECTOR,
                line.len / SECTOR
            )));
        }
        self.directory_entries = self.directory_entries.saturating_add(layout.directory_entries);
        if self.directory_entries > MAX_DIRECTORY_ENTRIES {
            return Err(Error::corrupt(format!(
                "the grain directories of all extents have more than {MAX_DIRECTORY_ENTRIES} entries"
            )));
        }
        let mut found = Vec::new();
        let extent = sparse(file, layout, self.salvage, &mut found)?;
        warnings.extend(found.iter().map(|warning| format!("{}: {warning}", line.name)));
        Ok(Backing::Sparse(Box::new(extent)))
    }
}
