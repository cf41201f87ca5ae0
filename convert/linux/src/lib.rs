// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a Linux guest has to change to run on KVM.
