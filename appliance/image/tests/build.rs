// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whole builds from a made-up kernel and this host's tools: the cache, export and import.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

use object::write::Object;
use tranship_appliance_image::{
    AgentSource, Appliance, BuildOptions, ErrorKind, Event, KernelSource, Result, build, export,
    import,
};

const RELEASE: &str = "9.9.9-test";
const TRANSPORT: [&str; 6] =
    ["virtio", "virtio_ring", "virtio_pci", "virtio_blk", "virtio_console", "squashfs"];

struct Place {
    dir: tempfile::TempDir,
    options: BuildOptions,
}

impl Place {
    /// A kernel with its modules, an agent and an empty cache.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        fs::write(&kernel, format!("\x7fELF... Linux version {RELEASE} (x)")).unwrap();
        let modules = dir.path().join(RELEASE);
        for (name, modinfo) in TRANSPORT
            .iter()
            .map(|name| (*name, if *name == "virtio" { "depends=virtio_ring\0" } else { "\0" }))
            .chain([("ext4", "depends=mbcache\0alias=fs-ext4\0"), ("mbcache", "\0")])
        {
            fs::create_dir_all(modules.join("kernel")).unwrap();
            fs::write(modules.join(format!("kernel/{name}.ko")), module(modinfo)).unwrap();
        }
        let agent = dir.path().join("agent");
        // Any dynamic program will do: it is not run.
        fs::copy("/bin/sh", &agent).unwrap();
        let options = BuildOptions {
            cache_dir: dir.path().join("cache"),
            agent: AgentSource { path: agent },
            kernel: Some(KernelSource { kernel, modules }),
            imported: false,
            refresh: false,
        };
        Self { dir, options }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Builds and says what had to be packed; `None` if this host lacks the tools.
    fn build(&self) -> Option<(Appliance, Vec<&'static str>)> {
        let packed = RefCell::new(Vec::new());
        match build(&self.options, &|event| {
            if let Event::Packing { what } = event {
                packed.borrow_mut().push(what);
            }
        }) {
            Ok(appliance) => Some((appliance, packed.into_inner())),
            Err(error)
                if error.kind() == ErrorKind::NotFound && error.message().contains("program") =>
            {
                eprintln!("skipped: {error}");
                None
            }
            Err(error) => panic!("{error}: {:?}", error.what_helps()),
        }
    }
}

fn module(modinfo: &str) -> Vec<u8> {
    let mut object = Object::new(
        object::BinaryFormat::Elf,
        object::Architecture::X86_64,
        object::Endianness::Little,
    );
    let kind = object::SectionKind::ReadOnlyData;
    let section = object.add_section(Vec::new(), b".modinfo".to_vec(), kind);
    object.append_section_data(section, modinfo.as_bytes(), 1);
    object.write().unwrap()
}

fn contains(haystack: &Path, needle: &str) -> bool {
    fs::read(haystack).unwrap().windows(needle.len()).any(|w| w == needle.as_bytes())
}

#[test]
fn only_what_changed_is_made_again() {
    let place = Place::new();
    let Some((first, packed)) = place.build() else { return };
    assert_eq!(packed, ["tools", "initramfs"]);
    assert_eq!(first.kernel_release, RELEASE);
    assert!(contains(&first.initramfs, "/modules/virtio_ring.ko\n/modules/virtio.ko\n"));
    let line = format!("ext4: /lib/modules/{RELEASE}/ext4.ko /lib/modules/{RELEASE}/mbcache.ko\n");
    assert!(contains(&first.tools, &line));
    assert!(contains(&first.tools, "fs-ext4 ext4\n"));
    assert!(first.manifest.modules.missing.contains(&"xfs".to_owned()));

    let (again, packed) = place.build().unwrap();
    assert!(packed.is_empty());
    assert_eq!(again, first);

    // The agent: another file with the same content, then with other content.
    let agent = &place.options.agent.path;
    fs::copy("/bin/sh", place.path("new")).unwrap();
    fs::rename(place.path("new"), agent).unwrap();
    let (same, packed) = place.build().unwrap();
    assert!(packed.is_empty());
    assert_eq!(same.key, first.key);
    let mut changed = fs::read(agent).unwrap();
    changed.push(0);
    fs::write(agent, changed).unwrap();
    let (other, packed) = place.build().unwrap();
    assert_eq!(packed, ["initramfs"]);
    assert_ne!(other.key, first.key);
    assert_eq!(other.tools, first.tools);

    // A file that went missing from the cache comes back.
    fs::remove_dir_all(other.tools.parent().unwrap()).unwrap();
    assert_eq!(place.build().unwrap().1, ["tools"]);

    // Another kernel.
    let kernel = &place.options.kernel.as_ref().unwrap().kernel;
    fs::write(kernel, format!("\x7fELF...... Linux version {RELEASE} (x)")).unwrap();
    let (third, packed) = place.build().unwrap();
    assert_eq!(packed, ["tools", "initramfs"]);
    assert_ne!(third.kernel, first.kernel);
}

