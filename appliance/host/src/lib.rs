// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Starts the appliance and offers the guest API.
