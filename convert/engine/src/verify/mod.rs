// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a converted guest boots: it is started on throw-away layers over its disks, with
//! the devices that libvirt would give it, until it shows a sign of life or of death.

mod agent;
mod boot;
mod console;
mod disks;
mod firmware;
mod machine;
mod qmp;
mod screen;
mod signs;

use crate::event::{Event, Reporter};
use crate::libvirt::{Domain, LONGEST};
use crate::{Error, ErrorKind, Result};
use boot::Boot;
use serde::{Serialize, Serializer};
use signs::Sign;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tranship_appliance::{CancelToken, Preference};

/// Where overlays lie: they grow with what the guest writes, and `/tmp` may be memory.
const TEMPORARY: &str = "/var/tmp";
/// Memory that is enough for any guest to boot, and that most hosts have.
const MOST_MEMORY_MIB: u64 = 4096;
/// Lines of the console that a failure is reported with.
const TAIL_LINES: usize = 15;

/// What is booted, and what counts.
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    /// The guest's libvirt XML.
    pub xml: PathBuf,
    /// How long to wait for a sign.
    pub limit: Duration,
    /// Text on one line of the serial console that is the only sign of life that counts.
    /// Without it a login prompt there or an answer of the guest agent is one.
    pub expect: Option<String>,
    /// Where the serial console's output is stored (its first 8 MiB).
    pub console_log: Option<PathBuf>,
    /// Where a picture of the screen at the end is stored, as PNG.
    pub screenshot: Option<PathBuf>,
    /// KVM or emulation.
    pub backend: Preference,
    /// The machine's memory in MiB; the guest's own, at most 4 GiB, if not given.
    pub memory_mib: Option<u32>,
}

/// How the boot ended.
#[derive(Debug, Serialize)]
pub struct BootReport {
    /// Whether the guest is up.
    pub alive: bool,
    /// What showed it, in one sentence.
    pub sign: String,
    /// From the machine's start to the sign; in seconds where it is serialised.
    #[serde(serialize_with = "seconds")]
    pub elapsed: Duration,
    /// The console log, if it was wanted.
    pub console_log: Option<PathBuf>,
    /// The picture of the screen, if it was wanted and QEMU could make it.
    pub screenshot: Option<PathBuf>,
    /// What ran the machine: `qemu-kvm` or `qemu-tcg`.
    pub backend: String,
}

fn seconds<S: Serializer>(elapsed: &Duration, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_f64(elapsed.as_secs_f64())
}

/// Boots the guest once. Its disks are never written.
///
/// A guest that does not come up is no error, but a report that says so.
///
/// # Errors
///
/// [`ErrorKind::Input`] for XML or disks that cannot be used, [`ErrorKind::Blocked`] if
/// there is no QEMU or no UEFI firmware for it, [`ErrorKind::Usage`] if the expected text
/// cannot appear or if the log or the picture would overwrite the guest, [`ErrorKind::Interrupted`] once `cancel` is, and
/// [`ErrorKind::Conversion`] or [`ErrorKind::Transient`] if the machine cannot be started.
pub fn verify_boot(
    options: &VerifyOptions,
    reporter: &dyn Reporter,
    cancel: &CancelToken,
) -> Result<BootReport> {
    if let Some(text) = options.expect.as_ref().filter(|text| !is_one_line(text)) {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("the expected text is {text:?}, and should be (a part of) one line"),
        ));
    }
    let domain = read_domain(&options.xml)?;
    if domain.disks.is_empty() {
        return Err(Error::new(ErrorKind::Input, "the guest has no disks")
            .because(format!("{} lists none", options.xml.display())));
    }
    refuse_overwriting(options, &domain)?;
    let folder = tempfile::Builder::new()
        .prefix("tranship-boot-")
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir_in(TEMPORARY)
        .map_err(|error| cannot("make a folder in", Path::new(TEMPORARY), error))?;
    let log = match &options.console_log {
        Some(path) => path.clone(),
        None => folder.path().join("console.log"),
    };
    let log_file = File::create(&log).map_err(|error| cannot("create", &log, error))?;
    let mut boot = Boot::start(&domain, options, &folder, log_file, reporter)?;
    let sign = boot.watch(options.limit, cancel)?;
    let elapsed = boot.elapsed();
    let screenshot =
        options.screenshot.as_deref().and_then(|target| match boot.shoot(folder.path(), target) {
            Ok(()) => Some(target.to_owned()),
            Err(error) => {
                let text = format!("there is no picture of the screen: {error}");
                reporter.report(&Event::warning("boot.screenshot", text));
                None
            }
        });
    let backend = boot.stop();
    let (alive, sign) = match sign {
        Sign::Life(sign) => (true, sign),
        Sign::Death(sign) => (false, sign),
    };
    let seconds = elapsed.as_secs_f64();
    if alive {
        let text = format!("the guest is up after {seconds:.1} s: {sign}");
        reporter.report(&Event::step("boot.alive", text));
    } else {
        let text = format!("the guest is not up after {seconds:.1} s: {sign}");
        reporter.report(&Event::warning("boot.dead", text));
        let tail = console::tail(&log, TAIL_LINES);
        let text = if tail.is_empty() {
            "the guest printed nothing on its serial console".to_owned()
        } else {
            format!("the end of the serial console:\n{tail}")
        };
        reporter.report(&Event::info("boot.console", text));
    }
    let console_log = options.console_log.clone();
    Ok(BootReport { alive, sign, elapsed, console_log, screenshot, backend })
}

