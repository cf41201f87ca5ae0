// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How large the file of an image is going to be.

use tranship_block::{BlockDevice, Error, ExtentKind, Extents, Result, Span};

/// What the image is going to be.
#[derive(Clone, Copy, Debug)]
pub struct MeasureOptions {
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Width of reference counts in bits, a power of two up to 64.
    pub refcount_bits: u32,
    /// Entries have subclusters.
    pub extended_l2: bool,
    /// Space for all data is reserved (preallocation `falloc` or `full`).
    pub is_preallocated: bool,
}

impl Default for MeasureOptions {
    fn default() -> Self {
        Self { cluster_bits: 16, refcount_bits: 16, extended_l2: false, is_preallocated: false }
    }
}

/// Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Measured {
    /// What the file needs at least; rather too much than too little.
    pub required: u64,
    /// What it needs when every byte of the disk has been written.
    pub fully_allocated: u64,
}

/// Measures an image of `size` bytes; with the data of `source`, if there is one.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Usage`] for options that no image can have or a size past
/// its limits; what walking the extents of `source` reports.
pub fn measure(
    size: u64,
    source: Option<&dyn BlockDevice>,
    options: &MeasureOptions,
) -> Result<Measured> {
    let least = if options.extended_l2 { 14 } else { 9 };
    if !(least..=21).contains(&options.cluster_bits)
        || !options.refcount_bits.is_power_of_two()
        || options.refcount_bits > 64
    {
        return Err(Error::usage(format!(
            "cluster_bits is {} and refcount_bits is {}, expected {least} to 21 and a power of \
             two up to 64",
            options.cluster_bits, options.refcount_bits
        )));
    }
    let clusters = Clusters { bits: options.cluster_bits };
    let entries = if options.extended_l2 { clusters.bytes() / 16 } else { clusters.bytes() / 8 };
    let data = clusters.of(size);
    let l2 = data.div_ceil(entries);
    if l2.saturating_mul(8) > crate::header::LARGEST_L1 {
        return Err(Error::usage(format!(
            "a size of {size} bytes is too large for clusters of {} bytes",
            clusters.bytes()
        )));
    }
    let l1 = clusters.of(l2.saturating_mul(8));
    let counted = data.saturating_add(l2).saturating_add(l1).saturating_add(1);
    let bits = u64::from(options.refcount_bits);
    let per_block = clusters.bytes().saturating_mul(8).checked_div(bits).unwrap_or(1);
    let all = counted.saturating_add(refcount_clusters(clusters, per_block, counted));
    let stored = match source {
        _ if options.is_preallocated => data,
        None => 0,
        Some(source) => stored_clusters(clusters, source)?,
    };
    Ok(Measured {
        required: clusters.offset(all.saturating_sub(data).saturating_add(stored)),
        fully_allocated: clusters.offset(all),
    })
}

/// Clusters of an image that does not exist yet.
#[derive(Clone, Copy, Debug)]
struct Clusters {
    bits: u32,
}

impl Clusters {
    fn bytes(self) -> u64 {
        1_u64.wrapping_shl(self.bits)
    }

    /// Clusters needed for `bytes`.
    fn of(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }

    /// Bytes that `count` clusters have.
    fn offset(self, count: u64) -> u64 {
        count.saturating_mul(self.bytes())
    }
}

/// Clusters for the counts of `counted` clusters, and for their own.
fn refcount_clusters(clusters: Clusters, per_block: u64, counted: u64) -> u64 {
    let mut own = 0_u64;
    loop {
        let blocks = counted.saturating_add(own).div_ceil(per_block);
        let table = clusters.of(blocks.saturating_mul(8));
        let needed = blocks.saturating_add(table);
        if needed == own {
            return own;
        }
        own = needed;
    }
}

/// Clusters of the target that any data of `source` lies in.
fn stored_clusters(clusters: Clusters, source: &dyn BlockDevice) -> Result<u64> {
    let (mut sum, mut next) = (0_u64, 0_u64);
    for run in Extents::new(source, Span::new(0, source.size())) {
        let (span, kind) = run?;
        if kind == ExtentKind::Data {
            let first = span.start.wrapping_shr(clusters.bits).max(next);
            next = clusters.of(span.end());
            sum = sum.saturating_add(next.saturating_sub(first));
        }
    }
    Ok(sum)
}

/// Bytes that a copy of the bitmaps of a disk of `size` bytes takes: for each its
/// granularity and the length of its name.
pub fn measure_bitmaps(size: u64, cluster_bits: u32, bitmaps: &[crate::Bitmap]) -> u64 {
    let unit = Clusters { bits: cluster_bits.clamp(9, 21) };
    let (mut clusters, mut directory) = (0_u64, 0_u64);
    for bitmap in bitmaps {
        let bits = size.div_ceil(bitmap.granularity.max(1));
        let chunks = unit.of(bits.div_ceil(8));
        let table = unit.of(chunks.saturating_mul(8));
        clusters = clusters.saturating_add(chunks).saturating_add(table);
        let name = crate::geometry::to_u64(bitmap.name.len());
        directory = directory.saturating_add(name.saturating_add(24).next_multiple_of(8));
    }
    unit.offset(clusters.saturating_add(unit.of(directory)))
}
