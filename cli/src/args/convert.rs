// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of `convert`, which are virt-v2v's as far as they go.

use super::{MachineArgs, MachineReadable, MeteringArgs, Talk, absent, network, values};
use crate::failure::Failure;
use crate::personality::Personality;
use crate::places;
use clap::{ArgAction, Args};
use std::path::{Path, PathBuf};
use tranship_block::Meter;
use tranship_convert::{InitramfsMode, Input, Key, NetworkRule, Request, RootChoice, TargetFormat};

/// Options of `convert`.
// Every flag is a switch of its own on the command line.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// The guest: an OVA, an OVF or its folder, a .vmx file, or disk images, which may also
    /// be URIs of NBD servers
    #[arg(value_name = "SOURCE")]
    sources: Vec<PathBuf>,

    /// What the source is: ova, vmx or disk; without it the file's name decides
    #[arg(short, long, value_name = "MODE", value_parser = input_mode, help_heading = "Source")]
    input: Option<InputMode>,
    /// Format of the disk images of `-i disk`; without it they are looked at
    #[arg(long, value_name = "FORMAT", help_heading = "Source")]
    input_format: Option<String>,
    /// Which operating system of several: single, first, or its device such as /dev/sda2
    #[arg(long, value_name = "ROOT", value_parser = root, help_heading = "Source")]
    root: Option<RootChoice>,
    /// Key of an encrypted volume, ID:key:SECRET or ID:file:FILE; ID is a device, a UUID or
    /// `all`. Can be repeated
    #[arg(long, value_name = "KEY", value_parser = values::key, hide_env_values = true,
          help_heading = "Source")]
    key: Vec<Key>,
    /// Do not compare the source with the checksums that came with it
    #[arg(long, help_heading = "Source")]
    no_verify_manifest: bool,

    /// Where the target goes: local, a folder with disks and libvirt XML
    #[arg(short, long, value_name = "MODE", value_parser = output_mode, help_heading = "Target")]
    output: Option<()>,
    /// The folder for `-o local`; it has to exist
    #[arg(long, value_name = "DIR", help_heading = "Target")]
    output_storage: Option<PathBuf>,
    /// Format of the target's disks
    #[arg(long, value_name = "FORMAT", value_parser = target_format, help_heading = "Target",
          default_value = "raw", hide_default_value = true)]
    output_format: TargetFormat,
    /// Space of the target's disks: sparse or preallocated
    #[arg(long, value_name = "MODE", value_parser = allocation, help_heading = "Target",
          default_value = "sparse", hide_default_value = true)]
    output_allocation: Allocation,
    /// Name of the target
    #[arg(long, value_name = "NAME", help_heading = "Target")]
    output_name: Option<String>,
    /// Replace results that an earlier run made of other inputs
    #[arg(long, help_heading = "Target")]
    force: bool,
    /// Connect network IN to OUT, or all other networks to OUT. Can be repeated
    #[arg(short, long, value_name = "IN:OUT|OUT", value_parser = network::network,
          help_heading = "Target")]
    network: Vec<NetworkRule>,
    /// Connect bridge IN to OUT, or all other bridges to OUT. Can be repeated
    #[arg(short, long, value_name = "IN:OUT|OUT", value_parser = network::bridge,
          help_heading = "Target")]
    bridge: Vec<NetworkRule>,
    /// Connect the card with this address: MAC:network:OUT or MAC:bridge:OUT. Can be repeated
    #[arg(long, value_name = "RULE", value_parser = network::mac, help_heading = "Target")]
    mac: Vec<NetworkRule>,

    /// Copy blocks that the guest's filesystems do not use as well
    #[arg(long, alias = "no-fstrim", help_heading = "Conversion")]
    no_trim: bool,
    /// Who renews the initramfs: append (drivers are added, nothing of the guest runs) or
    /// guest (its own tool, in the appliance)
    #[arg(long, value_name = "WHO", value_parser = initramfs, help_heading = "Conversion",
          default_value = "append", hide_default_value = true)]
    rebuild_initramfs: InitramfsMode,
    /// Print what the source says about the guest, and stop
    #[arg(long, help_heading = "Conversion", conflicts_with = "dry_run")]
    pub(crate) print_source: bool,
    /// Print what would be changed, and stop; nothing is written
    #[arg(long, visible_alias = "plan", help_heading = "Conversion")]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,

    /// Print the result as JSON on standard output
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
    /// Events as JSON lines to file:FILE, stream:stdout, stream:stderr or fd:N. Without a
    /// value: progress as N/100 lines on standard output or, alone, the list of capabilities
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true,
          default_missing_value = "", value_parser = values::machine_readable,
          help_heading = "Output")]
    pub(crate) machine_readable: Option<MachineReadable>,
    /// Print warnings and errors only
    #[arg(short, long, help_heading = "Output")]
    pub(crate) quiet: bool,
    /// Use colours even where no terminal is
    #[arg(long, visible_aliases = ["color", "colours", "colour"], help_heading = "Output")]
    pub(crate) colors: bool,
    #[command(flatten)]
    pub(crate) talk: Talk,

    /// virt-v2v's garbage collector has no counterpart; its own tests pass the option
    #[arg(long, hide = true, action = ArgAction::SetTrue)]
    debug_gc: bool,
    /// Lines are never wrapped here; scripts pass the option to be sure
    #[arg(long, hide = true, action = ArgAction::SetTrue)]
    wrap: bool,
}

