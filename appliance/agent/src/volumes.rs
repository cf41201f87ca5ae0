// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks, partitions, logical volumes, arrays: their names and what is on them.
//!
//! The API's names are `/dev/sda`, `/dev/sda1`, … whatever bus the disks hang on. They are
//! real nodes in /dev beside the kernel's own, so that every tool can use and print them.

use crate::failure::{Result, io, plain, system};
use crate::{modules, programs, tools};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use std::fs;
use std::path::{Path, PathBuf};
use tranship_protocol::{TOOLS_SERIAL, Volume, VolumeKind, disk_name};

const BLOCK: &str = "/sys/block";

fn trimmed(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The kernel's name of the disk with this serial number.
pub(crate) fn disk_with_serial(serial: &str) -> Option<String> {
    disks_by_serial().into_iter().find(|(found, _)| found == serial).map(|(_, name)| name)
}

/// Serial number and kernel name of every disk that has a serial number.
fn disks_by_serial() -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir(BLOCK) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            trimmed(entry.path().join("serial")).map(|serial| (serial, name))
        })
        .collect()
}

/// The serial numbers of all disks.
pub(crate) fn serials() -> Vec<String> {
    disks_by_serial().into_iter().map(|(serial, _)| serial).collect()
}

/// A disk that is about to be unplugged.
pub(crate) struct Leaving {
    /// The kernel's name of it.
    pub(crate) kernel_name: String,
    /// The nodes of the disk and its partitions.
    pub(crate) nodes: Vec<String>,
}

/// The guest's disk with this serial number.
pub(crate) fn disk(serial: &str) -> Option<Leaving> {
    if serial == TOOLS_SERIAL {
        return None;
    }
    let kernel_name = disk_with_serial(serial)?;
    let folder = Path::new(BLOCK).join(&kernel_name);
    let found = devices().ok()?;
    let of_it = |device: &&Device| device.sys.starts_with(&folder);
    let nodes = found.iter().filter(of_it).map(|device| format!("/dev/{}", device.name)).collect();
    Some(Leaving { kernel_name, nodes })
}

/// A disk of the guest or one of its partitions.
struct Device {
    /// The API's name without `/dev/`.
    name: String,
    /// Its folder below /sys.
    sys: PathBuf,
    kind: VolumeKind,
}

/// The guest's disks in order, each followed by its partitions in order; makes the nodes.
fn devices() -> Result<Vec<Device>> {
    let mut disks: Vec<(usize, String)> = disks_by_serial()
        .into_iter()
        .filter(|(serial, _)| serial != TOOLS_SERIAL)
        .filter_map(|(serial, name)| {
            let index = serial.strip_prefix("tranship-")?.parse().ok()?;
            Some((index, name))
        })
        .collect();
    disks.sort();
    let mut found = Vec::new();
    for (index, kernel_name) in disks {
        let name = disk_name(index);
        let sys = Path::new(BLOCK).join(&kernel_name);
        let mut partitions: Vec<(u32, PathBuf)> = fs::read_dir(&sys)
            .map_err(|error| io(sys.display(), &error))?
            .flatten()
            .filter_map(|entry| {
                let number = trimmed(entry.path().join("partition"))?.parse().ok()?;
                Some((number, entry.path()))
            })
            .collect();
        partitions.sort();
        let parts = partitions.into_iter().map(|(number, sys)| Device {
            name: format!("{name}{number}"),
            sys,
            kind: VolumeKind::Partition,
        });
        let disk = Device { name: name.clone(), sys: sys.clone(), kind: VolumeKind::Disk };
        for device in std::iter::once(disk).chain(parts) {
            make_node(&device)?;
            found.push(device);
        }
    }
    Ok(found)
}

fn make_node(device: &Device) -> Result<()> {
    let path = format!("/dev/{}", device.name);
    let number = trimmed(device.sys.join("dev")).unwrap_or_default();
    let parsed = number
        .split_once(':')
        .and_then(|(major, minor)| Some(makedev(major.parse().ok()?, minor.parse().ok()?)))
        .ok_or_else(|| plain(format!("{path}: the kernel gives no device number")))?;
    match mknodat(CWD, &path, FileType::BlockDevice, Mode::from_raw_mode(0o600), parsed) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(system(path, error)),
    }
}

