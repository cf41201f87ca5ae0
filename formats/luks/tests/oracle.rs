// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Containers that QEMU and cryptsetup have made.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice, Slice, Span};
use tranship_format_testing::{has_tool, pattern, qemu_img, samples, verify};
use tranship_luks::{Header, Kdf, Limits, Luks, legacy_aes_cipher, unlock_cipher};

const PASSPHRASE: &str = "correct horse";

fn device(path: &Path) -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDevice::read_only(std::fs::read(path).unwrap()))
}

/// A container by QEMU, and the bytes inside. It measures for seconds how many iterations
/// it should use, so there is one such test.
fn by_qemu(folder: &Path) -> (PathBuf, Vec<u8>) {
    let raw = folder.join("plain.raw");
    let image = folder.join("image.luks");
    let plain = pattern(3 << 17, 7);
    std::fs::write(&raw, &plain).unwrap();
    let secret = format!("secret,id=s,data={PASSPHRASE}");
    let options = "key-secret=s,iter-time=10,hash-alg=sha512";
    let args = ["convert", "-f", "raw", "-O", "luks", "--object", &secret, "-o", options];
    qemu_img(&args, &[&raw, &image]);
    (image, plain)
}

/// A container that cryptsetup has made and QEMU has filled, and the bytes inside.
fn by_both(folder: &Path, options: &[&str]) -> (PathBuf, Vec<u8>) {
    let image = folder.join("image.luks");
    std::fs::File::create(&image).unwrap().set_len(5 << 20).unwrap();
    // Room behind the key slots, which the larger headers of LUKS2 need.
    let mut args = vec!["luksFormat", "-q", "--type", "luks1", "--align-payload", "8192"];
    args.extend(["--pbkdf-force-iterations", "1000", "--key-file", "-"]);
    args.extend(options);
    cryptsetup(&args, &image);
    let plain = pattern(1 << 20, 7);
    let raw = folder.join("plain.raw");
    std::fs::write(&raw, &plain).unwrap();
    let secret = format!("secret,id=s,data={PASSPHRASE}");
    let target = format!("driver=luks,key-secret=s,file.filename={}", image.display());
    let args = ["convert", "-n", "--object", &secret, "-f", "raw", "--target-image-opts"];
    qemu_img(&args, &[&raw, Path::new(&target)]);
    (image, plain)
}

#[test]
fn a_container_by_qemu_has_the_bytes_that_went_in() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (image, plain) = by_qemu(folder.path());
    is_container_of(&image, &plain, "aes-xts-plain64", 64);
    secrets_are_kept(&image);
}

#[test]
fn every_cipher_gives_the_bytes_that_went_in() {
    if !has_tool("qemu-img") || !has_tool("cryptsetup") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("aes-xts-plain64", "256", "sha1", 32),
        ("aes-cbc-plain64", "128", "sha256", 16),
        ("aes-cbc-plain", "256", "sha256", 32),
        ("aes-cbc-essiv:sha256", "256", "sha512", 32),
    ];
    for (encryption, bits, hash, key_bytes) in cases {
        let options = ["--cipher", encryption, "--key-size", bits, "--hash", hash];
        let (image, plain) = by_both(folder.path(), &options);
        is_container_of(&image, &plain, encryption, key_bytes);
    }
}

fn is_container_of(image: &Path, plain: &[u8], encryption: &str, key_bytes: u32) {
    let header = Header::read(&device(image)).unwrap();
    assert_eq!(format!("{}-{}", header.cipher, header.mode), encryption);
    assert_eq!((header.version, header.key_bytes), (1, key_bytes));
    let active: Vec<_> =
        header.slots.iter().filter(|slot| slot.active).map(|slot| slot.number).collect();
    assert_eq!(active, [0]);
    let luks = Luks::unlock(device(image), PASSPHRASE.as_bytes(), &Limits::default()).unwrap();
    assert_eq!(luks.warnings(), [""; 0]);
    verify(&luks, plain);
    for (at, len) in [(0, 1), (511, 2), (1, 512), (700, 4000), (512, 512), (plain.len() - 3, 3)] {
        let mut buf = vec![0; len];
        luks.read_at(&mut buf, at as u64).unwrap();
        assert_eq!(buf, plain[at..at + len], "{len} bytes at {at}");
    }
    // The cipher alone, as for a header inside qcow2.
    let cipher = unlock_cipher(&device(image), PASSPHRASE.as_bytes(), &Limits::default()).unwrap();
    let mut sectors = vec![0; 1024];
    device(image).read_at(&mut sectors, header.payload_offset + 2048).unwrap();
    cipher.decrypt(4, &mut sectors).unwrap();
    assert_eq!(sectors, plain[2048..3072]);
}

