// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The size of a QCOW2 image that is yet to be made.

use super::Measured;
use crate::failure::Failure;
use crate::image::create::{qcow2_preallocation, qcow2_shape};
use crate::image::options::Options;
use crate::image::source::Source;
use tranship_block::BlockDevice;
use tranship_formats::{Format, Layer};
use tranship_qcow2::{Header, MeasureOptions, Preallocation};

/// What an image of `device`, which is in `source`, or of an empty disk of `size` bytes, takes.
pub(super) fn measure(
    source: Option<&Source>,
    device: Option<&dyn BlockDevice>,
    size: u64,
    options: &Options,
) -> Result<Measured, Failure> {
    let shape = qcow2_shape(options)?;
    let reserves =
        matches!(qcow2_preallocation(options)?, Preallocation::Falloc | Preallocation::Full);
    let measure = MeasureOptions {
        cluster_bits: shape.cluster_bits,
        refcount_bits: 1 << shape.refcount_order,
        extended_l2: shape.extended_l2,
        // What is above a backing file may become as large as the disk.
        is_preallocated: reserves || options.text("backing_file").is_some(),
    };
    let size = device.map_or(size, BlockDevice::size).next_multiple_of(512);
    let measured = tranship_qcow2::measure(size, device, &measure).map_err(|error| {
        Failure::usage("The image size is too large (try using a larger cluster size)")
            .because(&error)
    })?;
    let layer = source.and_then(|source| source.opened.layers.first());
    let bitmaps = layer.map_or(Ok(None), |layer| bitmaps(layer, size, shape.cluster_bits))?;
    Ok(Measured { required: measured.required, fully_allocated: measured.fully_allocated, bitmaps })
}

/// Bytes for the bitmaps of an image that can have some.
fn bitmaps(layer: &Layer, size: u64, cluster_bits: u32) -> Result<Option<u64>, Failure> {
    if layer.format != Format::Qcow2 || Header::read(&layer.file)?.version < 3 {
        return Ok(None);
    }
    let bitmaps = tranship_qcow2::bitmaps(&layer.file)?;
    Ok(Some(tranship_qcow2::measure_bitmaps(size, cluster_bits, &bitmaps)))
}
