// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The only way in which an image can reach another file.

use crate::{BlockDevice, Error, ErrorKind, Result};
use std::fmt::Debug;
use std::sync::Arc;

/// A name found inside an image, and what the image wants it for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The name exactly as the image has it; hostile until proven otherwise.
    pub name: &'a str,
    /// What it is for, in words that fit an error message: `"VMDK extent"`.
    pub role: &'a str,
    /// Whether the image needs to write to it.
    pub writable: bool,
}

/// Decides whether a name inside an image may be opened, and opens it.
///
/// Names inside images are requests, not orders: an implementation allows nothing that
/// its owner did not allow, follows no link out of the allowed place, and opens regular
/// files and permitted block devices only.
pub trait Gate: Debug + Send + Sync {
    /// Opens what `request` names, as plain bytes without looking for a format.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] if the name is not allowed, [`ErrorKind::NotFound`] if it
    /// is allowed but not there.
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>>;
}

/// The gate that opens nothing: for images that stand alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct DenyAll;

impl Gate for DenyAll {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        Err(Error::new(
            ErrorKind::Denied,
            format!(
                "the image asks for {} {:?}, and no other file is allowed for it",
                request.role, request.name
            ),
        ))
    }
}
