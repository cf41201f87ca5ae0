// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Raw disks: files and block devices, sparse-aware.