/// What the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InputMode {
    /// An OVA, an OVF, or a folder with one.
    Ova,
    /// A .vmx file.
    Vmx,
    /// Disk images.
    Disk,
}

/// Space of the target's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Allocation {
    /// As it is written to.
    Sparse,
    /// All at once.
    Preallocated,
}

fn input_mode(text: &str) -> Result<InputMode, String> {
    match text {
        "ova" => Ok(InputMode::Ova),
        "vmx" => Ok(InputMode::Vmx),
        "disk" | "local" => Ok(InputMode::Disk),
        other => Err(absent::input(other)),
    }
}

fn output_mode(text: &str) -> Result<(), String> {
    match text {
        "local" | "disk" => Ok(()),
        other => Err(absent::output(other)),
    }
}

fn target_format(text: &str) -> Result<TargetFormat, String> {
    match text {
        "raw" => Ok(TargetFormat::Raw),
        "qcow2" => Ok(TargetFormat::Qcow2),
        _ => Err("expected raw or qcow2".to_owned()),
    }
}

fn allocation(text: &str) -> Result<Allocation, String> {
    match text {
        "sparse" => Ok(Allocation::Sparse),
        "preallocated" => Ok(Allocation::Preallocated),
        _ => Err("expected sparse or preallocated".to_owned()),
    }
}

fn root(text: &str) -> Result<RootChoice, String> {
    if text == "ask" {
        return Err("nobody is asked: name the operating system's device, such as /dev/sda2, or \
                    say first"
            .to_owned());
    }
    text.parse()
}

fn initramfs(text: &str) -> Result<InitramfsMode, String> {
    match text {
        "append" => Ok(InitramfsMode::Append),
        "guest" => Ok(InitramfsMode::Guest),
        _ => Err("expected append or guest".to_owned()),
    }
}

impl ConvertArgs {
    /// Whether only `--machine-readable` was given: then capabilities are listed.
    pub(crate) fn asks_for_capabilities(&self) -> bool {
        self.machine_readable == Some(MachineReadable::Plain)
            && self.sources.is_empty()
            && self.input.is_none()
            && self.output.is_none()
            && self.output_storage.is_none()
            && !self.print_source
            && !self.dry_run
    }

