// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What callers rely on: exit codes, streams and texts of the program as a whole.
//!
//! Nothing here starts the appliance.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_tranship");

/// Folder with links to the program, and for whatever it writes.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn link(&self, name: &str) -> PathBuf {
        let link = self.path().join(name);
        if !link.exists() {
            symlink(PROGRAM, &link).unwrap();
        }
        link
    }

    /// Runs the program by `name` with a clean environment.
    fn run(&self, name: &str, words: &[&str]) -> Run {
        self.run_with_input(name, words, b"")
    }

    fn run_with_input(&self, name: &str, words: &[&str], input: &[u8]) -> Run {
        let mut child = Command::new(self.link(name))
            .args(words)
            .env_clear()
            .env("HOME", self.path())
            .env("PATH", "/usr/bin:/bin")
            .current_dir(self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A program that fails early reads none of it.
        let _ = child.stdin.take().unwrap().write_all(input);
        Run::of(child.wait_with_output().unwrap())
    }
}

#[derive(Debug)]
struct Run {
    code: i32,
    out: String,
    err: String,
}

impl Run {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// An OVF that names a disk which is not read by what is tested here.
fn ovf(place: &Place) -> PathBuf {
    let folder = place.path().join("guest");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("disk.vmdk"), [0; 512]).unwrap();
    fs::write(
        folder.join("guest.ovf"),
        r#"<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
  xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
 <References><File ovf:href="disk.vmdk" ovf:id="file1"/></References>
 <DiskSection><Info>d</Info><Disk ovf:capacity="1048576" ovf:diskId="vmdisk1" ovf:fileRef="file1"
   ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/></DiskSection>
 <VirtualSystem ovf:id="web01"><Info>v</Info><Name>web01</Name>
  <VirtualHardwareSection><Info>h</Info>
   <Item><rasd:ElementName>cpu</rasd:ElementName><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
   <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ElementName>mem</rasd:ElementName><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>1024</rasd:VirtualQuantity></Item>
   <Item><rasd:Address>0</rasd:Address><rasd:ElementName>scsi</rasd:ElementName><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>lsilogic</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>
   <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:ElementName>disk</rasd:ElementName><rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource><rasd:InstanceID>4</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
  </VirtualHardwareSection>
 </VirtualSystem>
</Envelope>
"#,
    )
    .unwrap();
    folder
}

