// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sample disks, if `TRANSHIP_SAMPLES` names the folder that has them: images of
//! other writers read as recorded, hostile ones are refused or do no harm.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use tranship_block::{BlockDevice, Error, Extents, Result, Span};
use tranship_format_testing::{digest, exercise, samples};
use tranship_formats::{Format, OpenOptions, Secrets, Trust, open};

/// Bytes of data that a sample is digested with at most: hostile ones claim a lot.
const MOST: u64 = 128 << 20;

fn found(path: &Path, options: &OpenOptions) -> Result<String> {
    let device = open(path, options)?.device;
    let mut data = 0_u64;
    for run in Extents::new(&device, Span::new(0, u64::MAX)) {
        let (span, kind) = run?;
        data = data.saturating_add(if kind.reads_zero() { 0 } else { span.len });
        if data > MOST {
            exercise(&device);
            return Err(Error::unsupported("too much data"));
        }
    }
    digest(&device)
}

/// Writing to what can be opened at all harms nothing either: errors, no panics.
fn scribble(path: &Path, options: &OpenOptions) {
    let Ok(opened) = open(path, options) else { return };
    let size = opened.device.size();
    for at in [0, size / 2, size.saturating_sub(1)] {
        let _ = opened.device.write_at(&[1], at);
    }
    let _ = opened.device.flush();
}

#[test]
fn samples_do_as_recorded() {
    let all = samples();
    let folder = tempfile::tempdir().unwrap();
    let mut secrets = Secrets::default();
    secrets.insert("s", b"luksde-1-password".to_vec());
    let mut failures = Vec::new();
    for sample in all.iter().filter(|sample| sample.expect != "info") {
        let path = sample.unpack(folder.path(), &all);
        let before = std::fs::read(&path).unwrap();
        let named = sample.format.as_deref().unwrap_or("raw");
        let format = match named.parse::<Format>() {
            // A raw disk is taken as raw whatever is in it; all else has to be recognised.
            Ok(Format::Raw) => Some(Format::Raw),
            // No magic number is left in these.
            Ok(format) if sample.expect != "content" => Some(format),
            _ => None,
        };
        let options = OpenOptions {
            read_only: true,
            format,
            trust: Trust::Folder,
            secrets: secrets.clone(),
            ..OpenOptions::default()
        };
        let found = found(&path, &options);
        let is_good = match sample.expect.as_str() {
            "content" => found.as_ref().ok() == sample.content_digest.as_ref(),
            "open" => found.is_ok(),
            "refuse" => found.is_err(),
            "no-leak" => found.is_err() || format == Some(Format::Raw),
            _ => true,
        };
        if !is_good {
            failures.push(format!("{} ({}): {found:?}", sample.path, sample.expect));
        }
        assert!(std::fs::read(&path).unwrap() == before, "{} was changed", path.display());
        if sample.path.starts_with("hostile/") {
            scribble(&path, &OpenOptions { read_only: false, ..options });
            std::fs::write(&path, before).unwrap();
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), all.len(), failures.join("\n"));
}