fn describe(device: &Device) -> Volume {
    let number = |file: &str| trimmed(device.sys.join(file)).and_then(|text| text.parse().ok());
    // sysfs counts in units of 512 bytes, whatever the sector size.
    let bytes = |file: &str| number(file).map(|units: u64| units.saturating_mul(512));
    let partition = device.kind == VolumeKind::Partition;
    Volume {
        device: format!("/dev/{}", device.name),
        kind: device.kind,
        size: bytes("size").unwrap_or(0),
        start: if partition { bytes("start") } else { None },
        number: number("partition").and_then(|number: u64| u32::try_from(number).ok()),
        tags: Vec::new(),
    }
}

/// The guest's disks in order.
pub(crate) fn disks() -> Result<Vec<Volume>> {
    let devices = devices()?;
    Ok(devices.iter().filter(|device| device.kind == VolumeKind::Disk).map(describe).collect())
}

/// Everything that may hold a filesystem, arrays and volume groups activated.
pub(crate) fn volumes() -> Result<Vec<Volume>> {
    tools::ensure()?;
    let mut found: Vec<Volume> = devices()?.iter().map(describe).collect();
    identify(&mut found)?;
    if has_type(&found, "linux_raid_member") && assemble_arrays()? {
        let mut arrays = arrays();
        identify(&mut arrays)?;
        found.extend(arrays);
    }
    let mut opened = mapped_volumes();
    identify(&mut opened)?;
    found.extend(opened);
    if has_type(&found, "LVM2_member") {
        let mut logical = logical_volumes()?;
        identify(&mut logical)?;
        found.extend(logical);
    }
    Ok(found)
}

fn has_type(volumes: &[Volume], wanted: &str) -> bool {
    volumes.iter().any(|volume| volume.tag("TYPE") == Some(wanted))
}

/// Fills in the tags of all volumes with one look by libblkid.
fn identify(volumes: &mut [Volume]) -> Result<()> {
    if volumes.is_empty() {
        return Ok(());
    }
    let mut arguments = vec!["blkid", "-p", "-o", "export"];
    arguments.extend(volumes.iter().map(|volume| volume.device.as_str()));
    // Status 2 says that some device has nothing known on it, 8 that one is ambiguous.
    let output = programs::capture(&arguments)?;
    if !matches!(output.status, 0 | 2 | 8) {
        return Err(plain(format!("blkid: {}", output.text().trim())));
    }
    for (device, tags) in parse_blkid(&output.text()) {
        if let Some(volume) = volumes.iter_mut().find(|volume| volume.device == device) {
            volume.tags = tags;
        }
    }
    Ok(())
}

/// Splits blkid's export format: blocks of `KEY=value` lines, each with a `DEVNAME`.
fn parse_blkid(text: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once('=') else { continue };
        let value = unescape(value);
        if key == "DEVNAME" {
            found.push((value, Vec::new()));
        } else if let Some((_, tags)) = found.last_mut() {
            tags.push((key.to_owned(), value));
        }
    }
    found
}

/// Takes the backslashes out that blkid puts before shell characters.
fn unescape(value: &str) -> String {
    let mut plain = String::with_capacity(value.len());
    let mut letters = value.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => plain.extend(letters.next()),
            other => plain.push(other),
        }
    }
    plain
}

/// Starts every array whose members are there, also degraded ones.
fn assemble_arrays() -> Result<bool> {
    for module in ["md_mod", "linear", "raid0", "raid1", "raid10", "raid456"] {
        modules::load(module)?;
    }
    let output = programs::capture(&["mdadm", "--assemble", "--scan", "--run", "--no-degraded"])?;
    if output.status != 0 {
        // Members may be missing; degraded arrays are still worth reading.
        programs::capture(&["mdadm", "--assemble", "--scan", "--run"])?;
    }
    Ok(!arrays().is_empty())
}

/// Block devices of /sys whose kernel names begin with `prefix`, as volumes of `kind`.
fn kernel_volumes(prefix: &str, kind: VolumeKind) -> Vec<(PathBuf, Volume)> {
    let Ok(entries) = fs::read_dir(BLOCK) else { return Vec::new() };
    let mut found: Vec<(PathBuf, Volume)> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_prefix(prefix)?;
            let volume = describe(&Device { name, sys: entry.path(), kind });
            (volume.size > 0).then(|| (entry.path(), volume))
        })
        .collect();
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    found
}