/// A wrong passphrase opens nothing, a right one does not show anywhere.
fn secrets_are_kept(image: &Path) {
    let error = Luks::unlock(device(image), b"wrong-one", &Limits::default()).unwrap_err();
    assert_eq!(error.to_string(), "passphrase opens none of the 1 key slots in use");
    let limits = Limits { pbkdf2_iterations: 10, ..Limits::default() };
    let error = Luks::unlock(device(image), PASSPHRASE.as_bytes(), &limits).unwrap_err();
    assert_eq!(error.to_string(), "key slot 0 is not usable");
    assert!(!format!("{error:?}").contains(PASSPHRASE));
    let luks = Luks::unlock(device(image), PASSPHRASE.as_bytes(), &Limits::default()).unwrap();
    assert!(!format!("{luks:?}").contains(PASSPHRASE));
}

fn cryptsetup(args: &[&str], image: &Path) {
    let mut child = Command::new("cryptsetup")
        .args(args)
        .arg(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), PASSPHRASE.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "cryptsetup {args:?}");
}

/// A new, empty LUKS2 container by cryptsetup.
fn by_cryptsetup(folder: &Path, options: &[&str]) -> PathBuf {
    let image = folder.join("image.luks2");
    std::fs::File::create(&image).unwrap().set_len(17 << 20).unwrap();
    let mut args = vec!["luksFormat", "-q", "--type", "luks2", "--key-file", "-"];
    args.extend(options);
    cryptsetup(&args, &image);
    image
}

#[test]
fn keys_of_luks2_by_cryptsetup_are_found() {
    if !has_tool("cryptsetup") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let argon = ["--pbkdf-memory", "1024", "--pbkdf-force-iterations", "4", "--pbkdf-parallel"];
    let cases: [(&[&str], &str); 3] = [
        (&["--pbkdf", "argon2id"], "argon2id"),
        (&["--pbkdf", "argon2i", "--sector-size", "512"], "argon2i"),
        (&["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha512"], "sha512"),
    ];
    for (options, name) in cases {
        let mut options = options.to_vec();
        if name.starts_with("argon") {
            options.extend(argon);
            options.push("2");
        }
        let image = by_cryptsetup(folder.path(), &options);
        let header = Header::read(&device(&image)).unwrap();
        assert_eq!((header.version, header.payload_offset), (2, 16 << 20));
        match &header.slots[0].kdf {
            Kdf::Argon2 { variant, memory, passes, lanes } => {
                assert_eq!((variant.as_str(), *memory, *passes, *lanes), (name, 1 << 20, 4, 2));
            }
            Kdf::Pbkdf2 { hash, iterations } => {
                assert_eq!((hash.as_str(), *iterations), (name, 1000));
            }
        }
        // The digest proves the key; what is inside is noise.
        let luks = Luks::unlock(device(&image), PASSPHRASE.as_bytes(), &Limits::default()).unwrap();
        assert_eq!(luks.size(), 1 << 20);
        assert_eq!(luks.sector_size(), luks.header().sector_size);
        assert_eq!(luks.warnings(), [""; 0]);
        assert!(Luks::unlock(device(&image), b"wrong", &Limits::default()).is_err());
    }
}

#[test]
fn the_second_header_serves_where_the_first_is_lost() {
    if !has_tool("cryptsetup") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let options = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let image = std::fs::read(by_cryptsetup(folder.path(), &options)).unwrap();
    let unlock = |bytes: Vec<u8>| {
        let file = Arc::new(MemoryDevice::read_only(bytes));
        Luks::unlock(file, PASSPHRASE.as_bytes(), &Limits::default())
    };
    for (at, expected) in [
        (0, "first header of LUKS2 is missing"),
        (5000, "first header of LUKS2 is damaged"),
        (0x4000, "second header of LUKS2 is missing"),
        (0x4000 + 5000, "second header of LUKS2 is damaged"),
    ] {
        let mut bytes = image.clone();
        bytes[at] ^= 0xff;
        let luks = unlock(bytes).unwrap();
        assert!(luks.warnings()[0].starts_with(expected), "{:?}", luks.warnings());
    }
    let mut bytes = image.clone();
    bytes[100] ^= 1;
    bytes[0x4000 + 100] ^= 1;
    assert!(unlock(bytes).is_err());
    let error = unlock(image[..16 << 20].to_vec().split_off(0)).unwrap();
    assert_eq!(error.size(), 0);
    let error = unlock(image[..1 << 20].to_vec()).unwrap_err();
    assert!(error.to_string().starts_with("payload starts behind the file's end"), "{error}");
}