#[test]
fn mistakes_in_the_command_line_end_with_2_and_name_the_mistake() {
    let place = Place::new();
    let cases: &[(&str, &[&str], &str)] = &[
        ("tranship", &[], "no command was given"),
        ("tranship", &["batch"], "'batch'"),
        ("tranship", &["convert", "--nonsense"], "'--nonsense'"),
        ("tranship", &["convert", "a.ova"], "-os DIR"),
        ("tranship", &["convert", "a.ova", "-os", "/nowhere/at/all"], "/nowhere/at/all"),
        (
            "tranship",
            &["convert", "-of", "raw", "-of", "raw"],
            "-of (--output-format) is used more",
        ),
        ("tranship", &["convert", "-o", "openstack"], "openstack is not there yet"),
        ("tranship", &["convert", "-i", "libvirt", "x"], "libvirt is not there yet"),
        ("tranship", &["convert", "-it", "vddk"], "-it is an option of virt-v2v"),
        ("tranship", &["convert", "--root", "ask", "x"], "nobody is asked"),
        ("tranship", &["convert", "--root-password", "x"], "--root-password"),
        ("tranship", &["convert", "--mac", "52:54:00:00:00:01:ip:1.2.3.4"], "Windows"),
        ("tranship", &["convert", "--key", "all:clevis", "x"], "Clevis"),
        ("tranship", &["convert", "--backend", "xen", "x"], "xen"),
        // -os is never -o s, and -o s is never -os.
        ("tranship", &["convert", "-o", "s", "x"], "'s' for '--output <MODE>'"),
        ("virt-v2v", &["-i", "ova", "x.ova", "-os", "."], "-o is missing"),
        ("virt-v2v", &["guest"], "-i is missing"),
        ("virt-v2v", &["convert", "x"], "-i is missing"),
        ("virt-v2v", &["-ic", "vpx://x", "guest"], "-ic is an option"),
        ("nbdkit", &["x"], "cannot be called as nbdkit"),
        ("virt-customize", &["-a", "x"], "cannot be called as virt-customize"),
        ("tranship", &["shell", "--ro", "--rw"], "cannot be used with"),
        ("tranship", &["verify-boot", "x.xml", "--within", "soon"], "soon"),
    ];
    for (name, words, expected) in cases {
        let run = place.run(name, words);
        assert_eq!(run.code, 2, "{name} {words:?}: {run:?}");
        assert!(run.err.contains(expected), "{name} {words:?}: {run:?}");
        assert!(run.out.is_empty(), "{name} {words:?}: {run:?}");
        let program = if *name == "virt-v2v" { "virt-v2v" } else { "tranship" };
        assert!(run.err.starts_with(&format!("{program}: error: ")), "{run:?}");
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    let place = Place::new();
    for (name, words, expected) in [
        ("tranship", &["--help"][..], "verify-boot"),
        ("tranship", &["convert", "--help"], "[also: -os]"),
        ("virt-v2v", &["--help"], "Usage: virt-v2v"),
        ("guestfish", &["--help"], "--inspector"),
        ("tranship", &["--version"], concat!("tranship ", env!("CARGO_PKG_VERSION"))),
        ("virt-v2v", &["-V"], concat!("virt-v2v ", env!("CARGO_PKG_VERSION"))),
        ("tranship", &["appliance", "--help"], "bench"),
    ] {
        let run = place.run(name, words);
        assert_eq!(run.code, 0, "{run:?}");
        assert!(run.out.contains(expected) && run.err.is_empty(), "{words:?}: {run:?}");
    }
}

#[test]
fn hidden_options_of_virt_v2v_are_not_advertised() {
    let run = Place::new().run("virt-v2v", &["--help"]);
    assert!(!run.out.contains("debug-gc") && !run.out.contains("--wrap"), "{}", run.out);
}

#[test]
fn capabilities_are_listed_one_a_line() {
    let place = Place::new();
    for (name, words) in [
        ("virt-v2v", &["--machine-readable"][..]),
        ("tranship", &["convert", "--machine-readable"]),
    ] {
        let run = place.run(name, words);
        assert_eq!(run.code, 0, "{run:?}");
        let lines: Vec<&str> = run.out.lines().collect();
        for expected in ["virt-v2v", "input:ova", "output:local", "convert:linux"] {
            assert!(lines.contains(&expected), "{expected}: {lines:?}");
        }
        for absent in ["convert:windows", "output:libvirt", "vddk", "in-place"] {
            assert!(!lines.contains(&absent), "{absent}: {lines:?}");
        }
    }
}

#[test]
fn the_source_is_printed_as_text_or_json() {
    let place = Place::new();
    let guest = ovf(&place);
    let guest = guest.to_str().unwrap();
    let text = place.run("virt-v2v", &["-i", "ova", guest, "--print-source", "--debug-gc"]);
    assert_eq!(text.code, 0, "{text:?}");
    assert!(text.out.contains("source name: web01\n"), "{text:?}");
    assert!(text.out.contains("1073741824 (bytes)"), "{text:?}");
    let json = place.run("tranship", &["convert", guest, "--print-source", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(value["name"], "web01");
    assert_eq!(value["vcpus"], 2);
}

#[test]
fn events_end_with_the_exit_code() {
    let place = Place::new();
    let words = ["convert", "-i", "ova", "missing.ova", "--print-source"];
    let mut with_events = words.to_vec();
    with_events.push("--machine-readable=file:events");
    let run = place.run("tranship", &with_events);
    let events = fs::read_to_string(place.path().join("events")).unwrap();
    let last: serde_json::Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "run.finished");
    assert_eq!(last["exit_code"], run.code);
    assert_ne!(run.code, 0);
    assert!(run.err.contains("missing.ova"), "{run:?}");

    // On standard error events are alone.
    with_events.pop();
    with_events.push("--machine-readable=stream:stderr");
    let alone = place.run("tranship", &with_events);
    assert_eq!(alone.code, run.code);
    for line in alone.err.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|_| panic!("{line}"));
    }
}

#[test]
fn a_descriptor_that_is_not_open_is_refused() {
    let words = ["convert", "x.ova", "--print-source", "--machine-readable=fd:99"];
    let run = Place::new().run("tranship", &words);
    assert_eq!(run.code, 2, "{run:?}");
    assert!(run.err.contains("descriptor 99"), "{run:?}");
}

