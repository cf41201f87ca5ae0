// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Carries a plan out.

use crate::plan::{Plan, Step};
use tranship_inspect::{Error, ErrorKind, GuestEdit, Result};

/// Most bytes of a failed program's output that an error repeats.
const OUTPUT: usize = 2000;

/// Carries the plan out, stopping at the first failure.
///
/// `observer` is told the number (from 0) of each step before it begins. Every step can
/// be repeated, so that an interrupted conversion is begun again with the same plan; an
/// initramfs that has grown already is recognised by its size.
///
/// # Errors
///
/// The failing step's error; earlier steps stay applied.
pub fn apply(plan: &Plan, edit: &dyn GuestEdit, observer: &dyn Fn(usize, &Step)) -> Result<()> {
    plan.steps.iter().enumerate().try_for_each(|(number, step)| {
        observer(number, step);
        carry_out(step, edit)
    })
}

fn carry_out(step: &Step, edit: &dyn GuestEdit) -> Result<()> {
    match step {
        Step::WriteFile { path, content, new, .. } => edit.write(path, content, *new),
        Step::Symlink { path, target, .. } => edit.symlink(path, target.as_bytes()),
        Step::Remove { path, .. } => edit.remove(path),
        Step::Copy { from, to, .. } => edit.copy(from, to),
        Step::AppendInitramfs(append) => {
            let size = edit.stat(&append.initrd)?.map(|stat| stat.size);
            let segment = u64::try_from(append.segment.len()).unwrap_or(u64::MAX);
            let start = append.old_size.checked_next_multiple_of(append.align);
            if size == start.and_then(|start| start.checked_add(segment)) {
                return Ok(());
            }
            if size != Some(append.old_size) {
                let message = format!(
                    "has changed since the plan was made: it held {} bytes",
                    append.old_size
                );
                return Err(Error::new(ErrorKind::Corrupt, message).on(&append.initrd));
            }
            let backup = append.backup.as_ref();
            edit.append(&append.initrd, &append.segment, append.align, backup).map(|_| ())
        }
        Step::RunProgram { program, arguments, .. } => {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let finished = edit.run(program, &arguments)?;
            if finished.status == 0 {
                return Ok(());
            }
            let from = finished.output.len().saturating_sub(OUTPUT);
            let end = String::from_utf8_lossy(finished.output.get(from..).unwrap_or_default());
            let message =
                format!("{program} ended with status {}: {}", finished.status, end.trim());
            Err(Error::new(ErrorKind::Io, message))
        }
    }
}
