// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests across crates: oracle runs, guest boots, the command line contract.
