// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where guests come from: OVA and OVF, VMX, plain disks.