#[test]
fn completions_and_manual_come_from_the_same_definition() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let run = place.run("tranship", &["completions", shell]);
        assert_eq!(run.code, 0, "{run:?}");
        for option in ["output-storage", "print-source", "console-log"] {
            assert!(run.out.contains(option), "{shell}: {option}");
        }
    }
    let run = place.run("tranship", &["man", "pages"]);
    assert_eq!(run.code, 0, "{run:?}");
    let page = fs::read_to_string(place.path().join("pages/tranship-convert.1")).unwrap();
    assert!(page.contains("\\-\\-output\\-storage") && page.contains("\\-os"), "{page}");
    assert!(page.starts_with(".ie") || page.contains(".TH"), "{page}");
    for name in ["tranship", "tranship-shell", "tranship-appliance-bench", "tranship-verify-boot"] {
        assert!(place.path().join(format!("pages/{name}.1")).exists(), "{name}");
    }
    let main = place.run("tranship", &["man"]);
    assert!(main.out.contains(".TH"), "{main:?}");
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let command = format!("{PROGRAM} completions bash | head -n 1; echo ${{PIPESTATUS[0]}}");
    let output = Command::new("bash").args(["-c", &command]).output().unwrap();
    let run = Run::of(output);
    assert_eq!(run.out.lines().last(), Some("0"), "{run:?}");
    assert!(run.err.is_empty(), "{run:?}");
}

#[test]
fn shell_scripts_stop_at_the_first_failure_and_say_where() {
    let place = Place::new();
    let run = place.run_with_input("guestfish", &[], b"echo one\n\n# no\nnonsense\necho two\n");
    assert_eq!(run.code, 1, "{run:?}");
    assert_eq!(run.out, "one\n");
    assert!(
        run.err.starts_with("*stdin*:4: libguestfs: error: nonsense: unknown command"),
        "{run:?}"
    );
    fs::write(
        place.path().join("script"),
        "echo a\n-nonsense\n!exit 0\n<!echo echo b\necho c | tr c d\nquit\necho e\n",
    )
    .unwrap();
    let run = place.run("tranship", &["shell", "-f", "script"]);
    assert_eq!((run.code, run.out.as_str()), (0, "a\nb\nd\n"), "{run:?}");
    assert!(run.err.starts_with("script:2: tranship: error: nonsense"), "{run:?}");
    let run = place.run_with_input("tranship", &["shell"], b"!exit 3\necho x\n");
    assert_eq!((run.code, run.out.as_str()), (1, ""), "{run:?}");
}

#[test]
fn shell_commands_on_the_command_line_are_separated_by_colons() {
    let place = Place::new();
    let run = place.run("guestfish", &["echo", "a  b", ":", "echo", "|", "c"]);
    assert_eq!((run.code, run.out.as_str()), (0, "a  b\n| c\n"), "{run:?}");
    let run = place.run("guestfish", &["--", "-nonsense", ":", "echo", "ok"]);
    assert_eq!((run.code, run.out.as_str()), (0, "ok\n"), "{run:?}");
    let run = place.run("guestfish", &["echo", ":", ":"]);
    assert_eq!(run.code, 1);
    assert!(run.err.contains("empty command on command line"), "{run:?}");
}

#[test]
fn shell_commands_check_their_arguments_before_anything_else() {
    let place = Place::new();
    for (words, expected) in [
        (&["ls"][..], "usage: ls directory"),
        (&["ls", "/", "/"], "incorrect number of arguments"),
        (&["ls", "etc"], "ls: path must start with a / character"),
        (&["ls", "/"], "ls: call launch before using this function"),
        (&["vfs-type", "sda1"], "sda1: expecting a device name"),
        (&["is-file", "/x", "followsymlinks:maybe"], "invalid boolean value"),
        (&["is-file", "/x", "nope:1"], "unknown optional argument \"nope\""),
        (&["add", "missing.img"], "missing.img"),
        (&["help", "nope"], "nope: unknown command"),
    ] {
        let run = place.run("guestfish", words);
        assert_eq!(run.code, 1, "{words:?}: {run:?}");
        assert!(run.err.contains(expected), "{words:?}: {run:?}");
    }
    let help = place.run("guestfish", &["help"]);
    assert!(help.out.contains("list-filesystems") && help.code == 0, "{help:?}");
}

#[test]
fn a_missing_disk_ends_the_shell_before_it_starts() {
    let run = Place::new().run("guestfish", &["-a", "nowhere.qcow2", "echo", "x"]);
    assert_eq!((run.code, run.out.as_str()), (1, ""), "{run:?}");
    assert!(run.err.contains("nowhere.qcow2"), "{run:?}");
}

#[test]
fn keys_never_show_in_messages() {
    for key in ["geheim", "all:passwort:geheim", "all:key:geheim"] {
        let run = Place::new().run("tranship", &["convert", "--key", key, "-v", "--nope"]);
        assert_eq!(run.code, 2);
        assert!(!run.err.contains("geheim"), "{run:?}");
    }
}
