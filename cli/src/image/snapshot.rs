// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image snapshot`: the snapshots inside an image.

use super::console::Console;
use super::json::{Json, Object};
use super::sizes;
use super::source::{self, Opening};
use crate::args::image::SnapshotArgs;
use crate::failure::Failure;
use crate::stdout;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::fmt::Write;
use std::time::SystemTime;
use tranship_formats::{Format, Layer};
use tranship_qcow2::Snapshot;

/// A snapshot as it is shown.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    /// Its number, as text.
    id: String,
    /// What a person called it.
    name: String,
    /// Bytes of saved machine state.
    vm_state_size: u64,
    /// Seconds since 1970.
    date_seconds: u32,
    /// Nanoseconds more.
    date_nanoseconds: u32,
    /// How long the guest had been running.
    vm_clock_nanoseconds: u64,
    /// Instructions that the guest had executed, if they were counted.
    icount: Option<u64>,
}

impl From<Snapshot> for Shown {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            id: snapshot.id,
            name: snapshot.name,
            vm_state_size: snapshot.vm_state_size,
            date_seconds: snapshot.date_seconds,
            date_nanoseconds: snapshot.date_nanoseconds,
            vm_clock_nanoseconds: snapshot.vm_clock_nanoseconds,
            icount: snapshot.icount,
        }
    }
}

/// The snapshots in `layer`.
pub(crate) fn list(layer: &Layer) -> Result<Vec<Shown>, Failure> {
    if layer.format != Format::Qcow2 {
        return Ok(Vec::new());
    }
    let snapshots = tranship_qcow2::snapshots(&layer.file)?;
    Ok(snapshots.into_iter().map(Shown::from).collect())
}

const SECOND: u64 = 1_000_000_000;

/// The table of snapshots with its title.
pub(crate) fn table(snapshots: &[Shown]) -> String {
    let mut text = String::from("Snapshot list:\n");
    row(&mut text, ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        let clock = snapshot.vm_clock_nanoseconds;
        let seconds = clock / SECOND;
        let date = Timestamp::from_second(i64::from(snapshot.date_seconds))
            .map(|time| time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string())
            .unwrap_or_default();
        row(
            &mut text,
            [
                &snapshot.id,
                &snapshot.name,
                &sizes::display(snapshot.vm_state_size),
                &date,
                &format!(
                    "{:04}:{:02}:{:02}.{:03}",
                    seconds / 3600,
                    seconds / 60 % 60,
                    seconds % 60,
                    clock % SECOND / 1_000_000
                ),
                &snapshot.icount.map_or_else(|| "--".to_owned(), |count| count.to_string()),
            ],
        );
    }
    text
}

fn row(text: &mut String, [id, name, size, date, clock, icount]: [&str; 6]) {
    let _ = writeln!(text, "{id:<7} {name:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}");
}

/// The facts about a snapshot for programs.
pub(crate) fn json(snapshot: &Shown) -> Json {
    let mut object = Object::default();
    object
        .set("id", snapshot.id.as_str())
        .set("name", snapshot.name.as_str())
        .set("vm-state-size", snapshot.vm_state_size)
        .set("date-sec", snapshot.date_seconds)
        .set("date-nsec", snapshot.date_nanoseconds)
        .set("vm-clock-sec", snapshot.vm_clock_nanoseconds / SECOND)
        .set("vm-clock-nsec", snapshot.vm_clock_nanoseconds % SECOND)
        .set_some("icount", snapshot.icount);
    object.into()
}

/// What is to be done with snapshots.
enum Operation<'a> {
    List,
    Create(&'a str),
    Apply(&'a str),
    Delete(&'a str),
}

/// Lists or changes the snapshots.
pub(crate) fn run(args: &SnapshotArgs, console: Console) -> Result<u8, Failure> {
    let operations: Vec<Operation<'_>> = [
        args.list.then_some(Operation::List),
        args.create.as_deref().map(Operation::Create),
        args.apply.as_deref().map(Operation::Apply),
        args.delete.as_deref().map(Operation::Delete),
    ]
    .into_iter()
    .flatten()
    .collect();
    let operation = match operations.as_slice() {
        [] => &Operation::List,
        [operation] => operation,
        _ => {
            let message = "Cannot mix '-l', '-a', '-c', '-d'";
            return Err(source::usage(console, "snapshot", message));
        }
    };
    let name = source::one(&args.names, "snapshot", console)?;
    let opening = Opening {
        writable: !matches!(operation, Operation::List),
        force_share: args.force_share,
        ..Opening::reading(&args.naming, args.format.format.as_deref())
    };
    let source = opening.open_file(name, console)?;
    let Some(layer) = source.opened.layers.first() else { return Ok(0) };
    let (doing, name) = match operation {
        Operation::List => {
            let snapshots = list(layer)?;
            if !snapshots.is_empty() {
                stdout::print(&table(&snapshots))?;
            }
            return Ok(0);
        }
        Operation::Create(name) => ("create", name),
        Operation::Apply(name) => ("apply", name),
        Operation::Delete(name) => ("delete", name),
    };
    change(layer, operation)
        .map_err(|failure| failure.within(format!("Could not {doing} snapshot '{name}'")))?;
    Ok(0)
}

fn change(layer: &Layer, operation: &Operation<'_>) -> Result<(), Failure> {
    let storage = match (layer.format, &layer.storage) {
        (Format::Qcow2, Some(storage)) => &**storage,
        (format, _) => {
            return Err(Failure::usage(format!("images of format {format} have no snapshots")));
        }
    };
    match operation {
        Operation::List => {}
        Operation::Create(name) => {
            tranship_qcow2::create_snapshot(storage, name, SystemTime::now())?;
        }
        Operation::Apply(wanted) => tranship_qcow2::apply_snapshot(storage, wanted)?,
        Operation::Delete(wanted) => {
            // By name alone: a name may look like the identifier of another one.
            let snapshots = tranship_qcow2::snapshots(&layer.file)?;
            let found = snapshots.iter().find(|snapshot| snapshot.name == *wanted);
            let found = found.ok_or_else(|| Failure::usage("snapshot not found"))?;
            tranship_qcow2::delete_snapshot(storage, &found.id)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_qemu_imgs_columns() {
        let snapshot = Shown {
            id: "1".to_owned(),
            name: "one".to_owned(),
            vm_state_size: 0,
            date_seconds: 0,
            date_nanoseconds: 5,
            vm_clock_nanoseconds: 3_723_004_000_000,
            icount: None,
        };
        let text = table(std::slice::from_ref(&snapshot));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "Snapshot list:");
        assert_eq!(
            lines[1],
            "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
        );
        let row = lines[2];
        assert!(row.starts_with("1       one                   0 B 19"), "{row}");
        assert!(row.ends_with("  0001:02:03.004         --"), "{row}");
        assert_eq!(row.len(), lines[1].len());
        assert_eq!(
            json(&snapshot).line(),
            r#"{"vm-clock-nsec": 4000000, "name": "one", "date-sec": 0, "date-nsec": 5, "vm-clock-sec": 3723, "id": "1", "vm-state-size": 0}"#
        );
    }
}
