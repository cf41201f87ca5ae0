// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one table of the shell's commands, and how their arguments are read.

use super::script::Script;
use super::session::Shell;
use super::{Flow, Outcome, devices, files, inspect, mounts, programs, values};
use crate::failure::Failure;
use std::fmt::Write;
use std::path::PathBuf;
use tranship_protocol::GuestPath;

/// What an argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text.
    Text,
    /// Any bytes.
    Bytes,
    /// An absolute path in the guest.
    Path,
    /// A device of the appliance.
    Device,
    /// A file of the host to read; also `-` and `-<<END`.
    Source,
    /// A file of the host to write; also `-`.
    Target,
    /// A list: words separated by blanks.
    List,
    /// True or false.
    Flag,
    /// All words that are left.
    Rest,
}

/// An argument's value.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Text(String),
    Bytes(Vec<u8>),
    Path(GuestPath),
    Source(Source),
    Target(Option<PathBuf>),
    List(Vec<String>),
    Flag(bool),
}

/// Where contents for the guest come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A file of the host.
    File(PathBuf),
    /// Standard input.
    Stdin,
    /// The script itself.
    Here(Vec<u8>),
}

/// A command of the shell.
#[derive(Debug)]
pub(super) struct Command {
    /// Its name.
    pub(super) name: &'static str,
    /// Other names.
    aliases: &'static [&'static str],
    /// Names and kinds of its arguments.
    parameters: &'static [(&'static str, Kind)],
    /// Arguments that may follow as `NAME:VALUE`.
    optional: &'static [(&'static str, Kind)],
    /// What it does, in one line.
    help: &'static str,
    /// Does it.
    pub(super) run: fn(&mut Shell, &Arguments) -> Outcome,
}

type Run = fn(&mut Shell, &Arguments) -> Outcome;

const fn command(
    name: &'static str,
    aliases: &'static [&'static str],
    parameters: &'static [(&'static str, Kind)],
    help: &'static str,
    run: Run,
) -> Command {
    Command { name, aliases, parameters, optional: &[], help, run }
}

const NONE: &[(&str, Kind)] = &[];
const PATH: &[(&str, Kind)] = &[("path", Kind::Path)];
const DEVICE: &[(&str, Kind)] = &[("device", Kind::Device)];
const ROOT: &[(&str, Kind)] = &[("root", Kind::Device)];
const FOLLOW: &[(&str, Kind)] = &[("followsymlinks", Kind::Flag)];

