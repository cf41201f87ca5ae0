// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An open image.

use crate::bitmaps::tracking::Tracking;
use crate::compressed::Inflated;
use crate::geometry::{Geometry, Mapping, to_u64};
use crate::header::{Compression, Header};
use crate::metadata::Metadata;
use crate::refcounts::{Refcounts, read_table};
use crate::repair::rebuild_refcounts;
use crate::snapshots;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use tranship_block::{
    BlockDevice, Error, ErrorKind, Extent, ExtentKind, FileRange, Result, SectorCipher, Span,
    Storage, Zeroing,
};

/// How an image is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Refuse writes, and touch nothing of the file.
    pub read_only: bool,
    /// What unallocated clusters read from; required if the header names a backing file.
    ///
    /// It may also be given where the header names none: the image is then an overlay
    /// whose base only this program knows.
    pub backing: Option<Arc<dyn BlockDevice>>,
    /// What the payload is in; required if, and only if, [`Header::has_data_file`].
    pub data_file: Option<Arc<dyn Storage>>,
    /// The key; required if the header says that the image is encrypted.
    pub cipher: Option<Arc<dyn SectorCipher>>,
}

/// The disk inside a QCOW2 image.
///
/// Any number of threads may use it at once. Writes are durable after
/// [`BlockDevice::flush`]; dropping it writes metadata back, but reports no errors.
#[derive(Debug)]
pub struct Qcow2 {
    pub(crate) file: Arc<dyn BlockDevice>,
    /// The same file, if it may be changed.
    pub(crate) storage: Option<Arc<dyn Storage>>,
    pub(crate) backing: Option<Arc<dyn BlockDevice>>,
    /// The external data file.
    pub(crate) data: Option<Arc<dyn Storage>>,
    pub(crate) cipher: Option<Arc<dyn SectorCipher>>,
    /// Held while a part of an encrypted sector is changed.
    pub(crate) sectors: Mutex<()>,
    pub(crate) header: Header,
    pub(crate) geometry: Geometry,
    pub(crate) metadata: Mutex<Metadata>,
    /// A run in [`Metadata::busy`] has gone.
    pub(crate) idle: Condvar,
    /// Held for reading while payload moves, so that no freed cluster is given to
    /// somebody else under a reader's feet; taken before every other lock.
    pub(crate) in_use: RwLock<()>,
    /// Held while metadata is written back in its order.
    pub(crate) writing_back: Mutex<()>,
    /// The next write has nothing to prepare, to mark or to make room for. It changes under
    /// the lock of the metadata.
    pub(crate) ready: AtomicBool,
    /// Writing back failed: what is on disk is consistent, but not what was promised.
    pub(crate) failed: AtomicBool,
    /// Length of the file when it was opened; it is never cut below.
    pub(crate) original_len: u64,
    pub(crate) inflated: Mutex<Inflated>,
    /// Enabled bitmaps; locked before the metadata.
    pub(crate) tracking: Mutex<Tracking>,
}

impl Qcow2 {
    /// Opens the image in `storage`. If it was not shut down cleanly and is opened for
    /// writing, its reference counts are rebuilt first.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] if it needs a backing file or a data file that was not given,
    /// [`ErrorKind::Unsupported`] if it is encrypted and no key was given or of an unknown
    /// kind, [`ErrorKind::Corrupt`] if it contradicts the format.
    pub fn open(storage: Arc<dyn Storage>, options: OpenOptions) -> Result<Self> {
        if options.read_only {
            return Self::open_read_only_with(storage, options);
        }
        if storage.is_read_only() {
            return Err(Error::usage("image cannot be written: its file is open for reading only"));
        }
        if options.data_file.as_ref().is_some_and(BlockDevice::is_read_only) {
            return Err(Error::usage(
                "image cannot be written: its data file is open for reading only",
            ));
        }
        let file: Arc<dyn BlockDevice> = Arc::<dyn Storage>::clone(&storage);
        Self::new(file, Some(storage), options)
    }

