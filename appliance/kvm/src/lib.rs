// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tells whether this host's KVM can run a stock kernel.