/// All commands, sorted by name.
#[rustfmt::skip]
static COMMANDS: &[Command] = &[
    Command {
        optional: &[("readonly", Kind::Flag), ("format", Kind::Text)],
        ..command("add-drive", &["add"], &[("file", Kind::Text)], "add a disk; after launch it is plugged in", devices::add)
    },
    command("blockdev-getsize64", &[], DEVICE, "size of a device in bytes", devices::size),
    command("cat", &[], PATH, "print a file", files::cat),
    command("command", &[], &[("arguments", Kind::List)], "run a program of the guest", programs::command),
    command("cp-a", &[], &[("source", Kind::Path), ("copy", Kind::Path)], "copy a file with its attributes", files::copy),
    command("df", &[], NONE, "free space of all mounted filesystems", mounts::df),
    command("download", &[], &[("path", Kind::Path), ("file", Kind::Target)], "copy a file of the guest to the host", files::download),
    command("echo", &[], &[("words", Kind::Rest)], "print words", echo),
    command("exists", &[], PATH, "whether there is a file or directory", files::exists),
    command("fstrim", &[], &[("mountpoint", Kind::Path)], "discard what a filesystem does not use", mounts::trim),
    command("help", &[], &[("command", Kind::Rest)], "list the commands, or explain one", help),
    command("inspect-get-arch", &[], ROOT, "processor architecture of an operating system", inspect::arch),
    command("inspect-get-distro", &[], ROOT, "distribution of an operating system", inspect::distro),
    command("inspect-get-hostname", &[], ROOT, "host name of an operating system", inspect::hostname),
    command("inspect-get-major-version", &[], ROOT, "major version of an operating system", inspect::major),
    command("inspect-get-minor-version", &[], ROOT, "minor version of an operating system", inspect::minor),
    command("inspect-get-mountpoints", &[], ROOT, "where an operating system mounts which devices", inspect::mountpoints),
    command("inspect-get-osinfo", &[], ROOT, "an operating system in osinfo's words", inspect::osinfo),
    command("inspect-get-product-name", &[], ROOT, "name of an operating system", inspect::product_name),
    command("inspect-get-type", &[], ROOT, "kind of an operating system", inspect::kind),
    command("inspect-os", &[], NONE, "find operating systems; unmounts everything", inspect::inspect_os),
    Command { optional: FOLLOW, ..command("is-dir", &[], PATH, "whether it is a directory", files::is_dir) },
    Command { optional: FOLLOW, ..command("is-file", &[], PATH, "whether it is a regular file", files::is_file) },
    command("is-symlink", &[], PATH, "whether it is a symbolic link", files::is_symlink),
    command("launch", &["run"], NONE, "start the appliance", devices::launch),
    command("list-devices", &[], NONE, "the disks", devices::list_devices),
    command("list-filesystems", &[], NONE, "the filesystems and their types", devices::list_filesystems),
    command("list-partitions", &[], NONE, "the partitions", devices::list_partitions),
    command("ll", &[], &[("directory", Kind::Path)], "list a directory with attributes", files::ll),
    command("ln-sf", &[], &[("target", Kind::Bytes), ("link", Kind::Path)], "make or replace a symbolic link", files::symlink),
    command("ls", &[], &[("directory", Kind::Path)], "list a directory", files::ls),
    command("lstat", &[], PATH, "attributes; a link's own", files::lstat),
    command("lvs", &[], NONE, "the logical volumes", devices::logical_volumes),
    command("mkdir-p", &[], PATH, "make a directory and its parents", files::make_dir),
    command("mount", &[], &[("device", Kind::Device), ("mountpoint", Kind::Path)], "mount a filesystem", mounts::mount),
    command("mount-options", &[], &[("options", Kind::Text), ("device", Kind::Device), ("mountpoint", Kind::Path)], "mount a filesystem with options", mounts::mount_options),
    command("mount-ro", &[], &[("device", Kind::Device), ("mountpoint", Kind::Path)], "mount a filesystem for reading", mounts::mount_ro),
    command("mount-vfs", &[], &[("options", Kind::Text), ("type", Kind::Text), ("device", Kind::Device), ("mountpoint", Kind::Path)], "mount a filesystem of a type with options", mounts::mount_vfs),
    command("mountpoints", &[], NONE, "mounted devices and where they are mounted", mounts::mountpoints),
    command("mounts", &[], NONE, "mounted devices", mounts::mounts),
    command("quit", &["exit", "q"], NONE, "leave", quit),
    command("readlink", &[], PATH, "what a symbolic link says", files::readlink),
    command("remove-drive", &[], DEVICE, "take a disk away that nothing is mounted from", devices::remove),
    command("rm-f", &[], PATH, "remove a file or link, if it is there", files::remove),
    command("sh", &[], &[("command", Kind::Text)], "run a command with the guest's shell", programs::sh),
    command("shutdown", &[], NONE, "write everything out and end the appliance", devices::shutdown),
    command("stat", &[], PATH, "attributes; links are followed", files::stat),
    command("sync", &[], NONE, "write everything out to the disks", mounts::sync),
    command("umount", &["unmount"], &[("pathordevice", Kind::Text)], "unmount a filesystem", mounts::unmount),
    command("umount-all", &["unmount-all"], NONE, "unmount all filesystems", mounts::unmount_all),
    command("upload", &[], &[("file", Kind::Source), ("path", Kind::Path)], "copy a file of the host into the guest", files::upload),
    command("version", &[], NONE, "version of this program", version),
    command("vfs-label", &[], DEVICE, "label of a filesystem", devices::label),
    command("vfs-type", &[], DEVICE, "type of a filesystem", devices::vfs_type),
    command("vfs-uuid", &[], DEVICE, "UUID of a filesystem", devices::uuid),
    command("write", &[], &[("path", Kind::Path), ("content", Kind::Bytes)], "give a file this content", files::write),
];

