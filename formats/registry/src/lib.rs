// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one door to all disk formats: probe and open by name.
