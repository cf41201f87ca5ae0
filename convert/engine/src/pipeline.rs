// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The way of a conversion: read, protect, inspect, plan, convert, trim, copy, describe.

use crate::copying::copy_disks;
use crate::disks::{from_block, from_source, open_source, overlay, overlay_name};
use crate::files::GuestFiles;
use crate::survey::{Survey, from_appliance, from_inspection, survey};
use crate::verification::beside_verification;
use crate::witness::{self, Witness};
use crate::work::{Journal, Phase, TargetDisk, Work, sync_folder, write_atomically};
use crate::{
    Error, ErrorKind, Event, InitramfsMode, Input, Reporter, Request, Result, TargetFormat,
    definition, machine,
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tranship_appliance::{Boot, CancelToken, Drive, Guest};
use tranship_block::BlockDevice;
use tranship_linux::{Blocker, InitramfsMethod, Options, Plan, apply};
use tranship_protocol::disk_name;
use tranship_qcow2::Qcow2;
use tranship_source::{Location, Source};

/// What a conversion did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the guest.
    pub name: String,
    /// Whether an earlier run had done it all.
    pub already_done: bool,
    /// Whether this run went on where an earlier one was interrupted.
    pub resumed: bool,
    /// The definition for libvirt.
    pub xml: PathBuf,
    /// The disks.
    pub disks: Vec<PathBuf>,
    /// What was changed in the guest; absent if an earlier run did it.
    pub plan: Option<Plan>,
    /// Seconds that each step took, in order.
    pub seconds: Vec<(String, f64)>,
}

/// What a conversion would do.
#[derive(Clone, Debug, Serialize)]
pub struct DryRun {
    /// Name of the guest.
    pub name: String,
    /// What kind of operating system it is.
    pub operating_system: String,
    /// Where the root filesystem is.
    pub root: String,
    /// Every change, if nothing stands in the way.
    pub plan: Option<Plan>,
    /// Everything that stands in the way.
    pub blockers: Vec<Blocker>,
    /// Files that would be written.
    pub outputs: Vec<PathBuf>,
    /// Bytes that would be read from the source's disks, at most.
    pub bytes_to_copy: u64,
}

impl DryRun {
    /// The dry run in words.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "guest {}: {} on {}", self.name, self.operating_system, self.root);
        if let Some(plan) = &self.plan {
            let _ = write!(text, "{plan}");
        }
        for blocker in &self.blockers {
            let _ = writeln!(text, "blocked: {blocker}");
        }
        if self.blockers.is_empty() {
            for output in &self.outputs {
                let _ = writeln!(text, "write {}", output.display());
            }
            let mib = self.bytes_to_copy >> 20;
            let _ = writeln!(text, "at most {mib} MiB would be copied");
        }
        text
    }
}

/// Reads what the source says of the guest, without looking into its disks.
///
/// # Errors
///
/// [`ErrorKind::Input`] if it contradicts itself or is of an unknown kind.
pub fn read_source(input: &Input) -> Result<Source> {
    let (read, path): (_, &Path) = match input {
        Input::Ova(path) => (tranship_source::open_ova(path), path),
        Input::Vmx(path) => (tranship_source::open_vmx(path), path),
        Input::Disks { paths, format } => (
            tranship_source::open_disks(paths, format.as_deref()),
            paths.first().map_or_else(|| Path::new(""), PathBuf::as_path),
        ),
    };
    read.map_err(|error| from_source(format!("reading {}", path.display()), error))
}

/// Times the steps of a run.
pub(crate) struct Steps<'a> {
    reporter: &'a dyn Reporter,
    seconds: Vec<(String, f64)>,
}

impl<'a> Steps<'a> {
    fn new(reporter: &'a dyn Reporter) -> Self {
        Self { reporter, seconds: Vec::new() }
    }

    fn run<T>(
        &mut self,
        name: &'static str,
        message: impl Into<String>,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.reporter.report(&Event::step(name, message));
        let begun = Instant::now();
        let outcome = work();
        self.seconds.push((name.to_owned(), begun.elapsed().as_secs_f64()));
        outcome
    }
}

fn check_cancelled(cancel: &CancelToken) -> Result<()> {
    if cancel.is_cancelled() {
        return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
    }
    Ok(())
}

