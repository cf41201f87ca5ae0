// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What goes into the appliance: kernel modules, programs and the packages that bring them.

/// Counts up whenever the layout of the appliance changes, so that old caches are not used.
pub(crate) const BUILDER_VERSION: u32 = 4;

/// Modules that the initramfs needs to reach the tools image and the host. Loaded by the agent in
/// dependency order before anything else.
///
/// The flag says whether the appliance cannot start without: then it must be a module or built in.
pub(crate) const TRANSPORT: [(&str, bool); 8] = [
    ("virtio", true),
    ("virtio_ring", true),
    ("virtio_pci_legacy_dev", false),
    ("virtio_pci_modern_dev", false),
    ("virtio_pci", true),
    ("virtio_blk", true),
    ("virtio_console", true),
    ("squashfs", true),
];

/// Modules that go into the tools image and are loaded when a disk asks for them. None is
/// required: what a kernel does not have is reported in the manifest.
pub(crate) const ON_DEMAND: &[&str] = &[
    // Filesystems.
    "ext4",
    "xfs",
    "btrfs",
    "vfat",
    "msdos",
    "fat",
    "isofs",
    "udf",
    "ntfs3",
    "fuse",
    "f2fs",
    "jfs",
    "reiserfs",
    "minix",
    "hfs",
    "hfsplus",
    "exfat",
    "ufs",
    "erofs",
    "nilfs2",
    "efivarfs",
    "cramfs",
    "romfs",
    "zfs",
    "bcachefs",
    // Names on FAT and ISO filesystems. Without utf8 and the default code page nothing mounts.
    "nls_utf8",
    "nls_cp437",
    "nls_iso8859_1",
    "nls_iso8859_15",
    "nls_ascii",
    "nls_cp850",
    "nls_cp1250",
    "nls_cp1251",
    "nls_cp932",
    "nls_cp936",
    "nls_cp949",
    "nls_cp950",
    // Volumes.
    "dm_mod",
    "dm_crypt",
    "dm_thin_pool",
    "dm_snapshot",
    "dm_mirror",
    "dm_raid",
    "dm_cache",
    "dm_cache_smq",
    "dm_writecache",
    "dm_integrity",
    "dm_verity",
    "dm_multipath",
    "dm_zero",
    "md_mod",
    "raid0",
    "raid1",
    "raid10",
    "raid456",
    "linear",
    "bcache",
    "loop",
    "nbd",
    // What dm-crypt and cryptsetup ask the crypto layer for. Without modprobe in the appliance
    // the templates have to be loaded by name.
    "algif_skcipher",
    "algif_hash",
    "algif_aead",
    "algif_rng",
    "af_alg",
    "aesni_intel",
    "aes_generic",
    "xts",
    "cbc",
    "ecb",
    "ctr",
    "gcm",
    "lrw",
    "essiv",
    "sha1_generic",
    "sha256_generic",
    "sha256_ssse3",
    "sha512_generic",
    "sha512_ssse3",
    "adiantum",
    "nhpoly1305",
    "chacha_generic",
    "serpent_generic",
    "twofish_generic",
    "twofish_x86_64",
    "camellia_generic",
    "rmd160",
    "wp512",
    "crc32c_generic",
    "crc32c_intel",
    "libcrc32c",
    "crc32_generic",
    "xxhash_generic",
    "blake2b_generic",
    "authenc",
    "authencesn",
    "hmac",
    "cmac",
    "ccm",
    // Channels to the host.
    "virtio_net",
    "vsock",
    "vmw_vsock_virtio_transport",
];

/// A program of the tools image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    /// The Debian package that brings it; other distributions mostly agree.
    pub(crate) package: &'static str,
    /// Whether the appliance is useless without it.
    pub(crate) required: bool,
}