/// The command called `name`, in any case, with `-` or `_`.
pub(super) fn find(name: &str) -> Option<&'static Command> {
    let name = name.to_ascii_lowercase().replace('_', "-");
    COMMANDS.iter().find(|known| known.name == name || known.aliases.contains(&name.as_str()))
}

impl Command {
    /// How it is called.
    fn usage(&self) -> String {
        let mut usage = self.name.to_owned();
        for (name, kind) in self.parameters {
            let _ = match kind {
                Kind::Rest => write!(usage, " [{name}…]"),
                _ => write!(usage, " {name}"),
            };
        }
        for (name, _) in self.optional {
            let _ = write!(usage, " [{name}:…]");
        }
        usage
    }

    fn wrong_count(&self) -> Failure {
        Failure::usage(format!(
            "incorrect number of arguments\nusage: {}\ntype 'help {}' for more help on {}",
            self.usage(),
            self.name,
            self.name
        ))
    }
}

/// The arguments of a command, of the kinds that it asks for.
#[derive(Debug)]
pub(super) struct Arguments {
    values: Vec<Value>,
    optional: Vec<(&'static str, Value)>,
    rest: Vec<Vec<u8>>,
}

impl Arguments {
    /// Reads `words`; what follows a `-<<END` is read from the script.
    pub(super) fn read(
        command: &Command,
        words: &[Vec<u8>],
        script: &mut Script,
    ) -> Result<Self, Failure> {
        let mut words = words.iter();
        let mut found = Self { values: Vec::new(), optional: Vec::new(), rest: Vec::new() };
        for (_, kind) in command.parameters {
            if *kind == Kind::Rest {
                found.rest = words.by_ref().cloned().collect();
                continue;
            }
            let word = words.next().ok_or_else(|| command.wrong_count())?;
            found.values.push(value(command, *kind, word, script)?);
        }
        for word in words {
            let text = String::from_utf8_lossy(word);
            let known = text.split_once(':').and_then(|(name, value)| {
                let option = command.optional.iter().find(|(known, _)| *known == name)?;
                Some((option, value.to_owned()))
            });
            let Some(((name, kind), text)) = known else {
                if command.optional.is_empty() || found.optional.len() == command.optional.len() {
                    return Err(command.wrong_count());
                }
                let name = text.split(':').next().unwrap_or_default();
                return Err(Failure::usage(format!(
                    "{}: unknown optional argument \"{name}\"",
                    command.name
                )));
            };
            if found.optional.iter().any(|(given, _)| given == name) {
                return Err(Failure::usage(format!(
                    "{}: optional argument \"{name}\" given more than once",
                    command.name
                )));
            }
            let value = value(command, *kind, text.as_bytes(), script)?;
            found.optional.push((name, value));
        }
        Ok(found)
    }

    fn at(&self, index: usize) -> &Value {
        self.values.get(index).expect("the table asks for every argument that its command reads")
    }

    /// Text of argument `index`: its kind is `Text` or `Device`.
    pub(super) fn text(&self, index: usize) -> &str {
        match self.at(index) {
            Value::Text(text) => text,
            other => unreachable!("argument {index} is {other:?}, the table says otherwise"),
        }
    }

    /// Path of argument `index`.
    pub(super) fn path(&self, index: usize) -> &GuestPath {
        match self.at(index) {
            Value::Path(path) => path,
            other => unreachable!("argument {index} is {other:?}, the table says otherwise"),
        }
    }

    /// Bytes of argument `index`.
    pub(super) fn bytes(&self, index: usize) -> &[u8] {
        match self.at(index) {
            Value::Bytes(bytes) => bytes,
            other => unreachable!("argument {index} is {other:?}, the table says otherwise"),
        }
    }

    /// List of argument `index`.
    pub(super) fn list(&self, index: usize) -> &[String] {
        match self.at(index) {
            Value::List(list) => list,
            other => unreachable!("argument {index} is {other:?}, the table says otherwise"),
        }
    }

    /// Source of argument `index`.
    pub(super) fn source(&self, index: usize) -> &Source {
        match self.at(index) {
            Value::Source(source) => source,
            other => unreachable!("argument {index} is {other:?}, the table says otherwise"),
        }
    }

