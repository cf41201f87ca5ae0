// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--map`: what a metadata context tells, as runs or as totals.

use super::asking::Connected;
use crate::failure::Failure;
use crate::stdout;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Bytes that have the same flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    offset: u64,
    len: u64,
    flags: u64,
}

/// Prints what `context` tells.
pub(super) fn print(
    connected: &Connected,
    context: &str,
    totals: bool,
    as_json: bool,
) -> Result<(), Failure> {
    let size = connected.export.size;
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    while at < size {
        let told = connected.status(context, at, size - at)?;
        let begun = at;
        for (len, flags) in told {
            let len = len.min(size - at);
            match runs.last_mut() {
                Some(last) if last.flags == flags => last.len += len,
                _ if len > 0 => runs.push(Run { offset: at, len, flags }),
                _ => {}
            }
            at += len;
        }
        if at == begun {
            return Err(Failure::usage(format!(
                "the server tells nothing about byte {at} in context {context}"
            )));
        }
    }
    let text = match (totals, as_json) {
        (false, false) => runs.iter().map(|run| line(context, *run)).collect(),
        (false, true) => {
            let runs = runs.iter().map(|run| {
                json!({
                    "offset": run.offset,
                    "length": run.len,
                    "type": run.flags,
                    "description": description(context, run.flags),
                })
            });
            format!("{:#}\n", runs.collect::<serde_json::Value>())
        }
        (true, _) => all(context, &sums(&runs), size, as_json),
    };
    stdout::print(&text)
}

/// Bytes of each kind.
fn sums(runs: &[Run]) -> BTreeMap<u64, u64> {
    runs.iter().fold(BTreeMap::new(), |mut sums, run| {
        *sums.entry(run.flags).or_default() += run.len;
        sums
    })
}

fn all(context: &str, sums: &BTreeMap<u64, u64>, size: u64, as_json: bool) -> String {
    #[allow(clippy::cast_precision_loss, reason = "a percentage with one digit is shown")]
    let percent = |len: u64| 100.0 * len as f64 / size as f64;
    if as_json {
        let sums = sums.iter().map(|(flags, len)| {
            json!({
                "size": len,
                "percent": percent(*len),
                "type": flags,
                "description": description(context, *flags),
            })
        });
        return format!("{:#}\n", sums.collect::<serde_json::Value>());
    }
    sums.iter().fold(String::new(), |mut text, (flags, len)| {
        let _ = write!(text, "{len:>10} {:>5.1}% {flags:>3}", percent(*len));
        described(&mut text, " ", context, *flags);
        text
    })
}

fn line(context: &str, run: Run) -> String {
    let mut text = format!("{:>10}  {:>10}  {:>3}", run.offset, run.len, run.flags);
    described(&mut text, "  ", context, run.flags);
    text
}

fn described(text: &mut String, space: &str, context: &str, flags: u64) {
    if let Some(words) = description(context, flags) {
        let _ = write!(text, "{space}{words}");
    }
    text.push('\n');
}

/// What flags mean, where that is known.
fn description(context: &str, flags: u64) -> Option<String> {
    let words = match (context, flags) {
        ("base:allocation", 0) => "data",
        ("base:allocation", 1) => "hole",
        ("base:allocation", 2) => "zero",
        ("base:allocation", 3) => "hole,zero",
        ("qemu:allocation-depth", 0) => "absent",
        ("qemu:allocation-depth", 1) => "local",
        ("qemu:allocation-depth", depth) => return Some(format!("backing depth {depth}")),
        (bitmap, 0) if bitmap.starts_with("qemu:dirty-bitmap:") => "clean",
        (bitmap, 1) if bitmap.starts_with("qemu:dirty-bitmap:") => "dirty",
        _ => return None,
    };
    Some(words.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_nbdinfos_columns() {
        let run = |flags| Run { offset: 0, len: 65_536, flags };
        let base = |flags| line("base:allocation", run(flags));
        assert_eq!(base(0), "         0       65536    0  data\n");
        assert_eq!(base(3), "         0       65536    3  hole,zero\n");
        assert_eq!(line("x:y", run(9)), "         0       65536    9\n");
    }

    #[test]
    fn totals_add_up() {
        let runs = [(0, 10, 0), (10, 20, 3), (30, 10, 0)];
        let runs = runs.map(|(offset, len, flags)| Run { offset, len, flags });
        let text = all("base:allocation", &sums(&runs), 40, false);
        assert_eq!(text, "        20  50.0%   0 data\n        20  50.0%   3 hole,zero\n");
    }
}
