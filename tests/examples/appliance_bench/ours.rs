// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Machines that the program runs, in our monitor or in QEMU.

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

fn program() -> Command {
    Command::new(std::env::var_os("TRANSHIP_BIN").unwrap())
}

/// A cold and a warm start, as `appliance bench` tells them: from the start of the machine's
/// process to the agent's first word, or to its first answer with the disk in place, and all that
/// the user waits for.
pub(crate) fn bench(backend: &str, disks: &[PathBuf]) -> Vec<(&'static str, String)> {
    let mut command = program();
    command.args(["appliance", "bench", "--runs", "1", "--json", "--backend", backend]);
    command.args(["--memsize", &crate::MEMORY.to_string()]);
    for disk in disks {
        command.arg("--disk").arg(disk);
    }
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sum = |rows: &str, wanted: &dyn Fn(&str) -> bool| {
        let rows = report[rows].as_array().unwrap();
        let of_it = rows.iter().filter(|row| wanted(row["name"].as_str().unwrap()));
        let times: Vec<f64> = of_it.map(|row| row["min_ms"].as_f64().unwrap()).collect();
        (!times.is_empty()).then(|| format!("{:.1}", times.iter().sum::<f64>()))
    };
    let boot = |name: &str| name == "machine to kernel" || name.starts_with("in it: ");
    let restored = |name: &str| ["machine restored", "disks plugged in"].contains(&name);
    let whole = |name: &str| name == "start, in all";
    [
        ("cold", sum("rows", &boot)),
        ("warm", sum("warm_rows", &restored)),
        ("cold, in all", sum("rows", &whole)),
        ("warm, in all", sum("warm_rows", &whole)),
    ]
    .into_iter()
    .filter_map(|(kind, time)| Some((kind, time?)))
    .collect()
}

/// `appliance shell` while it runs.
pub(crate) struct Shell {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// Printed when a line is done.
const DONE: &str = "-- done --";

impl Shell {
    pub(crate) fn start(backend: &str, disks: &[PathBuf]) -> Self {
        let mut command = program();
        command.args(["appliance", "shell", "--warm-start", "off", "--backend", backend]);
        command.args(["--memsize", &crate::MEMORY.to_string()]);
        for disk in disks {
            command.arg("--add").arg(disk);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut shell = Self { child, input, output };
        shell.run(":");
        shell
    }

    /// What a line prints.
    pub(crate) fn run(&mut self, line: &str) -> String {
        let input = self.input.as_mut().unwrap();
        writeln!(input, "{line}\necho '{DONE}'").unwrap();
        let mut printed = String::new();
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the appliance is gone");
            if line.trim_end() == DONE {
                return printed;
            }
            printed.push_str(&line);
        }
    }

    /// The process with the machine: the only child.
    pub(crate) fn machine(&self) -> u32 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let children = tasks.map(|task| {
            fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default()
        });
        let children: String = children.collect::<Vec<_>>().join(" ");
        let mut children = children.split_whitespace();
        let machine = children.next().unwrap().parse().unwrap();
        assert_eq!(children.next(), None, "more than one child");
        machine
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.input.take();
        let _ = self.child.wait();
    }
}