    /// What is to be read. virt-v2v's own default, libvirt, is not there.
    pub(crate) fn input(&self, personality: Personality) -> Result<Input, Failure> {
        let Some(first) = self.sources.first() else {
            return Err(Failure::usage("no source was named")
                .hint("name an OVA, a .vmx file or disk images"));
        };
        let mode = match self.input {
            Some(mode) => mode,
            None if personality == Personality::VirtV2v => {
                return Err(Failure::usage(
                    "-i is missing, and reading from libvirt, its default, is not there yet",
                )
                .hint("say what the source is: -i ova, -i vmx or -i disk"));
            }
            None => guess(first),
        };
        if self.input_format.is_some() && mode != InputMode::Disk {
            return Err(Failure::usage(
                "-if is for -i disk only: other sources name their formats",
            ));
        }
        match mode {
            InputMode::Disk => {
                Ok(Input::Disks { paths: self.sources.clone(), format: self.input_format.clone() })
            }
            _ if self.sources.len() > 1 => Err(Failure::usage(format!(
                "one source was expected, {} were given",
                self.sources.len()
            ))
            .hint("several images of one guest are read with -i disk")),
            InputMode::Ova => Ok(Input::Ova(first.clone())),
            InputMode::Vmx => Ok(Input::Vmx(first.clone())),
        }
    }

    /// The folder for the target.
    fn folder(&self, personality: Personality) -> Result<PathBuf, Failure> {
        if personality == Personality::VirtV2v && self.output.is_none() {
            return Err(Failure::usage(
                "-o is missing, and writing to libvirt, its default, is not there yet",
            )
            .hint("write to a folder with -o local -os DIR"));
        }
        let Some(folder) = &self.output_storage else {
            return Err(Failure::usage("-o local: the folder for the target is missing")
                .hint("name it with -os DIR"));
        };
        match std::fs::metadata(folder) {
            Ok(found) if found.is_dir() => Ok(folder.clone()),
            Ok(_) => Err(Failure::usage(format!("-os {}: not a folder", folder.display()))),
            Err(error) => Err(Failure::usage(format!("-os {}: {error}", folder.display()))
                .hint("make the folder first")),
        }
    }

    /// Everything that a conversion needs to know.
    pub(crate) fn request(&self, personality: Personality) -> Result<Request, Failure> {
        let networks: Vec<NetworkRule> =
            [&self.mac, &self.network, &self.bridge].into_iter().flatten().cloned().collect();
        if let Some(subject) = network::duplicate(&networks) {
            return Err(Failure::usage(format!("{subject} is used more than once")));
        }
        let input = self.input(personality)?;
        // A dry run writes nothing, so it may do without a folder.
        let folder = if self.dry_run && self.output_storage.is_none() {
            PathBuf::from(".")
        } else {
            self.folder(personality)?
        };
        Ok(Request {
            input,
            folder,
            format: self.output_format,
            preallocated: self.output_allocation == Allocation::Preallocated,
            name: self.output_name.clone(),
            root: self.root.clone().unwrap_or_default(),
            networks,
            keys: self.key.clone(),
            trim: !self.no_trim,
            initramfs: self.rebuild_initramfs,
            verify_manifest: !self.no_verify_manifest,
            meter: Meter::default(),
            force: self.force,
            appliance: places::settings(&self.machine),
            image: places::build_options(None)?,
        })
    }
}

