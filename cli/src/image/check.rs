// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image check`: contradictions in an image's metadata, and mending them.

use super::console::Console;
use super::json::{Json, Object};
use super::metering::Metering;
use super::source::{self, Opening, Output};
use crate::args::image::{CheckArgs, Naming};
use crate::failure::Failure;
use crate::stdout;
use std::fmt::Write;
use std::sync::Arc;
use tranship_block::{CheckReport, DiskMeter, Repair, Request, Storage};
use tranship_formats::{FolderGate, Format, Layer};
use tranship_raw::{Access, RawFile};
use tranship_vmdk::ExtentFiles;

/// Exit code for formats in which there is nothing to check.
const NO_CHECKS: u8 = 63;

/// Looks for contradictions.
pub(crate) fn run(args: &CheckArgs, console: Console, metering: &Metering) -> Result<u8, Failure> {
    let output = source::output(args.output.output.as_deref(), "check", console)?;
    let repair = match args.repair.as_deref() {
        None => Repair::Nothing,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            let message = format!("--repair (-r) expects 'leaks' or 'all' not '{other}'");
            return Err(source::usage(console, "check", message));
        }
    };
    let name = source::one(&args.names, "check", console)?;
    let direct = source::cache(args.cache.as_deref(), "source ")?;
    let opening = Opening {
        writable: repair != Repair::Nothing,
        force_share: args.force_share,
        direct,
        ..Opening::reading(&args.naming, args.format.format.as_deref()).counted(metering, "image")
    };
    let source = opening.open_file(name, console)?;
    let format = source.opened.format;
    let check = |repair| {
        let report = source
            .opened
            .layers
            .first()
            .map_or(Ok(None), |layer| examine(layer, &args.naming, &source.meter, repair));
        let report = report.map_err(|failure: Failure| failure.within("Check failed"))?;
        let report = report.ok_or_else(|| {
            Failure::usage("This image format does not support checks").exiting_with(NO_CHECKS)
        })?;
        report.details.iter().for_each(|detail| stdout::complain(detail));
        Ok::<_, Failure>(report)
    };
    let mut report = check(repair)?;
    let fixed = (report.corruptions_fixed, report.leaks_fixed);
    if fixed != (0, 0) {
        if output == Output::Human && !args.quiet {
            stdout::print(&format!(
                "The following inconsistencies were found and repaired:\n\n    \
                 {} leaked clusters\n    {} corruptions\n\n\
                 Double checking the fixed image now...\n",
                fixed.1, fixed.0
            ))?;
        }
        report = check(Repair::Nothing)?;
        (report.corruptions_fixed, report.leaks_fixed) = fixed;
    }
    if !args.quiet {
        let text = match output {
            Output::Human => human(&report, format),
            Output::Json => json(&report, &name.to_string_lossy(), format).pretty(),
        };
        stdout::print(&text)?;
    }
    Ok(match &report {
        report if report.check_errors > 0 => 1,
        report if report.corruptions > 0 => 2,
        report if report.leaks > 0 => 3,
        _ => 0,
    })
}

/// Checks the bytes in `layer`, whatever the disk in them is like; `None` if the format has no
/// checks.
fn examine(
    layer: &Layer,
    naming: &Naming,
    meter: &DiskMeter,
    repair: Repair,
) -> Result<Option<CheckReport>, Failure> {
    let storage: Arc<dyn Storage> = match &layer.storage {
        Some(storage) => Arc::clone(storage),
        // Whoever only looks has a file as well: nothing is written without repairs.
        None if layer.path.exists() => {
            counted(meter, RawFile::open(&layer.path, Access::ReadOnly)?)
        }
        None if layer.format == Format::Qcow2 => {
            return Ok(Some(tranship_qcow2::check_read_only(&layer.file)?));
        }
        None => return Ok(None),
    };
    let report = match layer.format {
        // As qemu-img says it.
        Format::Vdi if repair != Repair::Nothing => return Ok(None),
        Format::Qed | Format::Parallels if repair != Repair::Nothing => {
            return Err(Failure::usage(format!(
                "images of format {} can be checked, but not repaired",
                layer.format
            )));
        }
        Format::Qcow2 => tranship_qcow2::check(&*storage, repair),
        Format::Vhdx => tranship_vhdx::check(&*storage, repair),
        Format::Vpc => tranship_vpc::check(&*storage, repair),
        Format::Vmdk => {
            let gate = FolderGate::beside(&layer.path, &naming.allow_path);
            let files = Parts { gate, meter: meter.clone() };
            tranship_vmdk::check(&*storage, &files, repair)
        }
        Format::Parallels if layer.path.extension().is_some_and(|ending| ending == "xml") => {
            return Err(Failure::usage("the images of a disk of Parallels are checked one by one"));
        }
        format => return Ok(tranship_formats::check_read_only(format, &layer.file)?),
    };
    Ok(Some(report?))
}