/// The packages of the tools image, each with its programs.
const PACKAGES: &[(&str, &[&str])] = &[
    ("mount", &["mount", "umount", "losetup"]),
    ("util-linux", &["blkid", "fstrim", "wipefs", "swaplabel", "mkswap", "blockdev", "partx"]),
    ("fdisk", &["sfdisk"]),
    ("gdisk", &["sgdisk"]),
    ("parted", &["parted"]),
    (
        "e2fsprogs",
        &[
            "e2fsck",
            "fsck.ext2",
            "fsck.ext3",
            "fsck.ext4",
            "resize2fs",
            "tune2fs",
            "e2label",
            "mke2fs",
            "mkfs.ext2",
            "mkfs.ext3",
            "mkfs.ext4",
            "dumpe2fs",
            "debugfs",
            "e2image",
            "chattr",
            "lsattr",
        ],
    ),
    ("lvm2", &["lvm"]),
    ("dmsetup", &["dmsetup"]),
    ("thin-provisioning-tools", &["thin_check", "cache_check"]),
    ("mdadm", &["mdadm"]),
    ("cryptsetup-bin", &["cryptsetup"]),
    ("ldmtool", &["ldmtool"]),
    (
        "ntfs-3g",
        &["ntfs-3g", "ntfsfix", "ntfsinfo", "ntfsresize", "mkntfs", "ntfscat", "ntfsclone"],
    ),
    ("xfsprogs", &["xfs_repair", "xfs_db", "mkfs.xfs", "xfs_growfs", "xfs_admin", "xfs_io"]),
    ("btrfs-progs", &["btrfs", "mkfs.btrfs", "btrfstune"]),
    ("dosfstools", &["fsck.fat", "fsck.vfat", "mkfs.fat", "mkfs.vfat", "fatlabel", "dosfslabel"]),
    ("exfatprogs", &["fsck.exfat", "mkfs.exfat"]),
    ("f2fs-tools", &["fsck.f2fs", "mkfs.f2fs"]),
    ("tar", &["tar"]),
    ("cpio", &["cpio"]),
    ("gzip", &["gzip"]),
    ("xz-utils", &["xz"]),
    ("zstd", &["zstd"]),
    // A shell for looking around inside, and for the few tools that are shell scripts.
    ("dash", &["sh"]),
    ("busybox", &["busybox"]),
];

/// Programs without which no guest can be looked at.
const REQUIRED: [&str; 2] = ["blkid", "e2fsck"];

/// All programs of the tools image.
pub(crate) fn tools() -> impl Iterator<Item = Tool> {
    PACKAGES.iter().flat_map(|&(package, names)| {
        names.iter().map(move |&name| Tool { name, package, required: REQUIRED.contains(&name) })
    })
}

/// Libraries that are opened by name at run time, and the library whose presence says so.
pub(crate) const OPENED_AT_RUN_TIME: [(&str, &str); 2] = [
    // pthread_cancel and C++ unwinding in glibc.
    ("libc.so.6", "libgcc_s.so.1"),
    // Old LUKS volumes with ripemd160 or whirlpool hashes need OpenSSL's legacy provider.
    ("libcrypto.so.3", "ossl-modules/legacy.so"),
];

/// Files that tools read; each is optional.
pub(crate) const DATA_FILES: [&str; 2] = [
    // Libraries outside the default directories are found through it.
    "/etc/ld.so.cache",
    // Feature defaults of mke2fs.
    "/etc/mke2fs.conf",
];

/// Where programs are looked for, in this order.
pub(crate) const PROGRAM_DIRS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Empty directories of the tools image, where the agent mounts things.
pub(crate) const EMPTY_DIRS: [&str; 11] =
    ["dev", "etc", "mnt", "proc", "root", "run", "sys", "sysroot", "tmp", "usr/bin", "var"];

/// Metapackages of the kernel by the `ID` of os-release, best first.
///
/// The generic flavour comes before the cloud one, because it has every filesystem as a module:
/// Debian's cloud kernel lacks UFS, HFS+, F2FS, NILFS2 and JFS, though it starts a little faster.
pub(crate) const KERNEL_PACKAGES: [(&str, &[&str]); 2] = [
    ("debian", &["linux-image-amd64", "linux-image-cloud-amd64"]),
    ("ubuntu", &["linux-image-generic", "linux-image-virtual"]),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_name_is_listed_twice_and_the_required_ones_exist() {
        let names: Vec<_> = tools().map(|tool| tool.name).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        assert_eq!(tools().filter(|tool| tool.required).count(), REQUIRED.len());
        assert_eq!(ON_DEMAND.iter().collect::<BTreeSet<_>>().len(), ON_DEMAND.len());
    }
}
