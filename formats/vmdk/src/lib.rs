// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMDK disks: sparse, stream-optimized, flat and split.
