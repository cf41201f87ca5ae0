// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where machine-readable events go.

use crate::failure::Failure;
use std::fs::File;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

/// One of the places that virt-v2v offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    /// A file, made anew.
    File(PathBuf),
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A descriptor that the caller left open.
    Descriptor(i32),
}

impl Channel {
    /// Opens it for writing.
    pub(super) fn open(&self) -> Result<Box<dyn Write + Send>, Failure> {
        let failed = |error: &std::io::Error| {
            Failure::usage(format!("--machine-readable: {} cannot be written to", self.name()))
                .because(error)
        };
        Ok(match self {
            Self::File(path) => Box::new(File::create(path).map_err(|error| failed(&error))?),
            Self::Stdout => Box::new(std::io::stdout()),
            Self::Stderr => Box::new(std::io::stderr()),
            Self::Descriptor(number) => {
                // SAFETY: the number is only used to duplicate the descriptor; if nothing is
                // open under it the system says so. It is never -1: the parser refuses
                // numbers below 1.
                let borrowed = unsafe { BorrowedFd::borrow_raw(*number) };
                let owned = borrowed.try_clone_to_owned().map_err(|error| failed(&error))?;
                Box::new(File::from(owned))
            }
        })
    }

    fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Stdout => "standard output".to_owned(),
            Self::Stderr => "standard error".to_owned(),
            Self::Descriptor(number) => format!("descriptor {number}"),
        }
    }
}
