// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptions written by many products, outside of the source tree: the folder is named
//! by `TRANSHIP_SAMPLES`. Most lack their disks.
#![allow(clippy::unwrap_used, reason = "the samples are part of the test")]

use std::path::Path;
use tranship_block::{BlockDevice, Extents, Span};
use tranship_source::open_ova;

#[test]
fn descriptions_are_read_or_refused_cleanly() {
    let Some(samples) = std::env::var_os("TRANSHIP_SAMPLES") else {
        return eprintln!("skipped: TRANSHIP_SAMPLES is not set");
    };
    let mut seen = 0;
    for folder in ["govmomi-ovf", "cot"] {
        for entry in Path::new(&samples).join(folder).read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "ovf") {
                continue;
            }
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            match open_ova(&path) {
                Ok(source) => {
                    eprintln!("{name}: {}, {} disks", source.name, source.disks.len());
                    assert!(source.memory_bytes > 0 && source.vcpus > 0);
                    for disk in &source.disks {
                        assert!(disk.open().unwrap().size() > 0);
                    }
                }
                Err(error) => eprintln!("{name}: {error}"),
            }
            seen += 1;
        }
    }
    assert!(seen > 40, "only {seen} descriptions");
    let virtualbox = open_ova(&Path::new(&samples).join("cot/ubuntu.2.0.ovf")).unwrap();
    assert_eq!(virtualbox.disks.len(), 1, "a StorageItem is a disk");
    assert_eq!(virtualbox.nics.len(), 1, "an EthernetPortItem is a network card");
    assert_eq!(virtualbox.disks[0].open().unwrap().size(), 8 << 30);
}

#[test]
fn a_disk_in_an_archive_is_the_disk_in_the_folder() {
    let Some(samples) = std::env::var_os("TRANSHIP_SAMPLES") else {
        return eprintln!("skipped: TRANSHIP_SAMPLES is not set");
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.ova");
    let mut archive = tar::Builder::new(std::fs::File::create(&path).unwrap());
    archive.sparse(false);
    // The disk that belongs to this description is empty; another one has data.
    let members =
        [("cot/input.ovf", "input.ovf"), ("vmdk-rs/streamOptimizedWithMarkers.vmdk", "input.vmdk")];
    for (sample, name) in members {
        let sample = Path::new(&samples).join(sample);
        archive.append_path_with_name(&sample, name).unwrap();
        std::fs::copy(&sample, folder.path().join(name)).unwrap();
    }
    archive.finish().unwrap();
    let disks = [&path, &folder.path().join("input.ovf")]
        .map(|path| open_ova(path).unwrap().disks[0].open());
    let [archived, loose] = disks.map(Result::unwrap);
    assert_eq!(archived.size(), 1 << 20);
    let mut data = 0;
    for extent in Extents::new(&archived, Span::new(0, u64::MAX)) {
        let (span, kind) = extent.unwrap();
        if !kind.reads_zero() {
            let mut parts = [0, 1].map(|_| vec![0; usize::try_from(span.len).unwrap()]);
            archived.read_at(&mut parts[0], span.start).unwrap();
            loose.read_at(&mut parts[1], span.start).unwrap();
            assert!(parts[0] == parts[1], "{span:?}");
            data += span.len;
        }
    }
    assert!(data > 0);
}
