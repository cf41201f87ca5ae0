// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU with KVM and nothing of ours around it: raw files, the appliance's kernel, initramfs and
//! tools, and its two ports.

use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tranship_protocol::{
    BULK_PORT, CONTROL_PORT, Call, Frame, FrameKind, TOOLS_SERIAL, disk_serial,
};

/// The kernel's words: those of our monitor, and that nothing is behind a keyboard's controller.
const WORDS: &str = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off cryptomgr.notests \
    audit=0 8250.nr_uarts=1 i8042.noaux i8042.nokbd random.trust_cpu=on selinux=0 no_timer_check \
    tsc=reliable net.ifnames=0 pci=noearly";
/// Far longer than any answer takes.
const PATIENCE: Duration = Duration::from_mins(2);

/// The appliance.
pub(crate) struct Files {
    kernel: String,
    initramfs: String,
    tools: String,
}

impl Files {
    pub(crate) fn find() -> Self {
        let mut command = Command::new(std::env::var_os("TRANSHIP_BIN").unwrap());
        let output = command.args(["appliance", "build", "--json"]).output().unwrap();
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        let path = |name: &str| {
            let files = told["files"].as_array().unwrap();
            let file = files.iter().find(|file| file["name"] == name).unwrap();
            file["path"].as_str().unwrap().to_owned()
        };
        Self { kernel: path("kernel"), initramfs: path("initramfs"), tools: path("tools") }
    }
}

/// A running machine; dropping it ends it.
pub(crate) struct Qemu {
    child: Child,
    qmp: Qmp,
    control: UnixStream,
    bulk: UnixStream,
    calls: u64,
    /// From its start to the agent's word.
    pub(crate) took: Duration,
    _folder: tempfile::TempDir,
}

impl Qemu {
    /// A machine that boots, up to the agent's first word.
    pub(crate) fn cold(kind: &str, files: &Files, disks: &[PathBuf]) -> Self {
        let begun = Instant::now();
        let mut machine = Self::start(kind, files, disks, &[]);
        let hello = Frame::read_from(&mut machine.control).unwrap().unwrap();
        assert_eq!(hello.kind, FrameKind::Hello);
        machine.took = begun.elapsed();
        machine
    }

    /// A machine that was saved, up to the agent's first answer.
    pub(crate) fn warm(kind: &str, files: &Files, disks: &[PathBuf], saved: &Path) -> Self {
        let begun = Instant::now();
        let mut machine = Self::start(kind, files, disks, &["-incoming", "defer"]);
        machine.qmp.transfer("migrate-incoming", saved);
        machine.qmp.command("cont", &json!({}));
        machine.call(&Call::Ping);
        machine.took = begun.elapsed();
        machine
    }