fn arrays() -> Vec<Volume> {
    kernel_volumes("md", VolumeKind::Raid).into_iter().map(|(_, volume)| volume).collect()
}

/// Opened encrypted volumes: device-mapper devices that are not logical volumes.
fn mapped_volumes() -> Vec<Volume> {
    kernel_volumes("dm-", VolumeKind::Encrypted)
        .into_iter()
        .filter_map(|(sys, mut volume)| {
            let uuid = trimmed(sys.join("dm/uuid"))?;
            uuid.starts_with("CRYPT-").then_some(())?;
            volume.device = format!("/dev/mapper/{}", trimmed(sys.join("dm/name"))?);
            Some(volume)
        })
        .collect()
}

/// LVM without udev, looking at the guest's devices only.
const LVM_CONFIG: &str = "activation{udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0} \
     devices{obtain_device_list_from_udev=0 use_devicesfile=0 external_device_info_source=\"none\" \
     filter=[\"a|^/dev/sd|\",\"a|^/dev/md|\",\"a|^/dev/mapper/|\",\"r|.*|\"]} \
     backup{backup=0 archive=0} global{use_lvmlockd=0 locking_type=1}";

/// Activates all volume groups and lists their public volumes.
fn logical_volumes() -> Result<Vec<Volume>> {
    for module in ["dm_mod", "dm_thin_pool", "dm_snapshot", "dm_mirror", "dm_raid"] {
        modules::load(module)?;
    }
    let activated =
        programs::capture(&["lvm", "vgchange", "--config", LVM_CONFIG, "-q", "-ay", "--sysinit"])?;
    let listed = programs::capture(&[
        "lvm",
        "lvs",
        "--config",
        LVM_CONFIG,
        "--noheadings",
        "--units",
        "b",
        "--nosuffix",
        "--separator",
        "\t",
        "-S",
        "lv_role=public && lv_skip_activation!=yes",
        "-o",
        "lv_path,lv_size",
    ])?;
    if listed.status != 0 {
        return Err(plain(format!("lvm: {} {}", activated.text().trim(), listed.text().trim())));
    }
    Ok(parse_lvs(&listed.text()))
}

fn parse_lvs(text: &str) -> Vec<Volume> {
    text.lines()
        .filter_map(|line| {
            let (path, size) = line.trim().split_once('\t')?;
            path.starts_with("/dev/").then(|| Volume {
                device: path.to_owned(),
                kind: VolumeKind::LogicalVolume,
                size: size.trim().parse().unwrap_or(0),
                start: None,
                number: None,
                tags: Vec::new(),
            })
        })
        .collect()
}

/// Opens an encrypted volume with `key` as `/dev/mapper/name`.
pub(crate) fn open_encrypted(device: &str, name: &str, key: &[u8]) -> Result<()> {
    tools::ensure()?;
    devices()?;
    for module in ["dm_mod", "dm_crypt", "algif_skcipher", "algif_hash", "xts", "aesni_intel"] {
        modules::load(module)?;
    }
    let output = programs::capture_with_input(
        &["cryptsetup", "open", "--key-file", "-", "--", device, name],
        key,
    )?;
    if output.status == 0 {
        Ok(())
    } else {
        Err(plain(format!("{device}: {}", output.text().trim())))
    }
}

/// Makes sure that `device` exists under its API name, and is of the guest.
pub(crate) fn check_name(device: &str) -> Result<()> {
    if !device.starts_with("/dev/") {
        return Err(plain(format!("{device}: expecting a device name")));
    }
    devices()?;
    rustix::fs::stat(device).map(|_| ()).map_err(|error| system(device, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blkid_blocks_are_told_apart_and_unescaped() {
        let text =
            "DEVNAME=/dev/sda\nPTTYPE=dos\n\nDEVNAME=/dev/sda1\nLABEL=my\\ disk\nTYPE=ext4\n";
        let found = parse_blkid(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].1, [("PTTYPE".to_owned(), "dos".to_owned())]);
        assert_eq!(found[1].1[0], ("LABEL".to_owned(), "my disk".to_owned()));
    }

    #[test]
    fn logical_volumes_are_listed_with_their_sizes() {
        let found = parse_lvs("  /dev/vg/root\t1073741824\n  \t4096\n");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].device.as_str(), found[0].size), ("/dev/vg/root", 1_073_741_824));
    }
}