/// Whether `text` can appear on one line without control characters.
fn is_one_line(text: &str) -> bool {
    !text.is_empty() && !text.chars().any(char::is_control)
}

fn read_domain(path: &Path) -> Result<Domain> {
    let mut text = String::new();
    // One byte more than is allowed, so that the parser refuses what is longer.
    File::open(path)
        .and_then(|file| file.take(LONGEST as u64 + 1).read_to_string(&mut text))
        .map_err(|error| {
            Error::new(ErrorKind::Input, format!("cannot read {}", path.display())).because(error)
        })?;
    Domain::parse(&text).map_err(|error| {
        Error::new(error.kind(), format!("{} cannot be used", path.display())).because(error)
    })
}

/// A slip on the command line must not cost a disk.
fn refuse_overwriting(options: &VerifyOptions, domain: &Domain) -> Result<()> {
    let guests = domain.disks.iter().map(|disk| disk.path.as_path()).chain([&*options.xml]);
    let guests: Vec<PathBuf> = guests.filter_map(|path| path.canonicalize().ok()).collect();
    for target in [&options.console_log, &options.screenshot].into_iter().flatten() {
        if target.canonicalize().is_ok_and(|target| guests.contains(&target)) {
            let target = target.display();
            let text = format!("{target} belongs to the guest and would be overwritten");
            return Err(Error::new(ErrorKind::Usage, text));
        }
    }
    Ok(())
}

fn cannot(what: &str, path: &Path, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Transient, format!("cannot {what} {}", path.display())).because(error)
}

/// The machine's memory in MiB.
fn memory_mib(options: &VerifyOptions, domain: &Domain) -> u64 {
    let own = domain.memory_kib.div_ceil(1 << 10);
    options.memory_mib.map_or(own.min(MOST_MEMORY_MIB), u64::from)
}