/// Boots the appliance on `disks`; [`witness::judge`] has to see the outcome of the work.
fn launch(
    request: &Request,
    disks: &[Arc<Qcow2>],
    reporter: &dyn Reporter,
    cancel: &CancelToken,
) -> Result<(Guest, Vec<Arc<Witness>>)> {
    let image = tranship_appliance_image::build(&request.image, &|event| {
        reporter
            .report(&Event::info("appliance.build", format!("building the appliance: {event}")));
    })
    .map_err(|error| {
        let remedy = error.what_helps().map(str::to_owned);
        let outer = Error::new(ErrorKind::Blocked, "the appliance cannot be built").because(error);
        match remedy {
            Some(remedy) => outer.with_remedy(remedy),
            None => outer,
        }
    })?;
    let mut guest = Guest::new(request.appliance.clone()).with_cancel(cancel.clone());
    let mut witnesses = Vec::new();
    for (index, disk) in disks.iter().enumerate() {
        let device = Arc::new(Witness::new(Arc::clone(disk) as _, disk_name(index)));
        witnesses.push(Arc::clone(&device));
        // If the machine dies the overlay is thrown away, so its flushes need not wait for
        // the host's disk.
        guest
            .add_drive(Drive { device, read_only: false, durable: false, image: None })
            .map_err(|error| from_appliance("adding a disk".to_owned(), error))?;
    }
    let boot = Boot { kernel: image.kernel, initramfs: image.initramfs, tools: image.tools };
    guest
        .launch(&boot)
        .map_err(|error| from_appliance("starting the appliance".to_owned(), error))?;
    if let Ok((backend, reason, times)) = guest.launch_report() {
        let text =
            format!("the appliance is up after {:.1} s ({reason})", times.boot.as_secs_f64());
        reporter.report(&Event::info("appliance.started", text).with("backend", backend));
    }
    Ok((guest, witnesses))
}

/// Inspects and plans on a launched guest.
fn plan(
    guest: &Guest,
    source: &Source,
    request: &Request,
    reporter: &dyn Reporter,
) -> Result<(Survey, std::result::Result<Plan, Vec<Blocker>>)> {
    let survey = survey(guest, &request.root, &request.keys, reporter)?;
    let machine = machine::facts(source, &survey);
    let options = Options {
        initramfs: match request.initramfs {
            InitramfsMode::Append => InitramfsMethod::Append,
            InitramfsMode::Guest => InitramfsMethod::Guest,
        },
        ..Options::default()
    };
    let planned = match tranship_linux::plan(&survey.facts, &GuestFiles(guest), &machine, &options)
    {
        // As in the survey: what is damaged may not be readable.
        Err(_) if !survey.damage.is_empty() => return Err(Error::blocked(survey.damage)),
        planned => planned.map_err(|error| from_inspection("planning the conversion", error))?,
    };
    let mut further = survey.damage.clone();
    further.extend(foreign_architecture(&survey));
    let planned = match planned {
        Ok(plan) if further.is_empty() => Ok(plan),
        Ok(_) => Err(further),
        Err(mut blockers) => {
            blockers.extend(further);
            Err(blockers)
        }
    };
    Ok((survey, planned))
}

/// The definition and the boot test are for x86 machines only.
fn foreign_architecture(survey: &Survey) -> Option<Blocker> {
    let arch = survey.facts.os.arch.as_deref()?;
    let known = ["x86_64", "i386", "i486", "i586", "i686"].contains(&arch);
    (!known).then(|| Blocker {
        code: "foreign-architecture",
        what: format!("the guest's programs are for {arch}"),
        remedy: "only guests for x86 can be converted so far".to_owned(),
    })
}

fn describe_system(survey: &Survey) -> String {
    let os = &survey.facts.os;
    let name = os.product_name.clone().unwrap_or_else(|| os.distro.clone());
    match &os.hostname {
        Some(host) => format!("{name} ({host})"),
        None => name,
    }
}

/// Name of the guest in the target: as asked for or the source's, fit for a file name.
fn guest_name(request: &Request, source: &Source) -> Result<String> {
    let name = request.name.as_deref().unwrap_or(&source.name).replace('/', "_");
    if name.is_empty() || name == "." || name == ".." || name.chars().any(char::is_control) {
        return Err(Error::new(ErrorKind::Usage, format!("{name:?} is no name for a guest"))
            .with_remedy("give one with -on NAME"));
    }
    Ok(name)
}

/// Names of the target disks: `NAME-sda`, `NAME-sdb`, …
fn target_names(name: &str, count: usize) -> Vec<String> {
    (0..count).map(|index| format!("{name}-{}", disk_name(index))).collect()
}

