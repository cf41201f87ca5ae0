// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Snapshots as bytes: whole ones come back, all others are refused.