#[test]
fn the_kernel_that_was_named_last_is_used_from_then_on() {
    let mut place = Place::new();
    let Some((first, _)) = place.build() else { return };
    let named = place.options.kernel.take();
    assert_eq!(place.build().unwrap().0.kernel, first.kernel);

    let mut other = named.clone().unwrap();
    let bytes = fs::read(&other.kernel).unwrap();
    other.kernel = place.path("other");
    fs::write(&other.kernel, [bytes.as_slice(), b"more"].concat()).unwrap();
    place.options.kernel = Some(other.clone());
    let second = place.build().unwrap().0;
    assert_ne!(second.kernel, first.kernel);
    place.options.kernel = None;
    assert_eq!(place.build().unwrap().0.kernel, second.kernel);

    // One that is in the cache already.
    place.options.kernel = named;
    place.build().unwrap();
    place.options.kernel = None;
    assert_eq!(place.build().unwrap().0.kernel, first.kernel);

    // And one that went away.
    place.options.kernel = Some(other.clone());
    place.build().unwrap();
    place.options.kernel = None;
    fs::remove_file(&other.kernel).unwrap();
    let error = build(&place.options, &|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.what_helps().unwrap().contains("--refresh"));
}

#[test]
fn of_two_builds_at_once_one_works() {
    let place = Place::new();
    if place.build().is_none() {
        return;
    }
    fs::remove_dir_all(&place.options.cache_dir).unwrap();
    let place = &place;
    let packed: Vec<_> = std::thread::scope(|scope| {
        let builds: Vec<_> =
            (0..2).map(|_| scope.spawn(move || place.build().unwrap().1)).collect();
        builds.into_iter().flat_map(|build| build.join().unwrap()).collect()
    });
    assert_eq!(packed, ["tools", "initramfs"]);
}

#[test]
fn an_exported_appliance_is_used_elsewhere_with_its_own_agent() {
    let place = Place::new();
    let Some((appliance, _)) = place.build() else { return };
    let file = place.path("appliance.tar.zst");
    export(&appliance, &file).unwrap();
    assert_eq!(export(&appliance, &file).unwrap_err().kind(), ErrorKind::Usage);

    let there = BuildOptions {
        cache_dir: place.path("elsewhere"),
        kernel: None,
        imported: true,
        ..place.options.clone()
    };
    let nothing = build(&there, &|_| ()).unwrap_err();
    assert_eq!(nothing.message(), "no appliance was imported into this cache");
    let brought = import(&file, &there.cache_dir, &|_| ()).unwrap();
    assert_eq!(brought.kernel_release, RELEASE);
    assert!(brought.tools.contains(&"e2fsck".to_owned()));
    let imported = build(&there, &|_| ()).unwrap();
    for (a, b) in [
        (&imported.kernel, &appliance.kernel),
        (&imported.tools, &appliance.tools),
        (&imported.initramfs, &appliance.initramfs),
    ] {
        assert!(a.starts_with(&there.cache_dir) && fs::read(a).unwrap() == fs::read(b).unwrap());
    }
}

#[test]
fn a_changed_export_is_refused_and_leaves_nothing() {
    let place = Place::new();
    let Some((appliance, _)) = place.build() else { return };
    let file = place.path("appliance.tar.zst");
    export(&appliance, &file).unwrap();
    let plain = zstd::decode_all(&*fs::read(&file).unwrap()).unwrap();
    let at = plain.windows(14).position(|w| w == b"Linux version ").unwrap();
    let mut flipped = plain.clone();
    flipped[at] = b'l';
    let name = plain.windows(10).rposition(|w| w == b"modules/vi").unwrap();
    let mut renamed = plain.clone();
    renamed[name..name + 3].copy_from_slice(b"../");
    let cut = plain[..plain.len() / 2].to_vec();
    let cache = place.path("elsewhere");
    for (data, text) in [
        (flipped, "vmlinux does not have the SHA-256 of manifest.json"),
        (renamed, "exported appliance is broken"),
        (cut, "tools.squashfs does not have the SHA-256 of manifest.json"),
        (Vec::new(), "exported appliance is empty"),
    ] {
        fs::write(&file, zstd::encode_all(&*data, 1).unwrap()).unwrap();
        let result: Result<_> = import(&file, &cache, &|_| ());
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(error.message(), text);
        let left: Vec<_> = fs::read_dir(&cache).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["lock"]);
    }
}

#[test]
fn unusable_kernels_are_named_with_a_remedy() {
    let place = Place::new();
    let source = place.options.kernel.clone().unwrap();
    fs::remove_file(source.modules.join("kernel/virtio_blk.ko")).unwrap();
    let error = build(&place.options, &|_| ()).unwrap_err();
    assert!(error.message().contains("lacks virtio_blk"), "{error}");
    assert!(error.what_helps().is_some());

    fs::write(&source.kernel, "\x7fELF Linux version 1.2.3-other (x)").unwrap();
    let error = build(&place.options, &|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.message().contains("has release 1.2.3-other"), "{error}");

    fs::remove_file(&source.kernel).unwrap();
    assert_eq!(build(&place.options, &|_| ()).unwrap_err().kind(), ErrorKind::NotFound);
}
