// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file in memory that costs what is in it, however long it is.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tranship_block::{
    BlockDevice, Error, ErrorKind, Extent, ExtentKind, Result, Span, Storage, Zeroing,
};

const PAGE: u64 = 4096;
/// Pages that a file may have; then the disk is full.
const MOST_PAGES: usize = 4096;
/// Length that a file may have.
const LONGEST: u64 = 1 << 42;

/// A sparse file. Writing outside of it, and at all while it is read-only, is not an error
/// but a panic: a format has to know what it may do.
#[derive(Debug)]
pub struct Image {
    inner: Arc<Mutex<Inner>>,
    read_only: AtomicBool,
}

#[derive(Clone, Debug)]
struct Inner {
    len: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
}

impl Image {
    /// A file of `len` zeroes.
    pub fn new(len: u64) -> Self {
        let inner = Inner { len: len.min(LONGEST), pages: BTreeMap::new() };
        Self { inner: Arc::new(Mutex::new(inner)), read_only: AtomicBool::new(false) }
    }

    /// Another file with the same contents, to be written.
    #[must_use]
    pub fn copy(&self) -> Self {
        let inner = self.inner().clone();
        Self { inner: Arc::new(Mutex::new(inner)), read_only: AtomicBool::new(false) }
    }

    /// The same file, open once more.
    #[must_use]
    pub fn view(&self, read_only: bool) -> Self {
        Self { inner: self.inner.clone(), read_only: AtomicBool::new(read_only) }
    }

    /// From now on it may not be written, or may be again.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::Relaxed);
    }

    /// Stores bytes as far as they lie within the file and the disk is not full.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        let mut inner = self.inner();
        let left = inner.len.saturating_sub(at);
        let len = (bytes.len() as u64).min(left) as usize;
        let _ = inner.write(&bytes[..len], at);
    }

    /// The bytes of `span`, or none if it is not all within the file.
    pub fn get(&self, span: Span) -> Option<Vec<u8>> {
        let inner = self.inner();
        span.check_within(inner.len).ok()?;
        let mut bytes = vec![0; usize::try_from(span.len).ok()?];
        inner.read(&mut bytes, span.start);
        Some(bytes)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writable(&self, span: Span) -> MutexGuard<'_, Inner> {
        let inner = self.inner();
        assert!(!self.is_read_only(), "a read-only file is written at {span:?}");
        let len = inner.len;
        assert!(span.check_within(len).is_ok(), "write of {span:?} in a file of {len} bytes");
        inner
    }
}

impl Inner {
    /// The pages that `len` bytes at `at` lie in: page, first byte there, bytes there.
    fn parts(at: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
        let end = at + len;
        let pages = if len == 0 { 0..0 } else { at / PAGE..end.div_ceil(PAGE) };
        pages.map(move |page| {
            let (start, stop) = ((page * PAGE).max(at), (page * PAGE + PAGE).min(end));
            (page, (start - page * PAGE) as usize, (stop - start) as usize)
        })
    }

    fn read(&self, buf: &mut [u8], at: u64) {
        buf.fill(0);
        let end = at + buf.len() as u64;
        for (page, bytes) in self.pages.range(at / PAGE..end.div_ceil(PAGE)) {
            let (start, stop) = ((page * PAGE).max(at), (page * PAGE + PAGE).min(end));
            let within = (start - page * PAGE) as usize..(stop - page * PAGE) as usize;
            buf[(start - at) as usize..(stop - at) as usize].copy_from_slice(&bytes[within]);
        }
    }

    fn write(&mut self, mut buf: &[u8], at: u64) -> Result<()> {
        for (page, within, len) in Self::parts(at, buf.len() as u64) {
            let (now, later) = buf.split_at(len);
            buf = later;
            if !self.pages.contains_key(&page) {
                if now.iter().all(|byte| *byte == 0) {
                    continue;
                }
                if self.pages.len() >= MOST_PAGES {
                    return Err(Error::new(ErrorKind::NoSpace, "the disk is full").at(at));
                }
            }
            let bytes = self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
            bytes[within..within + len].copy_from_slice(now);
        }
        Ok(())
    }

    fn zero(&mut self, span: Span) {
        let first = span.start / PAGE;
        let pages: Vec<u64> = if span.is_empty() {
            Vec::new()
        } else {
            self.pages.range(first..span.end().div_ceil(PAGE)).map(|(page, _)| *page).collect()
        };
        for page in pages {
            let (start, stop) =
                ((page * PAGE).max(span.start), (page * PAGE + PAGE).min(span.end()));
            if stop - start == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[(start - page * PAGE) as usize..(stop - page * PAGE) as usize].fill(0);
            }
        }
    }
}

impl BlockDevice for Image {
    fn size(&self) -> u64 {
        self.inner().len
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inner = self.inner();
        let (span, len) = (Span::new(offset, buf.len() as u64), inner.len);
        span.check_within(len)?;
        inner.read(buf, offset);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.writable(Span::new(offset, buf.len() as u64)).write(buf, offset)
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        self.writable(span).zero(span);
        Ok(())
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.writable(span).zero(span);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let inner = self.inner();
        let left = inner.len.saturating_sub(offset);
        if left == 0 {
            return Err(Error::usage("extent past the end of the file").at(offset));
        }
        let first = inner.pages.range(offset / PAGE..).next().map(|(page, _)| page * PAGE);
        Ok(match first {
            Some(start) if start <= offset => {
                Extent::new(ExtentKind::Data, (start + PAGE - offset).min(left)).mapped_to(offset)
            }
            Some(start) => Extent::new(ExtentKind::Hole, (start - offset).min(left)),
            None => Extent::new(ExtentKind::Hole, left),
        })
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

impl Storage for Image {
    fn set_len(&self, len: u64) -> Result<()> {
        assert!(!self.is_read_only(), "a read-only file gets the length {len}");
        if len > LONGEST {
            return Err(Error::new(ErrorKind::NoSpace, format!("{len} bytes are too many")));
        }
        let mut inner = self.inner();
        let old = inner.len;
        if len < old {
            inner.zero(Span::new(len, old.next_multiple_of(PAGE) - len));
        }
        inner.len = len;
        Ok(())
    }
}
