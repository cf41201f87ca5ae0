// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image bitmap`: the persistent bitmaps of an image.

use super::console::Console;
use crate::args::image::BitmapArgs;
use crate::failure::Failure;

/// Changes a bitmap.
pub(crate) fn run(_args: &BitmapArgs, _console: Console) -> Result<u8, Failure> {
    Err(Failure::usage("this command is not there yet"))
}
