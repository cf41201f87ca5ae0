// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a file has data, asked for as seldom as possible.

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::fs::File;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use tranship_block::{ExtentKind, Span};

/// The last answer about a file. Each run of data or nothing costs one seek when the file
/// is walked: where one ends, the other begins.
#[derive(Debug, Default)]
pub(crate) struct Holes {
    last: Mutex<Option<Answer>>,
    /// Counts changes of the file: an answer from before the last one is worth nothing.
    changes: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Answer {
    span: Span,
    kind: ExtentKind,
    changes: u64,
}

impl Holes {
    /// Something is written, cut or given back; told before it happens and afterwards.
    pub(crate) fn forget(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// What is at `offset`, and up to where; the file has `size` bytes.
    pub(crate) fn at(
        &self,
        file: &File,
        offset: u64,
        size: u64,
    ) -> std::result::Result<(ExtentKind, u64), Errno> {
        let changes = self.changes.load(Ordering::Acquire);
        // Only a walk onward is answered from memory: who asks for the same place again
        // may expect something new, from another writer of the file.
        let mut last = self.last.lock().map_or(None, |mut last| last.take());
        last = last.filter(|last| last.changes == changes && last.span.start < offset);
        if let Some(answer) = last.filter(|last| offset < last.span.end()) {
            let end = answer.span.end();
            self.keep(Span::new(offset, end.saturating_sub(offset)), answer.kind, changes);
            return Ok((answer.kind, end));
        }
        let before = last.filter(|last| last.span.end() == offset).map(|last| last.kind);
        let (kind, end, certain) = ask(file, offset, size, before)?;
        let end = end.clamp(offset.saturating_add(1), size);
        if certain {
            self.keep(Span::new(offset, end.saturating_sub(offset)), kind, changes);
        }
        Ok((kind, end))
    }

    fn keep(&self, span: Span, kind: ExtentKind, changes: u64) {
        if let Ok(mut last) = self.last.lock() {
            *last = Some(Answer { span, kind, changes });
        }
    }
}

/// Asks the file system; `before` is what ends at `offset`, if that is known. The last
/// value is false if the file system keeps no map.
fn ask(
    file: &File,
    offset: u64,
    size: u64,
    before: Option<ExtentKind>,
) -> std::result::Result<(ExtentKind, u64, bool), Errno> {
    if before != Some(ExtentKind::Hole) {
        match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(start) if start > offset => return Ok((ExtentKind::Hole, start, true)),
            Ok(_) => {}
            Err(Errno::NXIO) => {
                // What somebody has cut off is no hole: reading it tells what is wrong.
                let there = crate::file::length_of(file, false)?.min(size);
                return Ok(if offset < there {
                    (ExtentKind::Hole, there, true)
                } else {
                    (ExtentKind::Data, size, false)
                });
            }
            // A block device, or a file system that keeps no map: all of it is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::SPIPE | Errno::NOSYS) => {
                return Ok((ExtentKind::Data, size, false));
            }
            Err(errno) => return Err(errno),
        }
    }
    let end = rustix::fs::seek(file, SeekFrom::Hole(offset));
    Ok((ExtentKind::Data, end.unwrap_or(size), end.is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::{Access, RawFile};
    use tranship_block::BlockDevice;

    #[test]
    fn an_end_that_was_cut_off_is_no_hole() {
        const MIB: u64 = 1 << 20;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let cutter = File::options().write(true).open(&path).unwrap();
        cutter.set_len(4 * MIB).unwrap();
        let disk = RawFile::open(&path, Access::ReadOnly).unwrap();
        let at = |offset| {
            let extent = disk.extent_at(offset).unwrap();
            (extent.kind, extent.len)
        };
        assert_eq!(at(2 * MIB), (ExtentKind::Hole, 2 * MIB));
        cutter.set_len(3 * MIB).unwrap();
        assert_eq!(at(2 * MIB), (ExtentKind::Hole, MIB));
        assert_eq!(at(3 * MIB), (ExtentKind::Data, MIB));
        assert!(disk.read_at(&mut [0; 512], 3 * MIB).is_err());
        // What it is now, it is for everybody who looks.
        assert_eq!(disk.size(), 4 * MIB);
        disk.refresh_size();
        assert_eq!(disk.size(), 3 * MIB);
        assert!(disk.extent_at(3 * MIB).is_err());
    }
}
