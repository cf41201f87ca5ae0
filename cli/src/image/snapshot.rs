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

/// A snapshot as it is shown.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    /// Its number, as text.
    pub(crate) id: String,
    /// What a person called it.
    pub(crate) name: String,
    /// Bytes of saved machine state.
    pub(crate) vm_state_size: u64,
    /// Seconds since 1970.
    pub(crate) date_seconds: u32,
    /// Nanoseconds more.
    pub(crate) date_nanoseconds: u32,
    /// How long the guest had been running.
    pub(crate) vm_clock_nanoseconds: u64,
    /// Instructions that the guest had executed, if they were counted.
    pub(crate) icount: Option<u64>,
}

const SECOND: u64 = 1_000_000_000;

/// The table of snapshots with its title.
pub(crate) fn table(snapshots: &[Snapshot]) -> String {
    let mut text = String::from("Snapshot list:\n");
    row(&mut text, ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        let clock = snapshot.vm_clock_nanoseconds;
        let seconds = clock / SECOND;
        let date = Timestamp::from_second(i64::from(snapshot.date_seconds))
            .map(|time| time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string())
            .unwrap_or_default();
        row(&mut text, [
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
        ]);
    }
    text
}

fn row(text: &mut String, [id, name, size, date, clock, icount]: [&str; 6]) {
    let _ = writeln!(text, "{id:<7} {name:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}");
}

/// The facts about a snapshot for programs.
pub(crate) fn json(snapshot: &Snapshot) -> Json {
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
