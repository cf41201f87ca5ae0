// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::memory::{Backing, Memory};
use object::elf::{FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, Object, ObjectSegment};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

const NOTE: u64 = 0x30_0000;
const TOP: u64 = 0x20_0000;
const STEXT: u64 = 0x10_0000;

/// Memory of a made-up kernel that lies 1 MiB below where its symbols are, with a sentence in
/// its text.
fn kernel() -> Memory {
    let memory = Memory::new(64, &Backing::Anonymous).unwrap();
    let put = |at, bytes: &[u8]| memory.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    let text = b"OSRELEASE=6.1.0\nNUMBER(phys_base)=-1048576\n\
        SYMBOL(_stext)=ffffffff80200000\nSYMBOL(init_top_pgt)=ffffffff80300000\n\
        NUMBER(KERNEL_IMAGE_SIZE)=1073741824\n";
    let size = u32::try_from(text.len()).unwrap();
    let mut note = [11_u32, size, 0].map(u32::to_le_bytes).concat();
    note.extend_from_slice(b"VMCOREINFO\0\0");
    note.extend_from_slice(text);
    put(NOTE, &note);
    put(STEXT, b"Linux version 6.1.0-made-up");
    put(TOP + 273 * 8, &0x40_0001_u64.to_le_bytes());
    put(0x40_0000, &1_u64.to_le_bytes());
    put((64 << 20) - 1, &[0x5a]);
    memory
}

fn processor(rip: u64) -> ProcessorRegisters {
    let mut processor = ProcessorRegisters::default();
    processor.general.rip = rip;
    processor.general.rsp = 0xffff_ffff_8020_4000;
    processor.special.cr3 = TOP;
    processor.special.cs = tranship_kvm::flat_segment(0x10, 11, true);
    processor
}

fn written(memory: &Memory, vmcoreinfo: Option<(u64, u64)>) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let processors = [processor(0xffff_ffff_8020_0000), processor(0xffff_ffff_8020_1000)];
    let size = write(&memory.ram, &processors, vmcoreinfo, file.as_file()).unwrap();
    assert_eq!(file.as_file().metadata().unwrap().len(), size);
    file
}

#[test]
fn another_reader_finds_memory_registers_and_the_kernels_note() {
    let memory = kernel();
    let file = written(&memory, Some((NOTE, 4096)));
    let bytes = std::fs::read(file.path()).unwrap();
    let header = FileHeader64::<LittleEndian>::parse(&*bytes).unwrap();
    let segments = header.program_headers(LittleEndian, &*bytes).unwrap();
    let loads: Vec<_> = segments
        .iter()
        .filter(|segment| segment.p_type(LittleEndian) == PT_LOAD)
        .map(|segment| {
            let [virt, phys, size] = [
                segment.p_vaddr(LittleEndian),
                segment.p_paddr(LittleEndian),
                segment.p_filesz(LittleEndian),
            ];
            (virt, phys, size)
        })
        .collect();
    let whole = 64 << 20;
    assert_eq!(
        loads,
        [(0xffff_ffff_8020_0000, STEXT, whole - STEXT), (0xffff_8880_0000_0000, 0, whole)]
    );
    let mut notes = Vec::new();
    for segment in segments.iter().filter(|segment| segment.p_type(LittleEndian) == PT_NOTE) {
        let mut iterator = segment.notes(LittleEndian, &*bytes).unwrap().unwrap();
        while let Some(note) = iterator.next().unwrap() {
            notes.push((note.name().to_vec(), note.n_type(LittleEndian).0, note.desc().to_vec()));
        }
    }
    let names: Vec<_> =
        notes.iter().map(|(name, kind, _)| (String::from_utf8_lossy(name), *kind)).collect();
    let expected = [("CORE", 1), ("CORE", 1), ("QEMU", 0), ("QEMU", 0), ("VMCOREINFO", 0)];
    assert!(names.iter().map(|(name, kind)| (&**name, *kind)).eq(expected), "{names:?}");
    // The instruction pointer is register 16 of 27.
    let at = 112 + 16 * 8;
    assert_eq!(notes[1].2[at..at + 8], 0xffff_ffff_8020_1000_u64.to_le_bytes());
    assert!(notes[4].2.starts_with(b"OSRELEASE=6.1.0\n"));

    let core = object::File::parse(&*bytes).unwrap();
    let find = |address: u64, len: u64| {
        let mut found = core.segments().filter_map(|s| s.data_range(address, len).ok().flatten());
        found.next().unwrap().to_vec()
    };
    assert_eq!(find(0xffff_ffff_8020_0000, 19), b"Linux version 6.1.0");
    assert_eq!(find(0xffff_8880_0000_0000 + STEXT, 5), b"Linux");
    assert_eq!(bytes.last(), Some(&0x5a));
}

#[test]
fn what_is_zero_takes_no_room() {
    let memory = kernel();
    let file = written(&memory, None);
    let found = file.as_file().metadata().unwrap();
    assert!(found.len() > 64 << 20);
    assert!(found.blocks() * 512 < 1 << 20, "{} blocks", found.blocks());
}

#[test]
fn without_a_word_of_the_kernel_virtual_addresses_are_physical() {
    let memory = kernel();
    for nonsense in [None, Some((NOTE + 4, 4096)), Some((u64::MAX, u64::MAX)), Some((0, 0))] {
        let file = written(&memory, nonsense);
        let bytes = std::fs::read(file.path()).unwrap();
        let core = object::File::parse(&*bytes).unwrap();
        let found: Vec<_> = core.segments().map(|s| (s.address(), s.size())).collect();
        assert_eq!(found, [(0, 64 << 20)], "{nonsense:?}");
    }
}

#[test]
fn runs_end_at_pages_of_zeroes() {
    let mut bytes = vec![0; 5 * PAGE + 10];
    assert!(runs(&bytes).is_empty());
    bytes[PAGE] = 1;
    bytes[3 * PAGE - 1] = 1;
    bytes[5 * PAGE + 9] = 1;
    let found: Vec<_> = runs(&bytes).iter().map(|(at, run)| (*at, run.len())).collect();
    assert_eq!(found, [(PAGE, 2 * PAGE), (5 * PAGE, 10)]);
}

#[test]
fn a_full_disk_is_an_error() {
    let memory = kernel();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let error = write(&memory.ram, &[], None, &full).unwrap_err();
    assert_eq!(error.to_string(), "writing the core file's headers");
}

/// The output of a debugger's program; `None`, told, where it is not installed.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).args(arguments).output() {
        Ok(output) => Some(
            String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr),
        ),
        Err(error) => {
            eprintln!("skipped: {program}: {error}");
            None
        }
    }
}

#[test]
fn readelf_and_gdb_understand_it() {
    let memory = kernel();
    let file = written(&memory, Some((NOTE, 4096)));
    let path = file.path().to_str().unwrap();
    if let Some(text) = output("readelf", &["--all", path]) {
        assert!(!text.contains("Warning") && !text.contains("Error"), "{text}");
        assert!(text.contains("NT_PRSTATUS (prstatus structure)"), "{text}");
    }
    let core = format!("core-file {path}");
    let commands = [&core[..], "info threads", "x/s 0xffffffff80200000", "x/s 0xffff888000100000"];
    let mut arguments = vec!["-nx", "-batch"];
    arguments.extend(commands.iter().flat_map(|command| ["-ex", command]));
    if let Some(text) = output("gdb", &arguments) {
        assert_eq!(text.matches("Linux version 6.1.0-made-up").count(), 2, "{text}");
        assert!(text.contains("0xffffffff80201000"), "{text}");
    }
}
