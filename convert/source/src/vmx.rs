// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests of VMware Workstation and ESXi: a VMX file with its disks beside it.

use crate::disks::guest_name;
use crate::files::{Files, check_name};
use crate::hardware::mac;
use crate::vmx_text::Settings;
use crate::{
    Controller, CpuTopology, Error, ErrorKind, Firmware, NetworkKind, Removable, RemovableKind,
    Result, Source, SourceDisk, SourceKind, SourceNic, genid, image,
};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

const MAX_TEXT: u64 = 1 << 20;
/// VMware's default, in MiB.
const DEFAULT_MEMORY: u64 = 32;

/// The guest that the VMX file at `path` describes.
///
/// # Errors
///
/// A file that cannot be understood is [`ErrorKind::Corrupt`]; disks outside of its folder
/// are [`ErrorKind::Denied`], missing ones [`ErrorKind::NotFound`].
pub fn open_vmx(path: &Path) -> Result<Source> {
    open(path).map_err(|error| error.in_file(path))
}

fn open(path: &Path) -> Result<Source> {
    let files = Arc::new(Files::beside(path));
    let settings = Settings::parse(&read(path)?)?;
    let vcpus = number(&settings, "numvcpus")?.unwrap_or(1);
    let vcpus = u32::try_from(vcpus).ok().filter(|vcpus| *vcpus > 0).ok_or_else(|| {
        Error::corrupt(format!("numvcpus is {vcpus}, expected a positive number"))
    })?;
    let cores = number(&settings, "cpuid.corespersocket")?.and_then(|n| u32::try_from(n).ok());
    let memory = number(&settings, "memsize")?.unwrap_or(DEFAULT_MEMORY);
    let mut warnings = Vec::new();
    let disks = disks(&settings, &files, &mut warnings)?;
    if disks.is_empty() {
        warnings.push("the guest has no disks".to_owned());
    }
    let uefi = settings.get("firmware").is_some_and(|value| value.eq_ignore_ascii_case("efi"));
    let genid = settings.get("vm.genid").zip(settings.get("vm.genidx"));
    Ok(Source {
        name: settings.get("displayname").map_or_else(|| guest_name(path), str::to_owned),
        kind: SourceKind::Vmx,
        memory_bytes: memory
            .checked_mul(1 << 20)
            .filter(|bytes| *bytes > 0 && i64::try_from(*bytes).is_ok())
            .ok_or_else(|| Error::corrupt(format!("memSize is {memory} MiB")))?,
        vcpus,
        cpu_topology: cores.and_then(|cores| CpuTopology::of(vcpus, cores)),
        // VMware's default is a BIOS, and it writes the key only for UEFI.
        firmware: if uefi { Firmware::Uefi } else { Firmware::Bios },
        secure_boot: settings.is_true("uefi.secureboot.enabled"),
        genid: genid.and_then(|(first, second)| genid::from_vmware(first, second)),
        disks,
        nics: nics(&settings),
        removables: removables(&settings),
        sound: sound(&settings),
        guest_os: settings.get("guestos").map(str::to_owned),
        warnings,
        manifest: None,
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    use tranship_block::BlockDevice;
    let file = tranship_raw::RawFile::open(path, tranship_raw::Access::ReadOnly)
        .map_err(|error| Error::disk("cannot open the VMX file", error))?;
    if file.size() > MAX_TEXT {
        return Err(Error::corrupt(format!(
            "the VMX file has {} bytes, expected at most {MAX_TEXT}",
            file.size()
        )));
    }
    let mut text = vec![0; usize::try_from(file.size()).unwrap_or(0)];
    file.read_at(&mut text, 0).map_err(|error| Error::disk("cannot read the VMX file", error))?;
    Ok(text)
}

fn number(settings: &Settings, key: &str) -> Result<Option<u64>> {
    let Some(text) = settings.get(key) else { return Ok(None) };
    text.trim()
        .parse()
        .map(Some)
        .map_err(|_| Error::corrupt(format!("{key} is {text:?}, expected a positive number")))
}

/// The numbers `C` and `T` of all keys `busC:T.…`, in order.
fn slots(settings: &Settings, bus: &str) -> BTreeSet<(u32, u32)> {
    let slot = |key: &str| {
        let (controller, rest) = key.strip_prefix(bus)?.split_once(':')?;
        let (target, _) = rest.split_once('.')?;
        Some((controller.parse().ok()?, target.parse().ok()?))
    };
    settings.keys().filter_map(slot).collect()
}

fn disks(
    settings: &Settings,
    files: &Arc<Files>,
    warnings: &mut Vec<String>,
) -> Result<Vec<SourceDisk>> {
    // The device types that are disks; an empty string stands for an absent key.
    let buses: [(&str, &[&str]); 4] = [
        ("scsi", &["", "disk", "plaindisk", "rawdisk", "scsi-harddisk"]),
        ("nvme", &["", "disk"]),
        ("sata", &["", "disk", "ata-harddisk"]),
        ("ide", &["", "disk", "ata-harddisk"]),
    ];
    let mut disks = Vec::new();
    for (bus, types) in buses {
        for (controller, target) in slots(settings, bus) {
            let slot = format!("{bus}{controller}:{target}");
            let kind = device_type(settings, &slot);
            let Some(name) = settings.get(&format!("{slot}.filename")) else { continue };
            let absent = settings.is_false(&format!("{slot}.present"));
            if absent || !types.contains(&kind.as_str()) {
                continue;
            }
            let model = settings.get(&format!("scsi{controller}.virtualdev")).map(str::to_owned);
            let hangs_on = match bus {
                "scsi" => Controller::Scsi(model),
                "nvme" => Controller::Nvme,
                "sata" => Controller::Sata,
                _ => Controller::Ide,
            };
            let name = local_name(name, &slot, warnings)?;
            let device = files.open(&name).map_err(|error| match error.kind() {
                ErrorKind::NotFound => Error::new(
                    ErrorKind::NotFound,
                    format!("disk {slot} is in file {name:?}, which does not exist"),
                ),
                _ => error,
            })?;
            disks.push(SourceDisk {
                index: disks.len(),
                controller: hangs_on,
                unit: Some(target),
                format: image::probe(&device, &name)?.to_owned(),
                location: files.locate(&name)?,
                name,
                files: Arc::clone(files),
            });
        }
    }
    Ok(disks)
}

fn device_type(settings: &Settings, slot: &str) -> String {
    settings.get(&format!("{slot}.devicetype")).unwrap_or_default().to_ascii_lowercase()
}

/// The name of a disk in the folder of the VMX file. A path of the old host says nothing
/// here, so that only its last part is looked for.
fn local_name(name: &str, slot: &str, warnings: &mut Vec<String>) -> Result<String> {
    let file = name.rsplit(['/', '\\']).next().unwrap_or(name);
    let foreign = name.starts_with(['/', '\\']) || name.get(1..3) == Some(":\\");
    if foreign && !file.is_empty() {
        warnings.push(format!("disk {slot} is {name:?}; {file:?} beside the VMX file is used"));
        return Ok(file.to_owned());
    }
    check_name(name)?;
    Ok(name.to_owned())
}

fn nics(settings: &Settings) -> Vec<SourceNic> {
    let numbers: BTreeSet<u32> = settings
        .keys()
        .filter_map(|key| key.strip_prefix("ethernet")?.split_once('.')?.0.parse().ok())
        .collect();
    let nics = numbers.into_iter().filter_map(|number| {
        let get = |key: &str| settings.get(&format!("ethernet{number}.{key}"));
        // A card that was removed leaves its keys behind.
        if !settings.is_true(&format!("ethernet{number}.present")) {
            return None;
        }
        let fixed = get("address")
            .filter(|_| get("addresstype").is_some_and(|kind| kind.eq_ignore_ascii_case("static")));
        let name = get("networkname").map_or_else(|| format!("ethernet{number}"), str::to_owned);
        let bridged =
            get("connectiontype").is_some_and(|kind| kind.eq_ignore_ascii_case("bridged"));
        Some(SourceNic {
            mac: fixed.or_else(|| get("generatedaddress")).and_then(mac),
            network: if bridged { NetworkKind::Bridge(name) } else { NetworkKind::Network(name) },
            model: get("virtualdev").map(str::to_owned),
            slot: get("pcislotnumber").and_then(|slot| slot.parse().ok()),
        })
    });
    nics.collect()
}

fn removables(settings: &Settings) -> Vec<Removable> {
    let drives = [("ide", Controller::Ide), ("sata", Controller::Sata)];
    let mut removables = Vec::new();
    for (bus, controller) in drives {
        for (number, target) in slots(settings, bus) {
            let slot = format!("{bus}{number}:{target}");
            let kind = device_type(settings, &slot);
            let drive = matches!(kind.as_str(), "atapi-cdrom" | "cdrom-image" | "cdrom-raw");
            if drive && !settings.is_false(&format!("{slot}.present")) {
                let (kind, controller) = (RemovableKind::Cdrom, controller.clone());
                removables.push(Removable { kind, controller, unit: Some(target) });
            }
        }
    }
    for unit in [0, 1] {
        if settings.is_true(&format!("floppy{unit}.present")) {
            let (kind, controller) = (RemovableKind::Floppy, Controller::Unknown);
            removables.push(Removable { kind, controller, unit: Some(unit) });
        }
    }
    removables
}

/// VMware's sound cards by QEMU's names.
fn sound(settings: &Settings) -> Option<String> {
    if settings.is_false("sound.present") {
        return None;
    }
    let model = settings.get("sound.virtualdev")?.to_ascii_lowercase();
    Some(match model.as_str() {
        "es1371" => "es1370".to_owned(),
        "hdaudio" => "ich6".to_owned(),
        _ => model,
    })
}