    /// Opens the image in `file` for reading alone: a member of an archive, for example.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_read_only(
        file: Arc<dyn BlockDevice>,
        backing: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        Self::open_read_only_with(file, OpenOptions { backing, ..OpenOptions::default() })
    }

    /// Opens the image in `file` for reading alone, whatever `options` say about that.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_read_only_with(file: Arc<dyn BlockDevice>, options: OpenOptions) -> Result<Self> {
        Self::new(file, None, options)
    }

    fn new(
        file: Arc<dyn BlockDevice>,
        storage: Option<Arc<dyn Storage>>,
        options: OpenOptions,
    ) -> Result<Self> {
        let mut header = Header::read(&file)?;
        header.check_openable(options.cipher.is_some(), options.data_file.is_some())?;
        if let (Some(wanted), None) = (&header.backing, &options.backing) {
            return Err(Error::new(
                ErrorKind::Denied,
                format!("the image needs backing file {:?}, which was not given", wanted.name),
            ));
        }
        if storage.is_some() && header.is_marked_corrupt() {
            return Err(Error::corrupt(
                "image is marked corrupt: it can be read, but not written before it is repaired",
            )
            .at(72));
        }
        if let Some(storage) = storage.as_ref().filter(|_| header.is_dirty()) {
            rebuild_refcounts(&**storage)?;
            header = Header::read(&file)?;
        }
        // Refused now rather than when its reference counts are needed.
        snapshots::read(&file, &header)?;
        let geometry = header.geometry();
        let l1 = read_table(&file, header.l1_table_offset, geometry.l1_entries(header.size))?;
        let table = read_table(
            &file,
            header.refcount_table_offset,
            geometry.offset(u64::from(header.refcount_table_clusters)) / 8,
        )?;
        let refcounts = Refcounts::new(geometry, header.refcount_table_offset, table);
        let mut metadata = Metadata::new(geometry, l1, refcounts);
        metadata.l1_offset = header.l1_table_offset;
        let original_len = file.size();
        Self::with_metadata((file, storage), options, header, metadata, original_len)
    }

    /// An image whose tables are known; it is never cut below `original_len` bytes.
    pub(crate) fn with_metadata(
        (file, storage): (Arc<dyn BlockDevice>, Option<Arc<dyn Storage>>),
        options: OpenOptions,
        header: Header,
        metadata: Metadata,
        original_len: u64,
    ) -> Result<Self> {
        if options.cipher.as_ref().is_some_and(|cipher| cipher.sector_size() != 512) {
            return Err(Error::unsupported("cipher's sectors have other than 512 bytes"));
        }
        Ok(Self {
            original_len,
            file,
            storage,
            backing: options.backing,
            data: options.data_file,
            cipher: options.cipher,
            sectors: Mutex::new(()),
            geometry: header.geometry(),
            header,
            metadata: Mutex::new(metadata),
            idle: Condvar::new(),
            in_use: RwLock::new(()),
            writing_back: Mutex::new(()),
            ready: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            inflated: Mutex::default(),
            tracking: Mutex::default(),
        })
    }

    /// Makes everything durable, as dropping it does, and reports what goes wrong: the
    /// bitmaps that writes have marked, the reference counts that a lazy image has put off,
    /// and all that makes an image of one that was written in bulk, which dropping does
    /// not. It can be used on afterwards.
    ///
    /// # Errors
    ///
    /// I/O errors. Bitmaps are inconsistent then.
    pub fn finish(&self) -> Result<()> {
        self.stop_tracking()?;
        self.flush_all()?;
        self.make_whole()
    }

    /// What the header said when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    pub(crate) fn compression(&self) -> Compression {
        self.header.compression
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Metadata> {
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn writable(&self, at: u64) -> Result<&Arc<dyn Storage>> {
        self.storage.as_ref().ok_or_else(|| Error::usage("device is read-only").at(at))
    }

    /// Bytes that the backing image has from `offset` on.
    pub(crate) fn backing_from(&self, offset: u64) -> Option<(&Arc<dyn BlockDevice>, u64)> {
        let backing = self.backing.as_ref()?;
        let left = backing.size().saturating_sub(offset);
        (left > 0).then_some((backing, left))
    }
}

