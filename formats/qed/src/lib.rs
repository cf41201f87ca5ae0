// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QED images: read-only.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]