    fn start(kind: &str, files: &Files, disks: &[PathBuf], more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = |name: &str| {
            let path = folder.path().join(name);
            (UnixListener::bind(&path).unwrap(), path.display().to_string())
        };
        let ((control, control_path), (bulk, bulk_path)) = (listen("control"), listen("bulk"));
        let (qmp, qmp_path) = listen("qmp");
        let machine = match kind {
            // Whatever it can do without, for a start as quick as it can be. It cannot do without a
            // clock: the kernel would look for one again and again, for seconds.
            "microvm" => {
                "microvm,acpi=on,pcie=on,pit=off,pic=off,rtc=on,x-option-roms=off,\
                 dump-guest-core=off"
            }
            "q35" => "q35,sata=off,smbus=off,smm=off,vmport=off,hpet=off,dump-guest-core=off",
            other => panic!("unknown kind {other}"),
        };
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "kvm", "-machine", machine, "-cpu", "host"]);
        command.args(["-smp", "1", "-m", &crate::MEMORY.to_string(), "-nodefaults"]);
        command.args(["-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-bios", "qboot.rom", "-serial", "file:/dev/null"]);
        command.args(["-kernel", &files.kernel, "-initrd", &files.initramfs, "-append", WORDS]);
        command.args(["-chardev", &format!("socket,id=qmp,path={qmp_path}")]);
        command.args(["-mon", "chardev=qmp,mode=control"]);
        command.args(["-device", "virtio-serial-pci,id=serial"]);
        for (id, port, path) in
            [("control", CONTROL_PORT, control_path), ("bulk", BULK_PORT, bulk_path)]
        {
            command.args(["-chardev", &format!("socket,id={id},path={path}")]);
            command.args(["-device", &format!("virtserialport,chardev={id},name={port}")]);
        }
        let tools = (PathBuf::from(&files.tools), TOOLS_SERIAL.to_owned());
        let numbered = disks.iter().cloned().zip((0..).map(disk_serial));
        for (path, serial) in std::iter::once(tools).chain(numbered) {
            let node = json!({
                "driver": "raw",
                "node-name": serial,
                "read-only": true,
                "file": { "driver": "file", "filename": path, "locking": "off" },
            });
            command.args(["-blockdev", &node.to_string()]);
            command.args(["-device", &format!("virtio-blk-pci,drive={serial},serial={serial}")]);
        }
        let child = command.args(more).stdin(Stdio::null()).spawn().unwrap();
        let (control, bulk) = (control.accept().unwrap().0, bulk.accept().unwrap().0);
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        bulk.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Qmp { stream: BufReader::new(qmp.accept().unwrap().0) };
        qmp.command("qmp_capabilities", &json!({}));
        let took = Duration::ZERO;
        Self { child, qmp, control, bulk, calls: 0, took, _folder: folder }
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Saves the machine, with what a restored one is to have at hand.
    pub(crate) fn save(&mut self, to: &Path) {
        self.call(&Call::Prepare);
        self.qmp.command("stop", &json!({}));
        self.qmp.transfer("migrate", to);
    }

    /// Has the agent do something.
    fn call(&mut self, call: &Call) -> u64 {
        self.calls += 1;
        Frame::encode(self.calls, call).unwrap().write_to(&mut self.control).unwrap();
        loop {
            let frame = Frame::read_from(&mut self.control).unwrap().unwrap();
            match frame.kind {
                FrameKind::Reply => return self.calls,
                FrameKind::Failure => {
                    panic!("{call:?}: {}", frame.decode::<tranship_protocol::Failure>().unwrap())
                }
                _ => {}
            }
        }
    }

    /// What a line for the appliance's shell prints.
    pub(crate) fn run(&mut self, line: &str) -> String {
        let arguments = ["busybox", "sh", "-c", line].map(str::to_owned).to_vec();
        let id = self.call(&Call::Run { arguments, in_guest: false, input: false, timeout: 0 });
        let mut printed = Vec::new();
        loop {
            let frame = Frame::read_from(&mut self.bulk).unwrap().unwrap();
            match frame.kind {
                FrameKind::Data if frame.id == id => printed.extend(frame.body),
                FrameKind::End if frame.id == id => return String::from_utf8(printed).unwrap(),
                _ => {}
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The line on which QEMU is asked for things.
struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    fn command(&mut self, name: &str, arguments: &Value) -> Value {
        let command = json!({ "execute": name, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{command}").unwrap();
        loop {
            let mut answer = String::new();
            assert!(self.stream.read_line(&mut answer).unwrap() > 0, "QEMU is gone");
            let answer: Value = serde_json::from_str(&answer).unwrap();
            assert!(answer.get("error").is_none(), "{name}: {answer}");
            if let Some(result) = answer.get("return") {
                return result.clone();
            }
        }
    }

    /// Writes a machine to a file or reads it from there, in the quickest way that it has.
    fn transfer(&mut self, command: &str, path: &Path) {
        if command == "migrate" {
            fs::write(path, "").unwrap();
        }
        let ability = json!({ "capability": "mapped-ram", "state": true });
        self.command("migrate-set-capabilities", &json!({ "capabilities": [ability] }));
        self.command("migrate-set-parameters", &json!({ "max-bandwidth": 1_u64 << 40 }));
        self.command(command, &json!({ "uri": format!("file:{}", path.display()) }));
        loop {
            let answer = self.command("query-migrate", &json!({}));
            match answer["status"].as_str() {
                Some("completed") => return,
                Some("failed") => panic!("{command}: {answer}"),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}
