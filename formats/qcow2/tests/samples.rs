// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images made by others: good ones have their contents, bad ones are refused.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, Extents, MemoryDevice, Result, Span};
use tranship_format_testing::{digest, exercise, samples};
use tranship_qcow2::{OpenOptions, Qcow2};
use tranship_raw::{Access, RawFile};

fn open(path: &Path) -> Result<Qcow2> {
    Qcow2::open_read_only(Arc::new(RawFile::open(path, Access::ReadOnly)?), None)
}

/// Opens and reads all that is there, up to a limit for images that claim to be huge.
fn read_all(path: &Path) -> Result<()> {
    let image = open(path)?;
    let mut buf = vec![0; 1 << 20];
    for run in Extents::new(&image, Span::new(0, 256 << 20)) {
        let (span, kind) = run?;
        let mut offset = span.start;
        while offset < span.end() && !kind.reads_zero() {
            let left = usize::try_from(span.end() - offset).unwrap().min(buf.len());
            image.read_at(&mut buf[..left], offset)?;
            offset += u64::try_from(left).unwrap();
        }
    }
    Ok(())
}

/// Whatever is in an image that is written to, there is no panic.
fn write(bytes: Vec<u8>) -> Result<()> {
    let image = Qcow2::open(Arc::new(MemoryDevice::new(bytes)), OpenOptions::default())?;
    let size = image.size().min(1 << 20);
    image.write_at(&vec![7; usize::try_from(size).unwrap()], 0)?;
    image.discard(Span::new(0, size))?;
    image.finish()
}

#[test]
fn samples_are_what_they_are_said_to_be() {
    let all = samples();
    let folder = tempfile::tempdir().unwrap();
    for sample in all.iter().filter(|sample| sample.format.as_deref() == Some("qcow2")) {
        let path = sample.unpack(folder.path(), &all);
        let name = &sample.path;
        match sample.expect.as_str() {
            "content" => {
                let image = open(&path).unwrap();
                assert_eq!(Some(image.size()), sample.virtual_size, "{name}");
                assert_eq!(Some(digest(&image).unwrap()), sample.content_digest, "{name}");
            }
            "refuse" => assert!(read_all(&path).is_err(), "{name} was read"),
            "no-leak" => assert!(open(&path).is_err(), "{name} was opened alone"),
            "open" => exercise(&open(&path).unwrap()),
            _ => {
                if let Ok(image) = open(&path) {
                    exercise(&image);
                }
            }
        }
        if std::fs::metadata(&path).unwrap().len() < 4 << 20 {
            let _ = write(std::fs::read(&path).unwrap());
        }
    }
}
