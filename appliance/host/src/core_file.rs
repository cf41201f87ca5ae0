// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's own note in an ELF core file of its memory.
//!
//! `crash` and `gdb` scripts look for the note `VMCOREINFO`, which says where in its memory the
//! kernel has what. The kernel keeps it ready in memory as an ELF note (Linux,
//! `kernel/crash_core.c`); QEMU leaves it there, so it is copied to where programs look. All
//! numbers in memory are the guest's and may be anything.

use std::fs::File;
use std::io::{Error, Result};
use std::os::unix::fs::FileExt;

/// The name of the kernel's note.
const NAME: &[u8] = b"VMCOREINFO\0";
/// The largest note of the kernel's: its buffer is a page.
const MOST_NOTE: u64 = 64 << 10;
/// The largest notes of the processors.
const MOST_NOTES: u64 = 16 << 20;
/// Bytes of the header, of an entry of the program headers, and of a note's header.
const HEADER: usize = 64;
const ENTRY: usize = 56;
const NOTE_HEADER: usize = 12;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// A program header, as far as it matters here.
struct Segment {
    /// Where the header is in the file.
    at: u64,
    kind: u32,
    offset: u64,
    physical: u64,
    length: u64,
}

/// Adds the kernel's note, which is at `address` of the guest's memory and has at most `size`
/// bytes, to the notes of the core file.
///
/// # Errors
///
/// A file that is no 64-bit core file with notes, memory that it does not have, and a note that
/// is not the kernel's; the file is as it was then, except for bytes at its end.
pub(crate) fn add_kernel_note(file: &File, (address, size): (u64, u64)) -> Result<()> {
    let segments = segments(file)?;
    let find = |what, is: &dyn Fn(&&Segment) -> bool| {
        segments.iter().find(is).ok_or_else(|| odd(format!("the core file has no {what}")))
    };
    let notes = find("notes", &|segment| segment.kind == PT_NOTE)?;
    let size = size.min(MOST_NOTE);
    let memory = find("memory where the kernel's note is", &|segment| {
        segment.kind == PT_LOAD
            && address
                .checked_sub(segment.physical)
                .is_some_and(|into| into.checked_add(size).is_some_and(|end| end <= segment.length))
    })?;
    let at = memory.offset.checked_add(address - memory.physical);
    let note = kernel_note(&read(file, at.ok_or_else(|| odd("an offset past the end"))?, size)?)?;
    if notes.length > MOST_NOTES {
        return Err(odd(format!("notes of {} bytes", notes.length)));
    }
    let mut all = read(file, notes.offset, notes.length)?;
    all.resize(all.len().next_multiple_of(4), 0);
    all.extend_from_slice(&note);
    let end = file.metadata()?.len().next_multiple_of(4);
    file.write_all_at(&all, end)?;
    let length = (all.len() as u64).to_le_bytes();
    // Elf64_Phdr: p_offset at 8, p_filesz at 32, p_memsz at 40.
    file.write_all_at(&end.to_le_bytes(), notes.at + 8)?;
    file.write_all_at(&[length, length].concat(), notes.at + 32)
}

/// The program headers of a 64-bit little-endian core file.
fn segments(file: &File) -> Result<Vec<Segment>> {
    let header = read(file, 0, HEADER as u64)?;
    if !header.starts_with(b"\x7fELF\x02\x01") || bytes(&header, 16)? != 4_u16.to_le_bytes() {
        return Err(odd("the file is no 64-bit ELF core file"));
    }
    let table = u64::from_le_bytes(bytes(&header, 32)?);
    let entry = u64::from(u16::from_le_bytes(bytes(&header, 54)?));
    let count = u64::from(u16::from_le_bytes(bytes(&header, 56)?));
    if entry != ENTRY as u64 {
        return Err(odd(format!("program headers of {entry} bytes, expected {ENTRY}")));
    }
    let past = || odd("program headers past the end");
    (0..count)
        .map(|index| {
            let at = table.checked_add(index * entry).ok_or_else(past)?;
            let raw = read(file, at, entry)?;
            Ok(Segment {
                at,
                kind: u32::from_le_bytes(bytes(&raw, 0)?),
                offset: u64::from_le_bytes(bytes(&raw, 8)?),
                physical: u64::from_le_bytes(bytes(&raw, 24)?),
                length: u64::from_le_bytes(bytes(&raw, 32)?),
            })
        })
        .collect()
}

