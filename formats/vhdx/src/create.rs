// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making a new, empty image.

use crate::Guid;
use crate::bat::{Bat, Entry, Geometry, State};
use crate::bytes::{MIB, mib_up};
use crate::header::{CREATOR_LEN, Header, Headers, Log, MAGIC, to_utf16};
use crate::locator::ParentLocator;
use crate::metadata::{self, BLOCKS, Metadata, check_size, new_region};
use crate::region::{self, new_table};
use tranship_block::{Error, Result, Span, Storage, Zeroing};

/// What new images say about who made them.
const CREATOR: &str = concat!("tranship ", env!("CARGO_PKG_VERSION"));
/// Where the first structure behind the header lies.
const LOG_OFFSET: u64 = MIB;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes, a multiple of the logical sector, at most 64 TiB.
    pub size: u64,
    /// Bytes of a block: a power of two from 1 to 256 MiB; chosen by the size if absent.
    pub block_size: Option<u32>,
    /// Bytes of the log, a multiple of 1 MiB.
    pub log_size: u32,
    /// All blocks have their place from the start. Their space is not reserved on the
    /// host: who wants that allocates the file's blocks afterwards.
    pub fixed: bool,
    /// Blocks of a dynamic disk start in the state "zero" rather than "not present", as
    /// QEMU makes them.
    pub block_state_zero: bool,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector_size: u32,
    /// Bytes of a physical sector: 512 or 4096.
    pub physical_sector_size: u32,
    /// Makes a differencing disk with this parent.
    pub parent: Option<ParentLocator>,
}

impl CreateOptions {
    /// A dynamic disk of `size` bytes that stands alone.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            block_size: None,
            log_size: 1 << 20,
            fixed: false,
            block_state_zero: true,
            logical_sector_size: 512,
            physical_sector_size: 4096,
            parent: None,
        }
    }

    /// The block size that was asked for, or the one that suits the size: as QEMU's, but
    /// 2 MiB for a differencing disk, as Hyper-V's.
    fn block_size(&self) -> u32 {
        self.block_size.unwrap_or(match self.size {
            _ if self.parent.is_some() => 2 << 20,
            0..=0x4000_0000 => 8 << 20,
            0x4000_0001..=0x19_0000_0000 => 16 << 20,
            0x19_0000_0001..=0x2000_0000_0000 => 32 << 20,
            _ => 64 << 20,
        })
    }

    fn check(&self) -> Result<()> {
        let block_size = self.block_size();
        if !BLOCKS.contains(&block_size) || !block_size.is_power_of_two() {
            return Err(Error::usage(format!(
                "block size is {block_size} bytes, expected a power of two from 1 to 256 MiB"
            )));
        }
        for size in [self.logical_sector_size, self.physical_sector_size] {
            if !matches!(size, 512 | 4096) {
                return Err(Error::usage(format!(
                    "sector size is {size} bytes, expected 512 or 4096"
                )));
            }
        }
        if self.log_size == 0 || u64::from(self.log_size).checked_rem(MIB) != Some(0) {
            return Err(Error::usage(format!(
                "log size is {} bytes, expected a multiple of 1 MiB",
                self.log_size
            )));
        }
        if self.fixed && self.parent.is_some() {
            return Err(Error::usage("a fixed disk cannot have a parent"));
        }
        check_size(self.size, self.logical_sector_size).map_err(Error::usage)?;
        self.parent.as_ref().map_or(Ok(()), ParentLocator::check)
    }
}

/// Makes an empty image in `storage`, whose contents are lost.
///
/// What makes the file an image comes last: what is left of a creation that was
/// interrupted is none.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Usage`] for options that no image can have, and what
/// `storage` reports.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    options.check()?;
    let block_size = options.block_size();
    let geometry = Geometry::new(block_size, options.logical_sector_size, options.parent.is_some());
    let metadata = Metadata {
        block_size,
        leave_allocated: options.fixed,
        size: options.size,
        size_at: 0,
        disk_id: Guid::random()?,
        logical_sector: options.logical_sector_size,
        physical_sector: options.physical_sector_size,
        parent: options.parent.clone(),
    };
    let items = new_region(&metadata);
    let log = Log { offset: LOG_OFFSET, length: options.log_size };
    let items_len = mib_up(crate::bytes::to_u64(items.len()));
    let metadata_region = Span::new(log.span().end(), items_len);
    let bat_len = mib_up(geometry.entries(options.size).saturating_mul(8)).max(MIB);
    let bat_region = Span::new(metadata_region.end(), bat_len);
    let payload = if options.fixed { geometry.offset(geometry.blocks(options.size)) } else { 0 };
    let end = bat_region.end().saturating_add(payload);

    storage.set_len(0)?;
    storage.set_len(end)?;
    // A block device keeps what it had. Nothing that looks like an image may be left.
    storage.write_zeroes(Span::new(0, end), Zeroing::MayUnmap)?;
    let bat = new_bat(bat_region, geometry, options)?;
    for sector in bat.all() {
        storage.write_at(sector.bytes.as_slice(), sector.at)?;
    }
    storage.write_at(&items, metadata_region.start)?;
    let table = new_table(bat_region, metadata_region);
    for copy in region::COPIES {
        storage.write_at(&table, copy)?;
    }
    let mut creator = to_utf16(CREATOR);
    creator.resize(CREATOR_LEN, 0);
    storage.write_at(&creator, crate::bytes::to_u64(MAGIC.len()))?;
    Headers::new(Header {
        sequence: 0,
        file_write: Guid::random()?,
        data_write: Guid::random()?,
        log_guid: Guid::NIL,
        log,
    })
    .update(storage, |_| {})?;
    storage.write_at(MAGIC, 0)?;
    storage.flush()
}

/// The BAT of an empty image.
fn new_bat(region: Span, geometry: Geometry, options: &CreateOptions) -> Result<Bat> {
    let mut bat = Bat::empty(region, geometry.entries(options.size))?;
    let is_zero = options.block_state_zero && options.parent.is_none();
    if options.fixed || is_zero {
        for block in 0..geometry.blocks(options.size) {
            let entry = if options.fixed {
                let place = region.end().saturating_add(geometry.offset(block));
                Entry::new(State::Full, place)
            } else {
                Entry::new(State::Zero, 0)
            };
            bat.set(geometry.payload_entry(block), entry);
        }
    }
    Ok(bat)
}

/// The largest virtual size, in bytes.
pub const LARGEST_DISK: u64 = metadata::LARGEST_DISK;