    /// Host file of argument `index`; `None` for the place where results go.
    pub(super) fn target(&self, index: usize) -> Option<&PathBuf> {
        match self.at(index) {
            Value::Target(target) => target.as_ref(),
            other => unreachable!("argument {index} is {other:?}, the table says otherwise"),
        }
    }

    /// Whether the optional flag `name` was given as true.
    pub(super) fn flag(&self, name: &str) -> bool {
        self.optional.iter().any(|(given, value)| *given == name && *value == Value::Flag(true))
    }

    /// The optional text `name`.
    pub(super) fn optional_text(&self, name: &str) -> Option<&str> {
        self.optional.iter().find_map(|(given, value)| match value {
            Value::Text(text) if *given == name => Some(text.as_str()),
            _ => None,
        })
    }
}

fn value(
    command: &Command,
    kind: Kind,
    word: &[u8],
    script: &mut Script,
) -> Result<Value, Failure> {
    let wrong = |message: String| Failure::usage(format!("{}: {message}", command.name));
    let text = || {
        std::str::from_utf8(word)
            .map_err(|_| wrong(format!("{:?} is not UTF-8", String::from_utf8_lossy(word))))
    };
    Ok(match kind {
        Kind::Text => Value::Text(text()?.to_owned()),
        Kind::Bytes | Kind::Rest => Value::Bytes(word.to_vec()),
        Kind::Path if word.first() == Some(&b'/') => Value::Path(GuestPath::of(word)),
        Kind::Path => return Err(wrong("path must start with a / character".to_owned())),
        Kind::Device => match text()? {
            device if device.starts_with("/dev/") => Value::Text(values::device(device)),
            other => return Err(wrong(format!("{other}: expecting a device name"))),
        },
        Kind::List => Value::List(values::list(text()?).map_err(wrong)?),
        Kind::Flag => Value::Flag(values::boolean(text()?).map_err(wrong)?),
        Kind::Target if word == b"-" => Value::Target(None),
        Kind::Target => Value::Target(Some(host_path(word))),
        Kind::Source => Value::Source(match word.strip_prefix(b"-<<") {
            _ if word == b"-" => Source::Stdin,
            Some(end) => Source::Here(script.until(&String::from_utf8_lossy(end))?),
            None => Source::File(host_path(word)),
        }),
    })
}

fn host_path(word: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    PathBuf::from(std::ffi::OsString::from_vec(word.to_vec()))
}

fn echo(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let mut line = arguments.rest.join(&b' ');
    line.push(b'\n');
    shell.print_bytes(&line)?;
    Ok(Flow::Continue)
}

// The table's functions have one type.
#[allow(clippy::unnecessary_wraps)]
fn quit(_: &mut Shell, _: &Arguments) -> Outcome {
    Ok(Flow::Quit)
}

fn version(shell: &mut Shell, _: &Arguments) -> Outcome {
    shell.print(&format!("{} {}\n", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")))?;
    Ok(Flow::Continue)
}

fn help(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let Some(name) = arguments.rest.first() else {
        return shell.print_lines(COMMANDS.iter().map(|c| format!("{:<26} {}", c.name, c.help)));
    };
    let name = String::from_utf8_lossy(name);
    let command = find(&name).ok_or_else(|| Failure::usage(format!("{name}: unknown command")))?;
    let mut lines = vec![command.usage(), format!("    {}", command.help)];
    lines.extend(command.aliases.iter().map(|alias| format!("    also called {alias}")));
    shell.print_lines(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_names_are_used_once() {
        assert!(COMMANDS.is_sorted_by_key(|command| command.name));
        let mut names: Vec<&str> =
            COMMANDS.iter().flat_map(|c| c.aliases.iter().copied().chain([c.name])).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(COMMANDS.iter().all(|c| !c.help.is_empty() && !c.help.ends_with('.')));
    }

    #[test]
    fn commands_have_several_spellings() {
        for name in ["list-filesystems", "list_filesystems", "LIST-filesystems"] {
            assert_eq!(find(name).unwrap().name, "list-filesystems");
        }
        assert_eq!(find("run").unwrap().name, "launch");
        assert!(find("lis").is_none());
    }
}