/// The kernel's note out of the memory that it begins; what follows it is not part of it.
fn kernel_note(memory: &[u8]) -> Result<Vec<u8>> {
    let length = |at| bytes(memory, at).map(u32::from_le_bytes).map(u64::from);
    let (name, text) = (length(0)?, length(4)?);
    let begins = memory.get(NOTE_HEADER..).is_some_and(|rest| rest.starts_with(NAME));
    let end = (NOTE_HEADER as u64) + (NAME.len() as u64).next_multiple_of(4) + text;
    let whole = usize::try_from(end).ok().and_then(|end| memory.get(..end));
    match whole {
        Some(whole) if begins && name == NAME.len() as u64 => {
            let mut note = whole.to_vec();
            note.resize(note.len().next_multiple_of(4), 0);
            Ok(note)
        }
        _ => Err(odd("the kernel's note is not where it should be")),
    }
}

/// Bytes of the file; the caller has bounded `length`.
fn read(file: &File, offset: u64, length: u64) -> Result<Vec<u8>> {
    let mut buffer = vec![0; usize::try_from(length).map_err(Error::other)?];
    file.read_exact_at(&mut buffer, offset)?;
    Ok(buffer)
}

fn bytes<const N: usize>(raw: &[u8], at: usize) -> Result<[u8; N]> {
    raw.get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .ok_or_else(|| odd("a header that ends too early"))
}

fn odd(what: impl Into<String>) -> Error {
    Error::new(std::io::ErrorKind::InvalidData, what.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"OSRELEASE=6.1\nPAGESIZE=4096\n";
    /// Where the memory begins, in the file and in the guest.
    const MEMORY: u64 = 0x200;
    const PHYSICAL: u64 = 0x10_0000;

    fn kernels() -> Vec<u8> {
        let mut note = Vec::new();
        for number in [u32::try_from(NAME.len()).unwrap(), u32::try_from(TEXT.len()).unwrap(), 0] {
            note.extend(number.to_le_bytes());
        }
        note.extend(NAME);
        note.push(0);
        note.extend(TEXT);
        note
    }

    /// A core file with a page of memory in which the note is at 0x40.
    fn core(note: &[u8]) -> File {
        let mut raw = vec![0; 0x1200];
        let mut put = |at: usize, what: &[u8]| raw[at..at + what.len()].copy_from_slice(what);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &4_u16.to_le_bytes());
        put(32, &64_u64.to_le_bytes());
        put(54, &56_u16.to_le_bytes());
        put(56, &2_u16.to_le_bytes());
        for (at, kind, offset, physical, length) in
            [(64, PT_NOTE, 0x100_u64, 0_u64, 20_u64), (120, PT_LOAD, MEMORY, PHYSICAL, 0x1000)]
        {
            put(at, &kind.to_le_bytes());
            put(at + 8, &offset.to_le_bytes());
            put(at + 24, &physical.to_le_bytes());
            put(at + 32, &length.to_le_bytes());
        }
        put(0x100, b"the processors' note");
        put(0x240, note);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&raw, 0).unwrap();
        file
    }

    #[test]
    fn the_note_comes_after_the_others() {
        let file = core(&kernels());
        add_kernel_note(&file, (PHYSICAL + 0x40, 0x400)).unwrap();
        let segments = segments(&file).unwrap();
        assert_eq!((segments[0].offset, segments[1].offset), (0x1200, MEMORY));
        let notes = read(&file, 0x1200, segments[0].length).unwrap();
        assert_eq!(notes, [b"the processors' note".as_slice(), &kernels()].concat());
    }

    #[test]
    fn nonsense_leaves_the_notes_alone() {
        let whole = kernels();
        let mut long = whole.clone();
        long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut other = whole.clone();
        other[12] = b'X';
        for (note, place) in [
            (&whole, (0, 0x400)),
            (&whole, (u64::MAX, u64::MAX)),
            (&whole, (PHYSICAL + 0x40, 4)),
            (&whole, (PHYSICAL + 0xff0, 0x40)),
            (&long, (PHYSICAL + 0x40, 0x400)),
            (&other, (PHYSICAL + 0x40, 0x400)),
        ] {
            let file = core(note);
            add_kernel_note(&file, place).unwrap_err();
            assert_eq!(segments(&file).unwrap()[0].offset, 0x100);
        }
        let file = core(&whole);
        file.write_all_at(&[1], 4).unwrap();
        assert!(add_kernel_note(&file, (PHYSICAL, 64)).unwrap_err().to_string().contains("64-bit"));
        file.set_len(10).unwrap();
        add_kernel_note(&file, (PHYSICAL, 64)).unwrap_err();
    }
}