/// Works out what a conversion would do. Nothing is written but a temporary overlay.
///
/// # Errors
///
/// As [`convert`], but what stands in the way is part of the answer.
pub fn dry_run(request: &Request, reporter: &dyn Reporter, cancel: &CancelToken) -> Result<DryRun> {
    work_out(request, reporter, cancel).map_err(|error| interrupted_if(cancel, error))
}

fn work_out(request: &Request, reporter: &dyn Reporter, cancel: &CancelToken) -> Result<DryRun> {
    let mut steps = Steps::new(reporter);
    let source = steps.run("source.read", "reading the source", || read_source(&request.input))?;
    warn_of_source(&source, reporter);
    let name = guest_name(request, &source)?;
    reporter.report(&Event::info("run.guest", format!("guest {name}")).with("guest", &name));
    let bases = open_source(&source, &request.meter)?;
    let folder = tempfile::tempdir().map_err(|error| {
        Error::new(ErrorKind::Transient, "making a temporary folder").because(error)
    })?;
    let overlays = bases
        .iter()
        .enumerate()
        .map(|(index, base)| {
            overlay(&folder.path().join(overlay_name(index)), Arc::clone(base), true)
        })
        .collect::<Result<Vec<_>>>()?;
    let (mut guest, witnesses) = steps.run("appliance.start", "starting the appliance", || {
        launch(request, &overlays, reporter, cancel)
    })?;
    let outcome =
        steps.run("inspect", "inspecting the guest", || plan(&guest, &source, request, reporter));
    let (survey, planned) = witness::judge(outcome, &witnesses)?;
    guest.shutdown().map_err(|error| from_appliance("ending the appliance".to_owned(), error))?;
    let (plan, blockers) = match planned {
        Ok(plan) => (Some(plan), Vec::new()),
        Err(blockers) => (None, blockers),
    };
    let mut bytes_to_copy: u64 = 0;
    for disk in &bases {
        bytes_to_copy = bytes_to_copy.saturating_add(crate::disks::data_bytes(disk)?);
    }
    let mut outputs: Vec<PathBuf> = target_names(&name, bases.len())
        .into_iter()
        .map(|disk| request.folder.join(disk))
        .collect();
    outputs.push(request.folder.join(format!("{name}.xml")));
    Ok(DryRun {
        name,
        operating_system: describe_system(&survey),
        root: survey.root,
        plan,
        blockers,
        outputs,
        bytes_to_copy,
    })
}

fn warn_of_source(source: &Source, reporter: &dyn Reporter) {
    for warning in &source.warnings {
        reporter.report(&Event::warning("source.warning", warning.clone()));
    }
}

/// Everything that makes two runs the same: the request, and size and time of the inputs.
fn fingerprint(request: &Request, source: &Source, name: &str) -> Result<String> {
    let mut text = format!(
        "{:?}\n{}\n{:?} {}\n{:?}\n{:?}\n{}\n{:?}\n{name}\n",
        request.input,
        request.folder.display(),
        request.format,
        request.preallocated,
        request.root,
        request.networks,
        request.trim,
        request.initramfs
    );
    for disk in &source.disks {
        let path = match &disk.location {
            Location::File { path } => path,
            Location::Member { archive, .. } => archive,
            Location::Export { .. } => {
                let _ = writeln!(
                    text,
                    "{}",
                    start_of(&*disk.open().map_err(|error| {
                        from_source(format!("opening disk {}", disk.name), error)
                    })?)?
                );
                continue;
            }
        };
        if let Ok(metadata) = std::fs::metadata(path) {
            let _ = writeln!(text, "{} {:?}", metadata.len(), metadata.modified().ok());
        }
    }
    Ok(hex(&Sha256::digest(text)))
}