impl BlockDevice for Qcow2 {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn is_read_only(&self) -> bool {
        self.storage.is_none()
    }

    fn preferred_block(&self) -> u32 {
        u32::try_from(self.geometry.cluster()).unwrap_or(u32::MAX)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Span::new(offset, to_u64(buf.len())).check_within(self.size())?;
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        self.read_payload(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let span = Span::new(offset, to_u64(buf.len()));
        self.start_writing(span)?;
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        self.write_payload(buf, offset)
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.start_writing(span)?;
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        self.zero(span, mode)
    }

    fn zeroes_quickly(&self, span: Span, mode: Zeroing) -> bool {
        mode == Zeroing::MayUnmap && self.is_mostly_whole(span)
    }

    /// Whole clusters read as zero afterwards; parts of clusters stay as they are.
    fn discard(&self, span: Span) -> Result<()> {
        self.start_writing(span)?;
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        self.discard_units(span)
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.extent_within(Span::new(offset, u64::MAX))
    }

    fn extent_within(&self, span: Span) -> Result<Extent> {
        let offset = span.start;
        Span::new(offset, 1).check_within(self.size())?;
        let left = self.size().saturating_sub(offset).min(span.len.max(1));
        let unit = self.geometry.unit();
        let within = offset & unit.wrapping_sub(1);
        let most = left.saturating_add(within).div_ceil(unit);
        let first = offset.wrapping_shr(self.geometry.unit_bits());
        let (mapping, count) = self.lock().lookup(&self.file, first, most)?;
        let len = count.saturating_mul(unit).saturating_sub(within).min(left);
        Ok(match mapping {
            Mapping::Unallocated => match self.backing_from(offset) {
                Some((backing, _)) => {
                    let below = backing.extent_within(Span::new(offset, len))?;
                    Extent { depth: below.depth.saturating_add(1), ..below }
                }
                None => Extent::new(ExtentKind::Hole, len),
            },
            Mapping::Zero { .. } => Extent::new(ExtentKind::Zero, len),
            // Nowhere in this file, or not as it is.
            Mapping::Data(_) if self.data.is_some() || self.cipher.is_some() => {
                Extent::new(ExtentKind::Data, len)
            }
            Mapping::Data(host) => {
                Extent::new(ExtentKind::Data, len).mapped_to(host.offset.saturating_add(within))
            }
            Mapping::Compressed { .. } => {
                Extent { compressed: true, ..Extent::new(ExtentKind::Data, len) }
            }
        })
    }

    fn flush(&self) -> Result<()> {
        self.flush_all()
    }

    /// Of clusters that nobody can free under the feet of whoever reads them later: a socket
    /// keeps the page, not its bytes, until the other side has read them. So an image that
    /// may be written gives away what lies below it and what its data file has, where
    /// every guest cluster has one place for ever.
    fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
        let left = self.size().checked_sub(offset).filter(|left| *left > 0)?;
        let unit = self.geometry.unit();
        let within = offset & unit.wrapping_sub(1);
        let most = LONGEST_RANGE.min(left).saturating_add(within).div_ceil(unit);
        let first = offset.wrapping_shr(self.geometry.unit_bits());
        let (mapping, count) = self.lock().lookup(&self.file, first, most).ok()?;
        let len = count.saturating_mul(unit).saturating_sub(within).min(left);
        let stays = self.storage.is_none() || self.geometry.external;
        let range = match mapping {
            Mapping::Unallocated => {
                let (backing, there) = self.backing_from(offset)?;
                let range = backing.file_range(offset)?;
                FileRange { len: range.len.min(there), ..range }
            }
            Mapping::Data(host) if self.cipher.is_none() && stays => {
                self.payload().file_range(host.offset.saturating_add(within))?
            }
            _ => return None,
        };
        Some(FileRange { len: range.len.min(len), ..range })
    }
}

/// How far ahead [`Qcow2::file_range`] looks.
const LONGEST_RANGE: u64 = 2 << 20;

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // Errors have nobody to go to here: who needs to know calls flush or finish first.
        // What was written in bulk and never finished stays no image.
        if self.lock().bulk.is_none() {
            let _ = self.finish();
        }
    }
}
