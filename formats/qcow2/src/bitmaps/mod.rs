// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Persistent bitmaps: which parts of the disk have changed since somebody asked.

pub(crate) mod directory;