/// Size and beginning of a disk that has no time of its own. Partition tables and the first
/// filesystem are there, which notes when it was mounted and written.
fn start_of(disk: &dyn BlockDevice) -> Result<String> {
    let mut start = vec![0; usize::try_from(disk.size().min(4 << 20)).unwrap_or(0)];
    disk.read_at(&mut start, 0)
        .map_err(|error| from_block("reading the start of the disk".to_owned(), error, true))?;
    Ok(format!("{} {}", disk.size(), hex(&Sha256::digest(start))))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Converts a guest.
///
/// A second run with the same request does nothing; after an interruption it goes on where
/// the first one stopped. The source is never written to, and no result has its final name
/// before it is complete.
///
/// # Errors
///
/// [`ErrorKind`] says what an orchestrator should do about it.
pub fn convert(request: &Request, reporter: &dyn Reporter, cancel: &CancelToken) -> Result<Report> {
    carry_out(request, reporter, cancel).map_err(|error| interrupted_if(cancel, error))
}

/// Whatever fails after a cancellation fails because of it.
fn interrupted_if(cancel: &CancelToken, error: Error) -> Error {
    if cancel.is_cancelled() && error.kind() != ErrorKind::Interrupted {
        return Error::new(ErrorKind::Interrupted, "interrupted").because(error);
    }
    error
}

fn carry_out(request: &Request, reporter: &dyn Reporter, cancel: &CancelToken) -> Result<Report> {
    check_allocation(request)?;
    let mut steps = Steps::new(reporter);
    let source = steps.run("source.read", "reading the source", || read_source(&request.input))?;
    let name = guest_name(request, &source)?;
    reporter.report(&Event::info("run.guest", format!("guest {name}")).with("guest", &name));
    let fingerprint = fingerprint(request, &source, &name)?;
    let names = target_names(&name, source.disks.len());
    let xml = request.folder.join(format!("{name}.xml"));
    let disks: Vec<PathBuf> = names.iter().map(|disk| request.folder.join(disk)).collect();
    let work = Work::open(&request.folder, &name)?;

    let earlier = work.journal().filter(|journal| journal.fingerprint == fingerprint);
    let mut report = Report {
        name: name.clone(),
        already_done: false,
        resumed: false,
        xml: xml.clone(),
        disks: disks.clone(),
        plan: None,
        seconds: Vec::new(),
    };
    if let Some(journal) = &earlier
        && journal.phase == Phase::Done
        && !request.force
        && xml.is_file()
        && disks.iter().all(|disk| disk.is_file())
    {
        reporter.report(&Event::info("run.already_done", "an earlier run has done all of this"));
        report.already_done = true;
        report.seconds = steps.seconds;
        return Ok(report);
    }
    let resumable = earlier.filter(|journal| journal.phase == Phase::Copying && !request.force);
    if resumable.is_none() {
        check_results_are_ours(&work, request, &xml, &disks)?;
    }
    warn_of_source(&source, reporter);

    let bases = open_source(&source, &request.meter)?;
    let (mut journal, overlays) = if let Some(journal) = resumable {
        report.resumed = true;
        reporter
            .report(&Event::info("run.resumed", "going on where an earlier run was interrupted"));
        let overlays = overlays(&work, &bases, false)?;
        (journal, overlays)
    } else {
        work.clear()?;
        let mut journal = Journal::new(fingerprint);
        work.store(&journal)?;
        let overlays = overlays(&work, &bases, true)?;
        let (plan, text) = beside_verification(request, &source, reporter, cancel, |cancel| {
            change_guest(request, &source, &name, &overlays, &disks, &mut steps, cancel)
        })?;
        report.plan = Some(plan);
        for overlay in &overlays {
            overlay
                .flush()
                .map_err(|error| from_block("writing the overlay out".to_owned(), error, false))?;
        }
        journal.phase = Phase::Copying;
        journal.xml = text;
        journal.disks = names
            .iter()
            .zip(&bases)
            .map(|(name, base)| TargetDisk {
                name: name.clone(),
                size: base.size(),
                copied: 0,
                complete: false,
            })
            .collect();
        work.store(&journal)?;
        (journal, overlays)
    };
    check_cancelled(cancel)?;

    steps.run("copy", "copying the disks", || {
        copy_disks(request, &work, &mut journal, &overlays, reporter, cancel)
    })?;
    drop(overlays);
    steps.run("metadata", "writing the definition for libvirt", || {
        for (part, disk) in names.iter().zip(&disks) {
            let part = work.file(&crate::disks::part_name(part));
            // A run that was killed here has renamed some of them already.
            if part.exists() {
                std::fs::rename(&part, disk).map_err(|error| {
                    let text = format!("renaming {}", part.display());
                    Error::new(ErrorKind::Transient, text).because(error)
                })?;
            }
        }
        sync_folder(&xml)?;
        write_atomically(&xml, journal.xml.as_bytes())?;
        journal.phase = Phase::Done;
        work.store(&journal)?;
        work.clear()
    })?;
    report.seconds = steps.seconds;
    reporter.report(
        &Event::step("run.converted", format!("the guest is in {}", xml.display()))
            .with("xml", xml.display()),
    );
    Ok(report)
}

fn check_allocation(request: &Request) -> Result<()> {
    if request.preallocated && request.format != TargetFormat::Raw {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{} disks cannot be preallocated yet", request.format.name()),
        )
        .with_remedy("leave -oa away, or take raw disks with -of raw"));
    }
    Ok(())
}

