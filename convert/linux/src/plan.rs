// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A conversion as data: what will be changed, why, and what stands in the way.

use serde::{Serialize, Serializer};
use std::fmt;
use tranship_inspect::{Ownership, optional_path_text, path_text};
use tranship_protocol::GuestPath;

/// Everything that a conversion will change, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Changes of the guest's files.
    pub steps: Vec<Step>,
    /// Changes of the machine that the steps prepare for.
    pub devices: Vec<DeviceChange>,
    /// What was decided without changing anything.
    pub notes: Vec<String>,
    /// What the owner of the guest should look at.
    pub warnings: Vec<Warning>,
}

impl Plan {
    /// Whether the guest's files stay as they are.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

/// One change of the guest's files. Doing it twice is the same as doing it once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// Gives a file new contents.
    WriteFile {
        /// The file.
        #[serde(serialize_with = "path_text")]
        path: GuestPath,
        /// Its new contents.
        #[serde(serialize_with = "content_text")]
        content: Vec<u8>,
        /// Who may use it if it is new.
        #[serde(serialize_with = "ownership_text")]
        new: Ownership,
        /// Why.
        why: String,
        /// The change as a unified diff; empty for contents that are not text.
        diff: String,
    },
    /// Appends an archive of drivers to an initramfs.
    AppendInitramfs(AppendInitramfs),
    /// Makes a symbolic link.
    Symlink {
        /// The link.
        #[serde(serialize_with = "path_text")]
        path: GuestPath,
        /// What it says.
        target: String,
        /// Why.
        why: String,
    },
    /// Removes a file or link.
    Remove {
        /// The file.
        #[serde(serialize_with = "path_text")]
        path: GuestPath,
        /// Why.
        why: String,
    },
    /// Copies a file.
    Copy {
        /// The file.
        #[serde(serialize_with = "path_text")]
        from: GuestPath,
        /// The copy.
        #[serde(serialize_with = "path_text")]
        to: GuestPath,
        /// Why.
        why: String,
    },
    /// Runs a program of the guest in the appliance.
    RunProgram {
        /// Absolute path of the program.
        program: String,
        /// Its arguments.
        arguments: Vec<String>,
        /// Why.
        why: String,
    },
}

/// An archive of drivers that goes behind an initramfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AppendInitramfs {
    /// Version of the kernel that it belongs to.
    pub kernel: String,
    /// The initramfs.
    #[serde(serialize_with = "path_text")]
    pub initrd: GuestPath,
    /// Size of the initramfs before.
    pub old_size: u64,
    /// The archive begins at a multiple of this.
    pub align: u64,
    /// The archive, packed.
    #[serde(rename = "bytes", serialize_with = "length")]
    pub segment: Vec<u8>,
    /// How it is packed.
    pub compression: crate::Compression,
    /// Modules in it, by name.
    pub modules: Vec<String>,
    /// Other files in it.
    pub files: Vec<String>,
    /// Where the untouched initramfs is kept, if there is room.
    #[serde(serialize_with = "optional_path_text")]
    pub backup: Option<GuestPath>,
    /// Why.
    pub why: String,
}

/// A change of the machine that the guest will see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "device", rename_all = "snake_case")]
pub enum DeviceChange {
    /// A disk gets another bus and with it another name.
    Disk {
        /// Name before, such as `sda`.
        from: String,
        /// Name afterwards, such as `vda`.
        to: String,
    },
    /// A network card becomes virtio; its address stays.
    Nic {
        /// Hardware address.
        mac: String,
        /// Name that the guest will use for it, if one had to be fixed.
        name: Option<String>,
    },
}

/// Something that the owner of the guest should look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// Stable identifier.
    pub code: &'static str,
    /// What was seen, in one sentence.
    pub what: String,
}

