// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What lies past the end of the disk in its last cluster, which nobody has ever seen: it
//! has to be zero before the disk grows over it.

use super::ResizeOptions;
use crate::check::compare::Counts;
use crate::check::refcount_table;
use crate::geometry::ZERO;
use crate::header::Header;
use crate::image::{OpenOptions, Qcow2};
use crate::shape::{Reference, Shape, read_sparse};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, MemoryDevice, Result, Span, Storage, Zeroing};

/// What has to be done about it.
enum Tail {
    /// It reads as zero.
    Blank,
    /// These bytes of the file are the disk's alone.
    Zero(Span),
    /// The cluster is shared, compressed or in the backing image: it has to be copied.
    Copy,
}

/// Makes the last cluster zero past the end of the disk at `size`.
pub(super) fn blank_tail(
    storage: &Arc<dyn Storage>,
    size: u64,
    options: &ResizeOptions,
) -> Result<()> {
    let below = options.backing.as_ref().map_or(0, BlockDevice::size);
    let mut tail = find(&**storage, size, below)?;
    if matches!(tail, Tail::Copy) {
        copy_last(storage, size, options)?;
        tail = find(&**storage, size, below)?;
    }
    match tail {
        Tail::Blank => Ok(()),
        Tail::Zero(span) => {
            storage.write_zeroes(span, Zeroing::MayUnmap)?;
            storage.flush()
        }
        Tail::Copy => {
            Err(Error::corrupt("the disk's last cluster is still shared after it was copied"))
        }
    }
}

fn find(storage: &dyn Storage, size: u64, below: u64) -> Result<Tail> {
    let header = Header::read(storage)?;
    let (geometry, shape) = (header.geometry(), Shape::new(&header));
    let within = geometry.within(size);
    if within == 0 || shape.has_data_file {
        return Ok(Tail::Blank);
    }
    let absent = || if below > size { Tail::Copy } else { Tail::Blank };
    let cluster = geometry.index(size);
    let l1_index = cluster.checked_div(shape.entries()).unwrap_or(0);
    let l1_at = header.l1_table_offset.saturating_add(l1_index.saturating_mul(8));
    let entry = read_sparse(storage, l1_at, 1)?.first().copied().unwrap_or(0);
    let Some(table) = geometry.l2_offset(entry, size)? else { return Ok(absent()) };
    let number = cluster.checked_rem(shape.entries()).unwrap_or(0);
    let step = if shape.is_extended { 16 } else { 8 };
    let at = table.offset.saturating_add(number.saturating_mul(step));
    let words = read_sparse(storage, at, step / 8)?;
    let (offset, copied) = match shape.reference(&words, geometry.offset(cluster))? {
        Reference::Compressed { .. } => return Ok(Tail::Copy),
        Reference::None => (0, false),
        Reference::Cluster { offset, copied } => (offset, copied),
    };
    // Whether something stands before the backing image where the disk ends.
    let is_here = if let Some(bitmap) = words.get(1) {
        let unit = within.checked_div(geometry.cluster() / 32).unwrap_or(0);
        let is_whole = within.is_multiple_of(geometry.cluster() / 32);
        let bits = bitmap | bitmap >> 32;
        is_whole || bits.wrapping_shr(u32::try_from(unit).unwrap_or(0)) & 1 != 0
    } else {
        offset != 0 || words.first().is_some_and(|word| word & ZERO != 0)
    };
    if !is_here && below > size {
        return Ok(Tail::Copy);
    }
    if offset == 0 {
        return Ok(Tail::Blank);
    }
    if header.crypt_method != 0 {
        return Err(Error::unsupported(
            "growing an encrypted disk that ends within a cluster: what follows is not zero",
        ));
    }
    let counts = refcount_table(storage, &header)?;
    let count = Counts::new(storage, &counts, geometry).get(geometry.index(offset))?;
    if !copied || count != 1 {
        return Ok(Tail::Copy);
    }
    let start = offset.saturating_add(within);
    let end = offset.saturating_add(geometry.cluster()).min(storage.size());
    Ok(Tail::Zero(Span::new(start, end.saturating_sub(start))))
}

/// Writes the last byte of the disk back, so that it gets a place of its own. What a copy
/// has past the end of the disk is zero.
fn copy_last(storage: &Arc<dyn Storage>, size: u64, options: &ResizeOptions) -> Result<()> {
    let backing: Arc<dyn BlockDevice> = match &options.backing {
        Some(backing) => Arc::clone(backing),
        None => Arc::new(MemoryDevice::new(Vec::new())),
    };
    let open = OpenOptions { backing: Some(backing), ..OpenOptions::default() };
    let image = Qcow2::open(Arc::clone(storage), open)?;
    let last = size.saturating_sub(1);
    let mut byte = [0];
    image.read_at(&mut byte, last)?;
    image.write_at(&byte, last)?;
    image.finish()
}