#[test]
fn a_container_converted_to_luks2_keeps_its_bytes() {
    if !has_tool("qemu-img") || !has_tool("cryptsetup") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (image, plain) = by_both(folder.path(), &[]);
    cryptsetup(&["convert", "-q", "--type", "luks2"], &image);
    let luks = Luks::unlock(device(&image), PASSPHRASE.as_bytes(), &Limits::default()).unwrap();
    assert_eq!(luks.header().version, 2);
    verify(&luks, &plain);
}

#[test]
fn the_sample_by_cryptsetup_has_its_known_payload() {
    let all = samples();
    let Some(sample) = all.iter().find(|sample| sample.path == "dfvfs/luks1.raw") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = sample.unpack(folder.path(), &all);
    let luks = Luks::unlock(device(&path), b"luksde-TEST", &Limits::default()).unwrap();
    let header = luks.header();
    assert_eq!((header.mode.as_str(), header.hash.as_str()), ("cbc-plain", "sha1"));
    let mut bytes = vec![0; usize::try_from(luks.size()).unwrap()];
    luks.read_at(&mut bytes, 0).unwrap();
    let digest = <sha2::Sha256 as sha2::Digest>::digest(&bytes);
    assert_eq!(digest[..8], [0xa1, 0xeb, 0xfc, 0x6e, 0x57, 0xf4, 0x17, 0x94]);
}

/// A qcow2 file of one cluster with this encryption, the offset of the cluster, and what
/// is in it before encryption.
fn qcow2(folder: &Path, encryption: &str) -> (Vec<u8>, u64, Vec<u8>) {
    let (raw, image) = (folder.join("plain.raw"), folder.join("image.qcow2"));
    let plain = pattern(65_536, 11);
    std::fs::write(&raw, &plain).unwrap();
    let secret = format!("secret,id=s,data={PASSPHRASE}");
    let options = format!("encrypt.key-secret=s,encrypt.format={encryption}");
    let args = ["convert", "-f", "raw", "-O", "qcow2", "--object", &secret, "-o", &options];
    qemu_img(&args, &[&raw, &image]);
    let bytes = std::fs::read(image).unwrap();
    let number = |at: u64| {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
    };
    // L1 table, L2 table, cluster.
    let cluster = number(number(number(40)));
    (bytes, cluster, plain)
}

#[test]
fn both_encryptions_of_qcow2_are_decrypted() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (bytes, cluster, plain) = qcow2(folder.path(), "aes");
    let at = usize::try_from(cluster).unwrap();
    let mut data = bytes[at..at + plain.len()].to_vec();
    legacy_aes_cipher(PASSPHRASE.as_bytes()).unwrap().decrypt(0, &mut data).unwrap();
    assert!(data == plain, "sectors are numbered from the guest's start");

    let (bytes, cluster, plain) = qcow2(folder.path(), "luks,encrypt.iter-time=10");
    let at = usize::try_from(cluster).unwrap();
    let mut data = bytes[at..at + plain.len()].to_vec();
    // The extension that points to the header of LUKS.
    let pointer = bytes.windows(8).position(|window| window == b"\x05\x37\xbe\x77\0\0\0\x10");
    let pointer = pointer.unwrap() + 8;
    let start = u64::from_be_bytes(bytes[pointer..pointer + 8].try_into().unwrap());
    let len = u64::from_be_bytes(bytes[pointer + 8..pointer + 16].try_into().unwrap());
    let file: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::read_only(bytes));
    let header: Arc<dyn BlockDevice> = Arc::new(Slice::new(file, Span::new(start, len)).unwrap());
    let cipher = unlock_cipher(&header, PASSPHRASE.as_bytes(), &Limits::default()).unwrap();
    cipher.decrypt(cluster / 512, &mut data).unwrap();
    assert!(data == plain, "sectors are numbered from the file's start");
}