/// What a source is, by its name and kind.
fn guess(path: &Path) -> InputMode {
    if path.to_str().is_some_and(tranship_nbd::Uri::is_like) {
        return InputMode::Disk;
    }
    let ending = path.extension().map(std::ffi::OsStr::to_ascii_lowercase).unwrap_or_default();
    match ending.to_str() {
        Some("vmx") => InputMode::Vmx,
        Some("ova" | "ovf") => InputMode::Ova,
        _ if path.is_dir() => InputMode::Ova,
        _ => InputMode::Disk,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, Parsed, parse};

    fn convert(personality: Personality, words: &str) -> ConvertArgs {
        let program = match personality {
            Personality::VirtV2v => "virt-v2v ",
            _ => "tranship convert ",
        };
        let words = format!("{program}{words}");
        let words = words.split_whitespace().map(Into::into).collect();
        match parse(personality, words).map_err(|failure| failure.render("p")) {
            Ok(Parsed::Command(Command::Convert(options))) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_whole_command_line_becomes_a_request() {
        let folder = tempfile::tempdir().unwrap();
        let words = format!(
            "-i ova web.ova -o local -os {} -of qcow2 -oa preallocated -on web01 --network \
             default --mac 52:54:00:12:34:56:bridge:br0 --root first --key all:key:x --no-fstrim \
             --rebuild-initramfs=guest --no-verify-manifest --force --memsize 1024 --smp 2 \
             --backend tcg --debug-gc --wrap --colours -q -v -x",
            folder.path().display()
        );
        let options = convert(Personality::VirtV2v, &words);
        let request = options.request(Personality::VirtV2v).unwrap();
        assert_eq!(request.input, Input::Ova("web.ova".into()));
        assert_eq!(request.folder, folder.path());
        assert_eq!(request.format, TargetFormat::Qcow2);
        assert!(request.preallocated && request.force && !request.trim);
        assert!(!request.verify_manifest);
        assert_eq!(request.name.as_deref(), Some("web01"));
        assert_eq!(request.root, RootChoice::First);
        assert_eq!(request.networks.len(), 2);
        assert_eq!(request.keys.len(), 1);
        assert_eq!(request.initramfs, InitramfsMode::Guest);
        assert_eq!((request.appliance.memory_mib, request.appliance.processors), (1024, 2));
        assert!(options.quiet && options.colors && options.talk.verbose && options.talk.trace);
    }

    #[test]
    fn sources_are_told_apart_by_their_names() {
        for (words, expected) in [
            ("a.OVA", Input::Ova("a.OVA".into())),
            ("/tmp", Input::Ova("/tmp".into())),
            ("a.vmx", Input::Vmx("a.vmx".into())),
            ("-i disk a.vmx", Input::Disks { paths: vec!["a.vmx".into()], format: None }),
            (
                "a.img b.img -if raw",
                Input::Disks {
                    paths: vec!["a.img".into(), "b.img".into()],
                    format: Some("raw".into()),
                },
            ),
        ] {
            let options = convert(Personality::Tranship, words);
            assert_eq!(options.input(Personality::Tranship).unwrap(), expected, "{words}");
        }
    }

    #[test]
    fn what_is_missing_or_too_much_is_said() {
        for (personality, words, expected) in [
            (Personality::Tranship, "", "no source"),
            (Personality::Tranship, "a.ova", "folder for the target is missing"),
            (Personality::Tranship, "a.ova -os /nowhere/at/all", "/nowhere/at/all"),
            (Personality::Tranship, "a.ova -os /etc/passwd", "not a folder"),
            (Personality::Tranship, "a.ova b.ova -os /tmp", "2 were given"),
            (Personality::Tranship, "a.ova -if raw -os /tmp", "-if is for -i disk"),
            (Personality::Tranship, "a.ova -os /tmp -n x -n y", "more than once"),
            (Personality::VirtV2v, "guest -o local -os /tmp", "-i is missing"),
            (Personality::VirtV2v, "-i ova a.ova -os /tmp", "-o is missing"),
        ] {
            let failure = convert(personality, words).request(personality).unwrap_err();
            assert!(failure.message().contains(expected), "{words}: {}", failure.message());
            assert_eq!(failure.exit_code(), 2);
        }
    }

    #[test]
    fn capabilities_are_asked_for_by_the_option_alone() {
        assert!(convert(Personality::VirtV2v, "--machine-readable").asks_for_capabilities());
        let more = convert(Personality::VirtV2v, "--machine-readable -i ova a.ova");
        assert!(!more.asks_for_capabilities());
        let events = convert(Personality::VirtV2v, "--machine-readable=fd:3");
        assert!(!events.asks_for_capabilities());
    }
}
