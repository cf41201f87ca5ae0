// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads that are under way at the same time without a thread for each.

use crate::{Result, Span};
use std::fmt::Debug;

/// A way to a device on which many reads are in flight, and whose answers come in any order.
///
/// Any number of threads may use it: each takes whatever answer comes next, in memory of
/// its own that is still in its processor's cache.
pub trait ReadQueue: Debug + Send + Sync {
    /// Begins to read `spans`, no two of which in flight may start at the same byte.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Usage`] for a range past the end; [`crate::ErrorKind::Busy`] if
    /// the device is gone. None of `spans` is read then.
    fn start(&self, spans: &[Span]) -> Result<()>;

    /// Waits for one of the reads: its bytes are the first ones of `buf`, which grows as it
    /// needs to and may have become another one. `None` if no read is left that no other
    /// thread waits for or has.
    fn next(&self, buf: &mut Vec<u8>) -> Option<(Span, Result<()>)>;
}
