// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The open disk.

use crate::footer::{Footer, Kind};
use crate::sparse::{Sparse, length};
use crate::write::Target;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Result, Span, Storage, Zeroing};

/// An open VHD.
#[derive(Debug)]
pub struct Vpc {
    pub(crate) file: Arc<dyn BlockDevice>,
    pub(crate) storage: Option<Arc<dyn Storage>>,
    pub(crate) footer: RwLock<Footer>,
    pub(crate) size: AtomicU64,
    /// Held, shared, by everybody who knows places in the file from the table. Taken
    /// alone, it waits for them: afterwards nobody knows a place that was given up.
    pub(crate) in_use: RwLock<()>,
    pub(crate) body: Body,
    warnings: Vec<String>,
}

#[derive(Debug)]
pub(crate) enum Body {
    /// The disk's bytes from the start of the file.
    Fixed {
        /// Bytes that the file has of a disk that was cut off and is salvaged.
        stored: u64,
    },
    Sparse(Box<Sparse>),
}

impl Vpc {
    pub(crate) fn new(
        file: Arc<dyn BlockDevice>,
        storage: Option<Arc<dyn Storage>>,
        footer: Footer,
        size: u64,
        body: Body,
        warnings: Vec<String>,
    ) -> Self {
        Self {
            file,
            storage,
            footer: RwLock::new(footer),
            size: AtomicU64::new(size),
            in_use: RwLock::new(()),
            body,
            warnings,
        }
    }

    /// How the disk is stored.
    pub fn kind(&self) -> Kind {
        self.footer_ref().kind
    }

    /// The fields of the footer.
    pub fn footer(&self) -> Footer {
        self.footer_ref().clone()
    }

    /// The id that children of this disk name.
    pub fn unique_id(&self) -> [u8; 16] {
        self.footer_ref().unique_id
    }

    /// Bytes of a block; none for fixed disks.
    pub fn block_size(&self) -> Option<u32> {
        match &self.body {
            Body::Fixed { .. } => None,
            Body::Sparse(sparse) => Some(sparse.header().block_size),
        }
    }

    /// The id that the parent of a differencing disk has.
    pub fn parent_id(&self) -> Option<[u8; 16]> {
        match &self.body {
            Body::Sparse(sparse) if sparse.is_differencing => Some(sparse.header().parent_id),
            Body::Fixed { .. } | Body::Sparse(_) => None,
        }
    }

    /// What was wrong with the image and could be worked around.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub(crate) fn footer_ref(&self) -> RwLockReadGuard<'_, Footer> {
        self.footer.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The storage to write to.
    pub(crate) fn writable(&self) -> Result<&dyn Storage> {
        self.storage.as_deref().ok_or_else(|| Error::usage("device is read-only"))
    }

    fn using(&self) -> RwLockReadGuard<'_, ()> {
        self.in_use.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `fixed` or `sparse` to change `span` of the disk.
    fn change(
        &self,
        span: Span,
        fixed: impl FnOnce(&dyn Storage) -> Result<()>,
        sparse: impl FnOnce(&Sparse, Target<'_>) -> Result<()>,
    ) -> Result<()> {
        let storage = self.writable().map_err(|error| error.at(span.start))?;
        {
            let _in_use = self.using();
            let size = self.size();
            span.check_within(size)?;
            match &self.body {
                Body::Fixed { .. } => return fixed(storage),
                Body::Sparse(body) => {
                    let footer = self.footer_ref();
                    body.mend(storage, &footer)?;
                    sparse(body, Target { storage, footer: &footer, size })?;
                }
            }
        }
        match &self.body {
            // Nobody may hold `in_use` here: flushing waits for those who do.
            Body::Sparse(body) if body.bitmaps.wants_flush(&body.layout) => self.flush(),
            _ => Ok(()),
        }
    }
}

impl BlockDevice for Vpc {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn is_read_only(&self) -> bool {
        self.storage.is_none()
    }

    fn preferred_block(&self) -> u32 {
        self.block_size().unwrap_or(4096)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let _in_use = self.using();
        Span::new(offset, length(buf)).check_within(self.size())?;
        match &self.body {
            Body::Sparse(sparse) => sparse.read(buf, offset),
            Body::Fixed { stored } if self.is_cut(*stored) => {
                let left = usize::try_from(stored.saturating_sub(offset)).unwrap_or(usize::MAX);
                let (there, beyond) = buf.split_at_mut(left.min(buf.len()));
                beyond.fill(0);
                if there.is_empty() { Ok(()) } else { self.file.read_at(there, offset) }
            }
            Body::Fixed { .. } => self.file.read_at(buf, offset),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change(
            Span::new(offset, length(buf)),
            |storage| storage.write_at(buf, offset),
            |sparse, to| sparse.write(to, buf, offset),
        )
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.change(
            span,
            |storage| storage.write_zeroes(span, mode),
            |sparse, to| sparse.zero(to, span, mode),
        )
    }

    /// Blocks that are covered as a whole leave the file's table where nothing is below
    /// them; of others, storage is given back.
    fn discard(&self, span: Span) -> Result<()> {
        self.change(span, |storage| storage.discard(span), |sparse, to| sparse.discard(to, span))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let _in_use = self.using();
        Span::new(offset, 1).check_within(self.size())?;
        let left = self.size().saturating_sub(offset);
        match &self.body {
            Body::Sparse(sparse) => sparse.extent(offset, left),
            Body::Fixed { stored } if self.is_cut(*stored) && offset >= *stored => {
                Ok(Extent::new(ExtentKind::Hole, left))
            }
            Body::Fixed { stored } => {
                let end = if self.is_cut(*stored) { *stored } else { self.size() };
                Ok(self.file.extent_at(offset)?.limited_to(end.saturating_sub(offset)))
            }
        }
    }

    fn flush(&self) -> Result<()> {
        let Some(storage) = self.storage.as_deref() else { return Ok(()) };
        let Body::Sparse(sparse) = &self.body else { return storage.flush() };
        let _flushing = sparse.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let freed = sparse.commit(storage)?;
        if !freed.is_empty() {
            drop(self.in_use.write().unwrap_or_else(PoisonError::into_inner));
            sparse.recycle(&freed);
        }
        Ok(())
    }
}

impl Vpc {
    /// Whether the file has only the first `stored` bytes of a fixed disk.
    fn is_cut(&self, stored: u64) -> bool {
        self.storage.is_none() && stored < self.size()
    }
}

impl Drop for Vpc {
    fn drop(&mut self) {
        // Errors have nobody to go to here: who needs to know calls flush first.
        let (Body::Sparse(sparse), Some(storage)) = (&self.body, self.storage.as_deref()) else {
            return;
        };
        if sparse.is_changed() && self.flush().is_err() {
            return;
        }
        let _ = sparse.trim(storage, &self.footer_ref());
    }
}
