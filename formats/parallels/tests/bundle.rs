// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bundles: several parts, snapshots, hostile descriptors.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tranship_block::{BlockDevice, DenyAll, Error, ErrorKind, Gate, MemoryDevice, Request, Result};
use tranship_format_testing::{damaged, digest, exercise, pattern, samples, verify};
use tranship_parallels::{Bundle, BundleOptions, Descriptor};

/// Files in memory, and the names that were asked for.
#[derive(Debug, Default)]
struct Files {
    files: HashMap<String, Vec<u8>>,
    asked: Mutex<Vec<String>>,
}

impl Gate for Files {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        self.asked.lock().unwrap().push(request.name.to_owned());
        assert!(!request.writable);
        let bytes = self.files.get(request.name).cloned();
        let bytes = bytes.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file"))?;
        Ok(Arc::new(MemoryDevice::read_only(bytes)))
    }
}

/// A growing image of `sectors` in clusters of one sector, with some bytes at `at`.
fn growing(sectors: u32, at: u32, seed: u64) -> Vec<u8> {
    let mut file = vec![0; 4096];
    file[..16].copy_from_slice(b"WithouFreSpacExt");
    file[16] = 2;
    file[28] = 1;
    file[32..36].copy_from_slice(&sectors.to_le_bytes());
    file[36..40].copy_from_slice(&sectors.to_le_bytes());
    let entry = 64 + at as usize * 4;
    file[entry..entry + 4].copy_from_slice(&8_u32.to_le_bytes());
    file.extend(pattern(512, seed));
    file
}

const OLD: &str = "{00000000-0000-0000-0000-00000000000A}";
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";

fn xml() -> String {
    let image = |guid: &str, kind: &str, file: &str| {
        format!("<Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{file}</File></Image>")
    };
    format!(
        "<?xml version='1.0' encoding='UTF-8'?>
<Parallels_disk_image Version=\"1.0\"><Disk_Parameters><Disk_size>30</Disk_size>
<Encryption><Engine>{{00000000-0000-0000-0000-000000000000}}</Engine></Encryption>
<Name>two</Name></Disk_Parameters><StorageData>
<Storage><Start>20</Start><End>30</End><Blocksize>1</Blocksize>{}{}</Storage>
<Storage><Start>0</Start><End>20</End><Blocksize>1</Blocksize>{}{}</Storage>
</StorageData><Snapshots><TopGUID>{TOP}</TopGUID>
<Shot><GUID>{TOP}</GUID><ParentGUID>{OLD}</ParentGUID></Shot>
<Shot><GUID>{OLD}</GUID><ParentGUID>{{00000000-0000-0000-0000-000000000000}}</ParentGUID></Shot>
</Snapshots></Parallels_disk_image>",
        image(OLD, "Plain", "b.0"),
        image(TOP, "Compressed", "b.1"),
        image(OLD, "Compressed", "a.0"),
        image(TOP, "Compressed", "a.1"),
    )
}

fn files() -> Files {
    let files = [
        ("a.0", growing(20, 3, 1)),
        ("a.1", growing(20, 4, 2)),
        ("b.0", pattern(10 * 512, 3)),
        ("b.1", growing(10, 9, 4)),
    ];
    let files = files.map(|(name, bytes)| (name.to_owned(), bytes)).into();
    Files { files, asked: Mutex::default() }
}

#[test]
fn parts_and_snapshots_are_put_together() {
    let files = files();
    let bundle = Bundle::open(&xml(), &files, &BundleOptions::default()).unwrap();
    assert_eq!((bundle.descriptor().name.as_str(), bundle.state()), ("two", TOP));
    let mut old = vec![0; 30 * 512];
    old[3 * 512..4 * 512].copy_from_slice(&pattern(512, 1));
    old[20 * 512..].copy_from_slice(&pattern(10 * 512, 3));
    let mut top = old.clone();
    top[4 * 512..5 * 512].copy_from_slice(&pattern(512, 2));
    top[29 * 512..].copy_from_slice(&pattern(512, 4));
    verify(&bundle, &top);
    let options = BundleOptions { state: Some(OLD.to_owned()), salvage: false };
    files.asked.lock().unwrap().clear();
    verify(&Bundle::open(&xml(), &files, &options).unwrap(), &old);
    assert_eq!(*files.asked.lock().unwrap(), ["a.0", "b.0"]);
}

#[test]
fn wrong_descriptors_are_refused_by_name() {
    let cases = [
        ("<Start>20<", "<Start>21<", "part of the disk starts at byte 10752, expected 10240"),
        ("<End>30<", "<End>3<", "part of the disk ends at sector 3, before its start 20"),
        ("<Disk_size>30<", "<Disk_size>40<", "parts of the disk have 15360 bytes"),
        ("<Disk_size>30<", "<Disk_size>99999999999999999<", "Disk_size is"),
        ("<Engine>{0", "<Engine>{1", "disk is encrypted by engine {1"),
        ("<Type>Plain<", "<Type>Odd<", "type of an image is \"Odd\""),
        (
            "<ParentGUID>{00000000-0000-0000-0000-000000000000}",
            "<ParentGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}",
            "chain of snapshots loops",
        ),
        (
            "<ParentGUID>{00000000-0000-0000-0000-000000000000}",
            "<ParentGUID>{1}",
            "snapshot {1} is missing",
        ),
        ("<File>a.1<", "<File>missing<", "missing: no such file"),
        ("<File>b.0<", "<File>a.1<", "a.1: image has 4608 bytes"),
        ("<?xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><?xml", "DiskDescriptor.xml is not valid XML"),
        ("Parallels_disk_image", "Other", "root of DiskDescriptor.xml is \"Other\""),
        ("<TopGUID>{5", "<TopGUID>{6", "disk has no state {6"),
    ];
    for (from, to, expected) in cases {
        let text = xml().replace(from, to);
        assert_ne!(text, xml(), "{from}");
        let options = BundleOptions {
            state: expected.starts_with("a.1").then(|| OLD.to_owned()),
            salvage: false,
        };
        let error = Bundle::open(&text, &files(), &options).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}, expected {expected}");
    }
    let error = Bundle::open(&xml(), &DenyAll, &BundleOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
}

#[test]
fn the_sample_bundle_has_its_content() {
    let all = samples();
    let Some(sample) = all.iter().find(|sample| sample.path.ends_with("DiskDescriptor.xml")) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(sample.unpack(folder.path(), &all)).unwrap();
    let hds = all.iter().find(|sample| sample.format.as_deref() == Some("parallels")).unwrap();
    let descriptor = Descriptor::parse(&text).unwrap();
    let name = descriptor.storages[0].images[0].file.clone();
    let bytes = std::fs::read(hds.unpack(folder.path(), &all)).unwrap();
    let files = Files { files: [(name, bytes)].into(), asked: Mutex::default() };
    let bundle = Bundle::open(&text, &files, &BundleOptions::default()).unwrap();
    assert_eq!(bundle.size(), 32 << 20);
    assert_eq!(Some(digest(&bundle).unwrap()), hds.content_digest);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damaged_descriptors_do_no_harm(bytes in damaged(xml().into_bytes(), Vec::new())) {
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(bundle) = Bundle::open(&text, &files(), &BundleOptions::default()) {
            exercise(&bundle);
        }
    }
}
