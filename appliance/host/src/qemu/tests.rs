// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A real QEMU with a kernel of a few instructions.

use super::Qemu;
use super::arguments::tests::spec;
use crate::backend::{Backend, Machine, MachineSpec, SnapshotFiles};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Where the kernel is in memory, and in it: page tables, and the note for debuggers.
const BASE: u32 = 0x10_0000;
const TABLES: u32 = 0x1000;
const NOTE: u32 = 0x3000;
const LENGTH: u32 = 0x4000;
const TEXT: &[u8] = b"OSRELEASE=test\n";

/// What the kernel does once it is in long mode.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Halt,
    /// By a fault without a handler.
    Reset,
}

fn kernel(then: Then) -> Vec<u8> {
    let at = |offset: u32| (BASE + offset).to_le_bytes();
    let mut code = vec![0xb8]; // mov eax, TABLES
    code.extend(at(TABLES));
    code.extend([0x0f, 0x22, 0xd8]); // mov cr3, eax
    code.extend([0xb8, 0x20, 0, 0, 0, 0x0f, 0x22, 0xe0]); // cr4: physical address extension
    code.extend([0xb9, 0x80, 0, 0, 0xc0, 0xb8, 0, 1, 0, 0, 0x31, 0xd2, 0x0f, 0x30]); // EFER.LME
    code.extend([0xb8, 1, 0, 0, 0x80, 0x0f, 0x22, 0xc0]); // cr0: paging
    if then == Then::Reset {
        code.extend([0x0f, 0x01, 0x1d]); // lidt of zeroes
        code.extend(at(LENGTH - 16));
        code.push(0xcc); // int3
    }
    code.extend([0xf4, 0xeb, 0xfd]); // hlt, and again

    let mut file = vec![0; (TABLES + LENGTH) as usize];
    let mut put = |at: u32, what: &[u8]| {
        file[at as usize..][..what.len()].copy_from_slice(what);
    };
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &u64::from(BASE).to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2]);
    for (at, kind, offset, length, align) in
        [(64, 1_u32, TABLES, LENGTH, TABLES), (120, 4, 0x200, 24, 4)]
    {
        put(at, &kind.to_le_bytes());
        put(at + 4, &7_u32.to_le_bytes());
        put(at + 8, &u64::from(offset).to_le_bytes());
        put(at + 16, &u64::from(BASE).to_le_bytes());
        put(at + 24, &u64::from(BASE).to_le_bytes());
        put(at + 32, &u64::from(length).to_le_bytes());
        put(at + 40, &u64::from(length).to_le_bytes());
        put(at + 48, &u64::from(align).to_le_bytes());
    }
    // The entry by PVH: name of 4 bytes, number of 8, type 18.
    put(0x200, &[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0]);
    put(0x20c, b"Xen\0");
    put(0x210, &u64::from(BASE).to_le_bytes());
    let memory = |offset| TABLES + offset;
    put(memory(0), &code);
    put(memory(TABLES), &u64::from(BASE + 0x2003).to_le_bytes());
    put(memory(0x2000), &0x83_u64.to_le_bytes());
    put(memory(NOTE), &[11, 0, 0, 0, u8::try_from(TEXT.len()).unwrap(), 0, 0, 0, 0, 0, 0, 0]);
    put(memory(NOTE + 12), b"VMCOREINFO\0\0");
    put(memory(NOTE + 24), TEXT);
    file
}

/// QEMU, a folder with what it boots from, and the far ends of the ports.
struct Bench {
    qemu: Qemu,
    folder: tempfile::TempDir,
    ports: Vec<UnixStream>,
}