/// Files under the final names that this program did not make are not replaced unasked.
fn check_results_are_ours(
    work: &Work,
    request: &Request,
    xml: &Path,
    disks: &[PathBuf],
) -> Result<()> {
    if request.force {
        return Ok(());
    }
    let Some(existing) = disks.iter().map(PathBuf::as_path).chain([xml]).find(|path| path.exists())
    else {
        return Ok(());
    };
    let why = match work.journal() {
        Some(journal) if journal.phase == Phase::Done => {
            "is the result of another conversion (other inputs or options)"
        }
        Some(_) => "exists beside an unfinished conversion with other inputs or options",
        None => "exists and does not come from a conversion into this folder",
    };
    Err(Error::new(ErrorKind::Usage, format!("{}: {why}", existing.display()))
        .with_remedy("replace it with --force, or give another name with -on or folder with -os"))
}

fn overlays(work: &Work, bases: &[Arc<dyn BlockDevice>], fresh: bool) -> Result<Vec<Arc<Qcow2>>> {
    bases
        .iter()
        .enumerate()
        .map(|(index, base)| overlay(&work.file(&overlay_name(index)), Arc::clone(base), fresh))
        .collect()
}

/// The part that runs in the appliance; returns what was done and the target's definition.
fn change_guest(
    request: &Request,
    source: &Source,
    name: &str,
    overlays: &[Arc<Qcow2>],
    disks: &[PathBuf],
    steps: &mut Steps<'_>,
    cancel: &CancelToken,
) -> Result<(Plan, String)> {
    let reporter = steps.reporter;
    let (mut guest, witnesses) = steps.run("appliance.start", "starting the appliance", || {
        launch(request, overlays, reporter, cancel)
    })?;
    let outcome = (|| {
        let (survey, planned) = steps
            .run("inspect", "inspecting the guest", || plan(&guest, source, request, reporter))?;
        let text = format!("converting {}", describe_system(&survey));
        let plan = planned.map_err(Error::blocked)?;
        for warning in &plan.warnings {
            let event = Event::warning("plan.warning", warning.what.clone());
            reporter.report(&event.with("code", warning.code));
        }
        check_cancelled(cancel)?;
        let count = u64::try_from(plan.steps.len()).unwrap_or(u64::MAX);
        steps.run("convert", text, || {
            apply(&plan, &GuestFiles(&guest), &|number, step| {
                let done = u64::try_from(number).unwrap_or(u64::MAX);
                let event = Event::info("convert.step", step.to_string());
                reporter.report(&event.at(done, count));
            })
            .map_err(|error| from_inspection("converting the guest", error))
        })?;
        check_cancelled(cancel)?;
        if request.trim {
            steps.run("trim", "leaving out unused blocks", || trim(&guest, &survey, reporter))?;
        }
        let xml = definition::render(request, source, &survey, name, disks)?;
        Ok((plan, xml))
    })();
    if outcome.is_err() {
        tracing::debug!(console = %guest.console(), "the appliance's console");
    }
    let closed = steps.run("appliance.end", "writing the changes out", || {
        guest.shutdown().map_err(|error| from_appliance("ending the appliance".to_owned(), error))
    });
    let outcome = outcome.and_then(|done| closed.map(|()| done));
    witness::judge(outcome, &witnesses)
}

/// Discards what mounted filesystems do not use; one that cannot is only mentioned.
fn trim(guest: &Guest, survey: &Survey, reporter: &dyn Reporter) -> Result<()> {
    for (device, point) in &survey.mounted {
        match guest.trim(point) {
            Ok(bytes) => {
                let text = format!("{device}: {} MiB are unused", bytes >> 20);
                reporter.report(&Event::info("trim.done", text).with("bytes", bytes));
            }
            Err(error) if error.kind() == tranship_appliance::ErrorKind::Call => {
                reporter.report(&Event::info("trim.skipped", error.to_string()));
            }
            Err(error) => return Err(from_appliance("trimming".to_owned(), error)),
        }
    }
    Ok(())
}
