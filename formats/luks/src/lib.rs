// SPDX-License-Identifier: Apache-2.0 OR MIT
//! LUKS1 and LUKS2 containers: read-only.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]
