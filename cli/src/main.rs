// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Brings any guest home to KVM.

fn main() {}
