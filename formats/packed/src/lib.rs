// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Raw disks inside gzip, xz and zstd files: read-only.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]