/// A file that is opened here, as the disk's and as itself.
fn counted(meter: &DiskMeter, file: RawFile) -> Arc<dyn Storage> {
    let own = meter.file(file.path());
    meter.storage(own.storage(Arc::new(file)))
}

/// The files of a VMDK besides its first one.
#[derive(Debug)]
struct Parts {
    gate: FolderGate,
    meter: DiskMeter,
}

impl ExtentFiles for Parts {
    fn open(&self, name: &str, writable: bool) -> tranship_block::Result<Arc<dyn Storage>> {
        let request = Request { name, role: "VMDK extent", writable };
        Ok(counted(&self.meter, self.gate.open_file(request)?))
    }

    fn create(&self, name: &str, _size: u64) -> tranship_block::Result<Arc<dyn Storage>> {
        Err(tranship_block::Error::usage(format!("checking makes no file {name:?}")))
    }
}

/// Whether qemu-img counts the clusters of this format.
fn counts_clusters(format: Format) -> bool {
    matches!(format, Format::Qcow2 | Format::Qed | Format::Parallels)
}

fn human(report: &CheckReport, format: Format) -> String {
    let mut text = String::new();
    if report.is_clean() {
        text.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        let _ = writeln!(
            text,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to \
             the image may corrupt it.",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        let _ = writeln!(
            text,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but \
             no harm to data.",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        let _ = writeln!(
            text,
            "\n{} internal errors have occurred during the check.",
            report.check_errors
        );
    }
    if !counts_clusters(format) {
        return text;
    }
    let (allocated, total) = (report.allocated_clusters, report.total_clusters);
    if total != 0 && allocated != 0 {
        let _ = writeln!(
            text,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated)
        );
    }
    if report.image_end_offset > 0 {
        let _ = writeln!(text, "Image end offset: {}", report.image_end_offset);
    }
    text
}

#[allow(clippy::cast_precision_loss, reason = "two decimals are shown")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

fn json(report: &CheckReport, name: &str, format: Format) -> Json {
    let mut object = Object::default();
    object
        .set("filename", name)
        .set("format", format.name())
        .set("check-errors", report.check_errors);
    let counts = counts_clusters(format);
    for (key, count) in [
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("image-end-offset", if counts { report.image_end_offset } else { 0 }),
        ("total-clusters", if counts { report.total_clusters } else { 0 }),
        ("allocated-clusters", if counts { report.allocated_clusters } else { 0 }),
        ("fragmented-clusters", if counts { report.fragmented_clusters } else { 0 }),
        ("compressed-clusters", if counts { report.compressed_clusters } else { 0 }),
    ] {
        object.set_some(key, (count != 0).then_some(count));
    }
    object.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> CheckReport {
        CheckReport {
            corruptions: 1,
            leaks: 2,
            total_clusters: 160,
            allocated_clusters: 16,
            fragmented_clusters: 3,
            image_end_offset: 2_686_976,
            ..CheckReport::default()
        }
    }

    #[test]
    fn all_that_is_wrong_is_told() {
        assert_eq!(
            human(&report(), Format::Qcow2),
            "\n1 errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n\
             \n2 leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n\
             16/160 = 10.00% allocated, 18.75% fragmented, 0.00% compressed clusters\n\
             Image end offset: 2686976\n"
        );
        let clean = CheckReport { corruptions: 0, leaks: 0, ..report() };
        assert_eq!(human(&clean, Format::Vmdk), "No errors were found on the image.\n");
    }

    #[test]
    fn programs_get_what_is_not_zero() {
        assert_eq!(
            json(&report(), "a.q", Format::Qcow2).line(),
            r#"{"image-end-offset": 2686976, "total-clusters": 160, "corruptions": 1, "check-errors": 0, "leaks": 2, "allocated-clusters": 16, "filename": "a.q", "format": "qcow2", "fragmented-clusters": 3}"#
        );
    }
}
