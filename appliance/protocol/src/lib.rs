// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages between the host and the agent in the appliance.
#![forbid(unsafe_code)]

mod path;

pub use path::GuestPath;
