// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Puts the facts about one mounted root together.

use crate::facts::{Clock, Facts, SeLinux};
use crate::fstab::{parse_crypttab, parse_fstab};
use crate::reader::{Reader, SMALL, assignment};
use crate::roots::{RootCheck, is_root};
use crate::{GuestTree, Result, bootloader, kernels, network, packages, release, services};
use tranship_protocol::GuestPath;

/// Finds out what the operating system in this tree is; `None` if there is none.
///
/// Reads only; every file and list is bounded. Files that are too large or cannot be
/// read are named in [`Facts::notes`].
///
/// # Errors
///
/// The guest's filesystem or the appliance failed.
pub fn inspect_root(tree: &dyn GuestTree) -> Result<Option<Facts>> {
    if is_root(tree)? != RootCheck::Root {
        return Ok(None);
    }
    let reader = Reader::new(tree);
    let os = release::operating_system(&reader)?;
    let fstab = reader.bytes(&GuestPath::of("/etc/fstab"), SMALL)?.unwrap_or_default();
    let crypttab = reader.bytes(&GuestPath::of("/etc/crypttab"), SMALL)?.unwrap_or_default();
    let kernels = kernels::kernels(&reader)?;
    let bootloader = bootloader::bootloader(&reader)?;
    let default_image = bootloader::default_image(&reader, &bootloader)?;
    let default_kernel = default_image.and_then(|image| {
        kernels
            .iter()
            .find(|kernel| kernel.image.file_name() == image.as_bytes())
            .map(|k| k.version.clone())
    });
    let packages = packages::packages(&reader)?;
    let tools = services::tools(&reader, os.init, &packages)?;
    let agent = services::agent(&reader, &packages)?;
    let arguments = bootloader.entries.iter().flat_map(|entry| &entry.arguments);
    let network = network::network(&reader, arguments.map(String::as_str))?;
    let mut efi_directories = reader.names("/boot/efi/EFI")?;
    efi_directories.sort();
    Ok(Some(Facts {
        os,
        mounts: parse_fstab(&fstab),
        crypt: parse_crypttab(&crypttab),
        kernels,
        bootloader,
        default_kernel,
        packages,
        tools,
        agent,
        network,
        selinux: selinux(&reader)?,
        clock: clock(&reader)?,
        timezone: timezone(&reader)?,
        efi_directories,
        notes: reader.into_notes(),
    }))
}

fn selinux(reader: &Reader<'_>) -> Result<SeLinux> {
    let config = reader.text("/etc/selinux/config")?.unwrap_or_default();
    let tools =
        reader.has_file("/usr/sbin/load_policy")? || reader.has_file("/sbin/load_policy")?;
    let enabled = assignment(&config, "SELINUX").is_some_and(|mode| mode != "disabled");
    Ok(if tools && enabled { SeLinux::On } else { SeLinux::Off })
}

/// The third line of `adjtime(5)`; without the file it is universal time.
fn clock(reader: &Reader<'_>) -> Result<Clock> {
    let text = reader.text("/etc/adjtime")?.unwrap_or_default();
    Ok(if text.lines().nth(2).map(str::trim) == Some("LOCAL") { Clock::Local } else { Clock::Utc })
}

fn timezone(reader: &Reader<'_>) -> Result<Option<String>> {
    if let Some(link) = reader.link("/etc/localtime")?
        && let Some((_, zone)) = link.split_once("zoneinfo/")
    {
        return Ok(Some(zone.to_owned()));
    }
    let text = reader.text("/etc/timezone")?.unwrap_or_default();
    Ok(text.lines().next().map(|line| line.trim().to_owned()).filter(|zone| !zone.is_empty()))
}
