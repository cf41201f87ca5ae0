// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `appliance list` and `dump`: appliances that run, and their memory.

use crate::args::{DumpArgs, ListArgs};
use crate::failure::Failure;
use crate::{logging, stdout};
use indicatif::HumanBytes;
use serde_json::json;
use std::fmt::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tranship_appliance::{Appliance, Settings};
use tranship_convert::ErrorKind;

/// Tells which appliances of this user run.
pub(super) fn list(options: &ListArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let running = running()?;
    if options.json {
        let appliances: Vec<_> = running
            .iter()
            .map(|Appliance { status, .. }| {
                let disks: Vec<_> = status
                    .disks
                    .iter()
                    .map(|(name, read_only)| json!({"name": name, "read_only": read_only}))
                    .collect();
                json!({
                    "pid": status.pid,
                    "command": status.command,
                    "backend": status.backend,
                    "since": status.since,
                    "disks": disks,
                })
            })
            .collect();
        stdout::json(&json!({ "appliances": appliances }))?;
    } else if running.is_empty() {
        stdout::print("no appliance is running\n")?;
    } else {
        stdout::print(&table(&running))?;
    }
    Ok(0)
}

/// Writes the memory of a running appliance to a new file.
pub(super) fn dump(options: &DumpArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let running = running()?;
    let appliance = choose(&running, options.pid)?;
    let path = options.file.as_path();
    // What the appliance knows of the guest is nobody else's business.
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| Failure::io(&format!("creating {}", path.display()), &error))?;
    stdout::complain(&format!(
        "dumping the memory of process {}'s appliance ({}), which stands still meanwhile",
        appliance.status.pid, appliance.status.backend
    ));
    let size = match tranship_appliance::dump(appliance, &file) {
        Ok(size) => size,
        Err(error) => {
            // Half a dump is none.
            let _ = std::fs::remove_file(path);
            return Err(error.into());
        }
    };
    stdout::print(&format!("{}: {}\n", path.display(), HumanBytes(size)))?;
    Ok(0)
}

fn running() -> Result<Vec<Appliance>, Failure> {
    Ok(tranship_appliance::running(&Settings::default().runtime_dir)?)
}

/// The appliance that is meant.
fn choose(running: &[Appliance], pid: Option<u32>) -> Result<&Appliance, Failure> {
    let of_process = |pid| running.iter().find(|appliance| appliance.status.pid == pid);
    match (running, pid) {
        (_, Some(pid)) => of_process(pid).ok_or_else(|| {
            Failure::new(ErrorKind::Usage, format!("process {pid} runs no appliance"))
                .hint("see which do with `tranship appliance list`")
        }),
        ([], None) => Err(Failure::new(ErrorKind::Usage, "no appliance is running")),
        ([one], None) => Ok(one),
        (several, None) => {
            let failure =
                Failure::new(ErrorKind::Usage, format!("{} appliances are running", several.len()));
            Err(failure.hint(format!("name one with --pid:\n{}", table(several).trim_end())))
        }
    }
}

fn table(running: &[Appliance]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut text =
        format!("{:>8}  {:<9} {:>9}  {:>5}  command\n", "pid", "backend", "for", "disks");
    for Appliance { status, .. } in running {
        let up = Duration::from_secs(now.saturating_sub(status.since));
        // The words may be anything.
        let command: String =
            status.command.chars().filter(|letter| !letter.is_control()).collect();
        let _ = writeln!(
            text,
            "{:>8}  {:<9} {:>9}  {:>5}  {command}",
            status.pid,
            status.backend,
            format!("{up:?}"),
            status.disks.len()
        );
    }
    text
}
