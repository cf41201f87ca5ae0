// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests across crates: oracle runs, guest boots, the command line contract.
//!
//! The library has what the fuzz targets in `tests/fuzz` and the test that replays their
//! findings share.

pub mod fuzz;