impl Bench {
    fn new(then: Then) -> Option<Self> {
        let Some(program) = Qemu::find() else {
            eprintln!("skipped: QEMU is not installed");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        for (name, what) in [("kernel", kernel(then)), ("rest", vec![0; 4096])] {
            std::fs::write(folder.path().join(name), what).unwrap();
        }
        Some(Self { qemu: Qemu::new(program, false), folder, ports: Vec::new() })
    }

    fn spec(&mut self) -> MachineSpec {
        let path = |name| self.folder.path().join(name);
        let (control, far_control) = UnixStream::pair().unwrap();
        let (bulk, far_bulk) = UnixStream::pair().unwrap();
        self.ports.extend([far_control, far_bulk]);
        MachineSpec {
            kernel: path("kernel"),
            initramfs: path("rest"),
            tools: path("rest"),
            memory_mib: 32,
            disk_socket: path("nobody"),
            control,
            bulk,
            ..spec(0)
        }
    }

    fn start(&mut self, from: Option<SnapshotFiles>) -> crate::Result<Box<dyn Machine>> {
        let spec = self.spec();
        self.qemu.start(spec, from)
    }
}

fn files(state: &Path) -> SnapshotFiles {
    let open = |write| File::options().read(true).write(write).create(write).open(state).unwrap();
    let state = if state.exists() { open(false) } else { open(true) };
    SnapshotFiles { memory: state.try_clone().unwrap(), state }
}

/// A core file of the machine, once its kernel has come to long mode; before it is none of 64
/// bits.
fn core(machine: &dyn Machine) -> Vec<u8> {
    for _ in 0..500 {
        let file = tempfile::tempfile().unwrap();
        machine.dump(&file, Some((u64::from(BASE + NOTE), 0x400))).unwrap();
        let mut all = Vec::new();
        let length = file.metadata().unwrap().len();
        all.resize(usize::try_from(length).unwrap(), 0);
        file.read_exact_at(&mut all, 0).unwrap();
        if all[4] == 2 {
            return all;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the kernel did not start: {}", machine.console());
}

fn with_note(core: &[u8]) -> usize {
    core.windows(TEXT.len()).filter(|window| *window == TEXT).count()
}

#[test]
fn a_machine_goes_on_after_it_was_saved_and_where_it_was_saved() {
    let Some(mut bench) = Bench::new(Then::Halt) else { return };
    let state = bench.folder.path().join("state");
    let machine = bench.start(None).unwrap();
    // In the memory, and behind the processors' notes.
    assert_eq!(with_note(&core(&*machine)), 2);
    machine.save(&files(&state)).unwrap();
    assert!(machine.ended().is_none());
    core(&*machine);
    drop(machine);

    let machine = bench.start(Some(files(&state))).unwrap();
    assert_eq!(with_note(&core(&*machine)), 2);
    assert!(machine.ended().is_none() && !machine.wait(Duration::from_millis(1)));
    machine.kill();
    assert!(machine.wait(Duration::from_secs(10)));

    let mut whole = Vec::new();
    File::open(&state).unwrap().read_to_end(&mut whole).unwrap();
    for damaged in [&b""[..], b"nonsense", &whole[..whole.len() / 2]] {
        let path = bench.folder.path().join("damaged");
        std::fs::write(&path, damaged).unwrap();
        let error = bench.start(Some(files(&path))).unwrap_err();
        assert!(error.to_string().contains("migrate-incoming"), "{error}");
    }
}

#[test]
fn memory_outlives_the_end_of_the_guest() {
    let Some(mut bench) = Bench::new(Then::Reset) else { return };
    let machine = bench.start(None).unwrap();
    assert!(machine.wait(Duration::from_secs(30)), "{}", machine.console());
    assert_eq!(machine.ended().as_deref(), Some("the machine ended: guest-reset"));
    assert_eq!(with_note(&core(&*machine)), 2);
}

#[test]
fn a_disk_that_cannot_be_had_leaves_nothing_behind() {
    let Some(mut bench) = Bench::new(Then::Halt) else { return };
    let machine = bench.start(None).unwrap();
    let disk = spec(1).disks.remove(0);
    for _ in 0..2 {
        let error = machine.add_disk(&disk).unwrap_err().to_string();
        assert!(error.contains("blockdev-add: Failed to connect"), "{error}");
    }
    let error = machine.remove_disk(&disk.serial).unwrap_err().to_string();
    assert_eq!(error, "the machine has no disk \"tranship-0\"");
    machine.dump(&File::open("/dev/null").unwrap(), None).unwrap_err();
    assert!(machine.ended().is_none());
}

#[test]
fn a_machine_is_the_same_the_next_time_and_another_with_other_words() {
    let program = tempfile::NamedTempFile::new().unwrap();
    let qemu = Qemu::new(program.path().into(), false);
    let first = qemu.identity(&spec(0)).unwrap();
    assert_eq!(qemu.identity(&spec(0)).unwrap(), first);
    let other = MachineSpec { append: "debug".into(), ..spec(0) };
    assert_ne!(qemu.identity(&other).unwrap(), first);
    assert_ne!(Qemu::new(program.path().into(), true).identity(&spec(0)).unwrap(), first);
    std::fs::write(program.path(), "new").unwrap();
    assert_ne!(qemu.identity(&spec(0)).unwrap(), first);
    assert!(Qemu::new("/nowhere/qemu".into(), false).identity(&spec(0)).is_none());
}

#[test]
fn the_machine_of_rhel_boots_each_time() {
    let qemu = Qemu::new("/usr/libexec/qemu-kvm".into(), true);
    assert_eq!(qemu.most_plugged(), 0);
    assert!(qemu.identity(&spec(0)).is_none());
}