/// The firmware with variables of its own, if the guest boots by UEFI.
fn firmware(domain: &Domain, folder: &TempDir) -> Result<Option<firmware::Uefi>> {
    let crate::libvirt::Firmware::Uefi { secure_boot } = domain.firmware else {
        return Ok(None);
    };
    let found = firmware::find(Path::new("/"), secure_boot)?;
    let vars = folder.path().join("uefi-vars");
    let copied = std::fs::read(&found.vars).and_then(|bytes| std::fs::write(&vars, bytes));
    copied.map_err(|error| cannot("copy", &found.vars, error))?;
    Ok(Some(firmware::Uefi { vars, ..found }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Quiet;

    fn options(xml: &Path) -> VerifyOptions {
        VerifyOptions {
            xml: xml.to_owned(),
            limit: Duration::from_secs(1),
            expect: None,
            console_log: None,
            screenshot: None,
            backend: Preference::Tcg,
            memory_mib: None,
        }
    }

    #[test]
    fn what_cannot_be_booted_is_refused_before_anything_starts() {
        let folder = tempfile::tempdir().unwrap();
        let (xml, disk) = (folder.path().join("g.xml"), folder.path().join("disk"));
        let cancel = CancelToken::default();
        let kind =
            |options: &VerifyOptions| verify_boot(options, &Quiet, &cancel).unwrap_err().kind();
        assert_eq!(kind(&options(&xml)), ErrorKind::Input);
        for text in ["", "two\nlines", "\u{1b}[1m"] {
            let never = VerifyOptions { expect: Some(text.into()), ..options(&xml) };
            assert_eq!(kind(&never), ErrorKind::Usage, "{text:?}");
        }
        let mut domain = Domain::new("g", 1 << 20, 1);
        std::fs::write(&xml, domain.to_xml().unwrap()).unwrap();
        assert_eq!(kind(&options(&xml)), ErrorKind::Input);
        domain.disks.push(crate::libvirt::Disk {
            path: disk.clone(),
            format: "raw".into(),
            target: "vda".into(),
            bus: crate::libvirt::Bus::Virtio,
            boot_order: None,
        });
        std::fs::write(&xml, domain.to_xml().unwrap()).unwrap();
        std::fs::write(&disk, "precious").unwrap();
        let slip = VerifyOptions { console_log: Some(disk.clone()), ..options(&xml) };
        assert_eq!(kind(&slip), ErrorKind::Usage);
        assert_eq!(std::fs::read(&disk).unwrap(), b"precious");
    }

    /// A guest with an empty disk, or `None` with a visible reason if nothing can run it.
    fn empty_guest(folder: &Path) -> Option<VerifyOptions> {
        if tranship_appliance::qemu_program().is_none() {
            eprintln!("skipped: qemu-system-x86_64 is not installed");
            return None;
        }
        let disk = folder.join("disk,with a comma");
        std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        let mut domain = Domain::new("empty", 128 << 10, 1);
        domain.disks.push(crate::libvirt::Disk {
            path: disk,
            format: "raw".into(),
            target: "vda".into(),
            bus: crate::libvirt::Bus::Virtio,
            boot_order: Some(1),
        });
        domain.nics.push(crate::libvirt::Nic {
            mac: Some("52:54:00:00:00:01".into()),
            connection: crate::libvirt::Connection::Network("default".into()),
            model: "virtio".into(),
        });
        let xml = folder.join("empty.xml");
        std::fs::write(&xml, domain.to_xml().unwrap()).unwrap();
        Some(VerifyOptions { limit: Duration::from_mins(3), ..options(&xml) })
    }

    #[test]
    fn a_disk_without_a_boot_loader_is_noticed_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let Some(options) = empty_guest(folder.path()) else { return };
        let picture = folder.path().join("screen.png");
        let options = VerifyOptions { screenshot: Some(picture.clone()), ..options };
        let report = verify_boot(&options, &Quiet, &CancelToken::default()).unwrap();
        assert!(!report.alive && report.sign.contains("nothing to boot from"), "{report:?}");
        assert_eq!(report.backend, "qemu-tcg");
        assert_eq!(report.screenshot.as_ref(), Some(&picture));
        let decoder = png::Decoder::new(std::io::BufReader::new(File::open(picture).unwrap()));
        assert!(decoder.read_info().unwrap().info().width >= 640);
    }

    #[test]
    fn a_cancelled_boot_ends_at_once_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let Some(options) = empty_guest(folder.path()) else { return };
        let cancel = CancelToken::default();
        cancel.cancel();
        let error = verify_boot(&options, &Quiet, &cancel).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        let mut left: Vec<String> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["disk,with a comma", "empty.xml"]);
    }

    #[test]
    fn memory_is_the_guests_own_up_to_a_bound() {
        let all = options(Path::new("/x"));
        let memory = |mib: u64| memory_mib(&all, &Domain::new("g", mib << 10, 1));
        assert_eq!((memory(512), memory(4096), memory(65_536)), (512, 4096, 4096));
        let chosen = VerifyOptions { memory_mib: Some(8192), ..all.clone() };
        assert_eq!(memory_mib(&chosen, &Domain::new("g", 1 << 20, 1)), 8192);
    }

    #[test]
    fn reports_give_seconds() {
        let report = BootReport {
            alive: true,
            sign: "s".into(),
            elapsed: Duration::from_millis(1500),
            console_log: None,
            screenshot: None,
            backend: "qemu-tcg".into(),
        };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["elapsed"], serde_json::json!(1.5));
    }
}
