// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VHDX images: read, write, create, check, TRIM, compact.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]
