// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image amend`: what an image was created with.

use super::console::Console;
use crate::args::image::AmendArgs;
use crate::failure::Failure;

/// Changes the image.
pub(crate) fn run(_args: &AmendArgs, _console: Console) -> Result<u8, Failure> {
    Err(Failure::usage("this command is not there yet"))
}
