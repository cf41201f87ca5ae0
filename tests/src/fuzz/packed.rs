// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compressed files, and the door to all formats.

use super::disk::look;
use super::readers::read;
use super::{Case, Image};
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Gate, MemoryDevice, Request, Result};
use tranship_formats::{Format, Trust, open_device, probe};
use tranship_packed::{OpenOptions, Packed};

/// Bytes that a few of the fuzzer's may become.
const LARGEST: u64 = 2 << 20;

/// The input is the file: compressed bytes have no gaps.
pub(crate) fn packed(input: &[u8]) {
    let file: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::read_only(input.to_vec()));
    let case = Case { flags: 0xff, ..Case::default() };
    read(&case, None, |salvage| {
        let options = OpenOptions { max_size: LARGEST, salvage };
        Ok(Box::new(Packed::open(file.clone(), options)?))
    });
}

/// Gives the second file, whatever its name.
#[derive(Debug)]
struct Neighbour(Arc<Image>);

impl Gate for Neighbour {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        if request.writable {
            return Err(Error::new(ErrorKind::Denied, "nothing here may be written"));
        }
        Ok(self.0.clone())
    }
}

/// Whatever it is: guessed, and opened with all that it asks for.
pub(crate) fn formats(input: &[u8]) {
    let case = Case::decode(input);
    let [first, second] = [0, 1].map(|number| Arc::new(case.files[number].image().view(true)));
    let format = probe(&first, Path::new("disk")).expect("a guess needs no sound image");
    let options = tranship_formats::OpenOptions {
        read_only: true,
        guess_backing: case.has(0),
        salvage: case.has(1),
        without_backing: case.has(2),
        trust: Trust::default(),
        ..tranship_formats::OpenOptions::default()
    };
    // What inflates and what costs keys has targets of its own, with limits.
    let others = [Format::Raw, Format::Gzip, Format::Xz, Format::Zstd, Format::Bzip2, Format::Luks];
    if others.contains(&format) {
        return;
    }
    if let Ok(opened) = open_device(first, Path::new("disk"), &options, &Neighbour(second)) {
        look(&*opened.device, None);
    }
}