/// Why a guest cannot be converted as it stands, and what would help.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Blocker {
    /// Stable identifier that documentation and policies refer to.
    pub code: &'static str,
    /// What is wrong, in one sentence.
    pub what: String,
    /// What the owner of the guest can do about it.
    pub remedy: String,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]; {}", self.what, self.code, self.remedy)
    }
}

impl Step {
    /// The file that it changes; `None` for a program.
    pub fn path(&self) -> Option<&GuestPath> {
        match self {
            Self::WriteFile { path, .. }
            | Self::Symlink { path, .. }
            | Self::Remove { path, .. } => Some(path),
            Self::AppendInitramfs(append) => Some(&append.initrd),
            Self::Copy { to, .. } => Some(to),
            Self::RunProgram { .. } => None,
        }
    }

    /// Why it is done.
    pub fn why(&self) -> &str {
        match self {
            Self::WriteFile { why, .. }
            | Self::Symlink { why, .. }
            | Self::Remove { why, .. }
            | Self::Copy { why, .. }
            | Self::RunProgram { why, .. } => why,
            Self::AppendInitramfs(append) => &append.why,
        }
    }
}

/// One line without the reason, as a progress display shows it.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WriteFile { path, .. } => write!(f, "write {path}"),
            Self::AppendInitramfs(append) => {
                let (initrd, size) = (&append.initrd, append.segment.len());
                write!(f, "append {size} bytes ({}) to {initrd}", append.compression)
            }
            Self::Symlink { path, target, .. } => write!(f, "link {path} to {target}"),
            Self::Remove { path, .. } => write!(f, "remove {path}"),
            Self::Copy { from, to, .. } => write!(f, "copy {from} to {to}"),
            Self::RunProgram { program, arguments, .. } => {
                write!(f, "run {program} {} in the guest", arguments.join(" "))
            }
        }
    }
}

/// The whole plan in words, with the diffs, as a dry run prints it.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for device in &self.devices {
            match device {
                DeviceChange::Disk { from, to } => writeln!(f, "disk {from} becomes {to}")?,
                DeviceChange::Nic { mac, name: Some(name) } => {
                    writeln!(f, "network card {mac} becomes virtio and stays {name}")?;
                }
                DeviceChange::Nic { mac, name: None } => {
                    writeln!(f, "network card {mac} becomes virtio")?;
                }
            }
        }
        if self.steps.is_empty() {
            writeln!(f, "nothing to change in the guest")?;
        }
        for (number, step) in self.steps.iter().enumerate() {
            writeln!(f, "{}. {step}", number.saturating_add(1))?;
            writeln!(f, "   {}", step.why())?;
            match step {
                Step::WriteFile { diff, .. } => {
                    for line in diff.lines() {
                        writeln!(f, "   | {line}")?;
                    }
                }
                Step::AppendInitramfs(append) => {
                    if !append.modules.is_empty() {
                        writeln!(f, "   modules: {}", append.modules.join(", "))?;
                    }
                    if !append.files.is_empty() {
                        writeln!(f, "   files: {}", append.files.join(", "))?;
                    }
                    if let Some(backup) = &append.backup {
                        writeln!(f, "   the original stays as {backup}")?;
                    } else {
                        let size = append.old_size;
                        writeln!(f, "   no copy is kept: cut the file at {size} to undo")?;
                    }
                }
                _ => {}
            }
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {} [{}]", warning.what, warning.code)?;
        }
        Ok(())
    }
}

/// Contents as text; what is no text is only measured.
fn content_text<S: Serializer>(content: &[u8], to: S) -> Result<S::Ok, S::Error> {
    match std::str::from_utf8(content) {
        Ok(text) => to.serialize_str(text),
        Err(_) => to.serialize_str(&format!("({} bytes)", content.len())),
    }
}

fn length<S: Serializer>(content: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(u64::try_from(content.len()).unwrap_or(u64::MAX))
}

fn ownership_text<S: Serializer>(new: &Ownership, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format!("{:04o} {}:{}", new.mode, new.uid, new.gid))
}
