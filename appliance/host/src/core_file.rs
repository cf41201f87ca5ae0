// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's own note in an ELF core file of its memory.
//!
//! `crash` and `gdb` scripts look for the note `VMCOREINFO`, which says where in its memory the
//! kernel has what. The kernel keeps it ready in memory as an ELF note (Linux,
//! `kernel/crash_core.c`); QEMU leaves it there, so it is copied to where programs look. All
//! numbers in memory are the guest's and may be anything.

use rustix::fs::{FallocateFlags, fallocate};
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
/// In a program header (`Elf64_Phdr`): `p_offset`; `p_filesz` and `p_memsz`.
const AT_OFFSET: u64 = 8;
const AT_SIZES: u64 = 32;
const PAGE: usize = 4096;
/// Bytes that are moved at once.
const PIECE: u64 = 1 << 20;

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
/// bytes, to the notes of the core file. All notes come before the memory then: `crash` reads none
/// behind it. Pages of zeroes become holes.
///
/// # Errors
///
/// A file that is no 64-bit core file with notes, memory that it does not have, and a note that
/// is not the kernel's: the file is as it was then. What the operating system refuses may leave it
/// in the middle.
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
    let length = all.len() as u64;

    let mut loads: Vec<_> = segments.iter().filter(|segment| segment.kind == PT_LOAD).collect();
    loads.sort_by_key(|segment| segment.offset);
    let begin = loads.first().map_or(0, |first| first.offset);
    let notes_at = notes.offset.min(begin);
    let room = notes_at.checked_add(length).ok_or_else(|| odd("notes past the end"))?;
    // A page of memory is a page of the file.
    let by = room.max(begin).next_multiple_of(PAGE as u64) - begin;
    // From the last to the first: nothing is written over that is still to be moved.
    for segment in loads.iter().rev() {
        move_up(file, segment.offset, segment.length, by)?;
        file.write_all_at(&(segment.offset + by).to_le_bytes(), segment.at + AT_OFFSET)?;
    }
    file.write_all_at(&all, notes_at)?;
    file.write_all_at(&notes_at.to_le_bytes(), notes.at + AT_OFFSET)?;
    let length = length.to_le_bytes();
    file.write_all_at(&[length, length].concat(), notes.at + AT_SIZES)
}

/// Moves bytes of the file up by less than a few pages, its end first.
fn move_up(file: &File, start: u64, length: u64, by: u64) -> Result<()> {
    let end = start.checked_add(length).and_then(|end| end.checked_add(by));
    end.ok_or_else(|| odd("memory past the end"))?;
    let mut left = length;
    while left > 0 {
        let now = left.min(PIECE);
        left -= now;
        let piece = read(file, start + left, now)?;
        let mut at = start + left + by;
        for page in piece.chunks(PAGE) {
            let holds = page.iter().any(|byte| *byte != 0);
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Not every filesystem has holes.
            if holds || fallocate(file, hole, at, page.len() as u64).is_err() {
                file.write_all_at(page, at)?;
            }
            at += page.len() as u64;
        }
    }
    // The last page may be a hole past the end.
    let size = file.metadata()?.len().max(start + length + by);
    file.set_len(size)
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
    /// More than is moved at once; the second half is zeroes.
    const LENGTH: u64 = 3 << 20;

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

    /// A core file with memory in which the note is at 0x40.
    fn core(note: &[u8]) -> File {
        let mut raw = vec![0; usize::try_from(MEMORY + LENGTH).unwrap()];
        for (number, byte) in raw.iter_mut().take(2 << 20).enumerate().skip(0x600) {
            *byte = number.to_le_bytes()[1];
        }
        let mut put = |at: usize, what: &[u8]| raw[at..at + what.len()].copy_from_slice(what);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &4_u16.to_le_bytes());
        put(32, &64_u64.to_le_bytes());
        put(54, &56_u16.to_le_bytes());
        put(56, &2_u16.to_le_bytes());
        for (at, kind, offset, physical, length) in
            [(64, PT_NOTE, 0x100_u64, 0_u64, 20_u64), (120, PT_LOAD, MEMORY, PHYSICAL, LENGTH)]
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
    fn the_note_comes_after_the_others_and_before_memory() {
        let file = core(&kernels());
        let memory = |at| read(&file, at, LENGTH).unwrap();
        let before = memory(MEMORY);
        add_kernel_note(&file, (PHYSICAL + 0x40, 0x400)).unwrap();
        let segments = segments(&file).unwrap();
        assert_eq!((segments[0].offset, segments[1].offset), (0x100, 0x1000));
        let notes = read(&file, 0x100, segments[0].length).unwrap();
        assert_eq!(notes, [b"the processors' note".as_slice(), &kernels()].concat());
        assert!(memory(0x1000) == before);
        assert_eq!(file.metadata().unwrap().len(), 0x1000 + LENGTH);
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
            (&whole, (PHYSICAL + LENGTH - 16, 0x40)),
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
