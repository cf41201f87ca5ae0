// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the guest's kernel says about itself to debuggers, if it can be believed.

use crate::memory::Ram;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Where the kernel's text is mapped, whatever its physical address (`__START_KERNEL_map`).
pub(super) const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The most bytes that the note may have: the kernel sets aside a page or two.
const MOST: u64 = 64 << 10;
const NAME: &[u8] = b"VMCOREINFO\0";
/// A note's name and contents begin at multiples of this.
const ALIGNMENT: usize = 4;
/// Entries of a page table, and the first of the top one that can be of the direct map
/// (Documentation/arch/x86/x86_64/mm.rst: 0xffff888000000000).
const ENTRIES: u64 = 512;
const FIRST_DIRECT_MAP: u64 = 273;

/// The text of the note in guest memory, `None` if there is no such note.
pub(super) fn read(ram: &Ram, (address, size): (u64, u64)) -> Option<Vec<u8>> {
    let size = usize::try_from(size).ok().filter(|_| size <= MOST)?;
    if !GuestMemoryBackend::check_range(ram, GuestAddress(address), size) {
        return None;
    }
    let mut bytes = vec![0; size];
    ram.read_slice(&mut bytes, GuestAddress(address)).ok()?;
    let (sizes, rest) = bytes.split_first_chunk::<12>()?;
    let [n0, n1, n2, n3, c0, c1, c2, c3, ..] = *sizes;
    let length = |bytes| usize::try_from(u32::from_le_bytes(bytes)).ok();
    let (name, contents) = (length([n0, n1, n2, n3])?, length([c0, c1, c2, c3])?);
    if rest.get(..name)? != NAME {
        return None;
    }
    let contents = rest.get(name.next_multiple_of(ALIGNMENT)..)?.get(..contents)?;
    (!contents.is_empty()).then(|| contents.to_vec())
}

/// Where the kernel lies, as far as its note tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Placement {
    /// `phys_base`: physical address of what is at [`KERNEL_MAP`].
    pub(super) base: Option<u64>,
    /// Physical address and size of its text and data.
    pub(super) image: Option<(u64, u64)>,
    /// Virtual address of the first byte of memory.
    pub(super) direct_map: Option<u64>,
}

impl Placement {
    /// What the note says, and what the kernel's page tables say about the rest.
    pub(super) fn of(text: &[u8], ram: &Ram) -> Self {
        let Some(base) = number(text, "NUMBER(phys_base)", 10) else { return Self::default() };
        let offset =
            |symbol: &str| number(text, &format!("SYMBOL({symbol})"), 16)?.checked_sub(KERNEL_MAP);
        // The mapping ends where that of modules begins.
        let image = offset("_stext").and_then(|stext| {
            let end = number(text, "NUMBER(KERNEL_IMAGE_SIZE)", 10)?;
            Some((stext.wrapping_add(base), end.checked_sub(stext)?))
        });
        let four_levels = number(text, "NUMBER(pgtable_l5_enabled)", 10) != Some(1);
        let top = offset("init_top_pgt").filter(|_| four_levels);
        let direct_map = top.and_then(|top| direct_map(ram, top.wrapping_add(base)));
        Self { base: Some(base), image, direct_map }
    }
}

/// The first address of the direct map: what the kernel maps first from
/// [`FIRST_DIRECT_MAP`] on, moved by whole gibibytes if the kernel chose a place at random.
fn direct_map(ram: &Ram, top: u64) -> Option<u64> {
    let mut found = None;
    for index in FIRST_DIRECT_MAP..ENTRIES {
        found = entry(ram, top, index).map(|table| (index, table));
        if found.is_some() {
            break;
        }
    }
    let (high, table) = found?;
    let low = (0..ENTRIES).find(|index| entry(ram, table, *index).is_some())?;
    // Bit 47 is set from the middle of the table on, and all bits above follow it.
    Some(0xffff_0000_0000_0000 | high << 39 | low << 30)
}

/// Where an entry of a page table points to, if it is present.
fn entry(ram: &Ram, table: u64, index: u64) -> Option<u64> {
    let at = table.checked_add(index.saturating_mul(8))?;
    let entry = ram.read_obj::<u64>(GuestAddress(at)).ok()?;
    (entry & 1 != 0).then_some(entry & 0x000f_ffff_ffff_f000)
}

/// The number behind `name=` on a line of its own; a negative one wraps around as the kernel's
/// arithmetic does.
fn number(text: &[u8], name: &str, radix: u32) -> Option<u64> {
    let mut lines = text.split(|byte| *byte == b'\n');
    let value = lines.find_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    let value = std::str::from_utf8(value).ok()?;
    match value.strip_prefix('-') {
        Some(value) => u64::from_str_radix(value, radix).ok().map(u64::wrapping_neg),
        None => u64::from_str_radix(value, radix).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, Memory};

    fn note(name: &[u8], text: &[u8]) -> Vec<u8> {
        let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_le_bytes();
        let mut note = [size(name), size(text), [0; 4]].concat();
        note.extend_from_slice(name);
        note.resize(note.len().next_multiple_of(4), 0);
        note.extend_from_slice(text);
        note
    }

    #[test]
    fn only_a_note_that_lies_in_memory_is_read() {
        let memory = Memory::new(64, &Backing::Anonymous).unwrap();
        let at = 0x10_0000;
        for (bytes, expected) in [
            (note(b"VMCOREINFO\0", b"OSRELEASE=6.1\n"), Some(&b"OSRELEASE=6.1\n"[..])),
            (note(b"VMCOREINFX\0", b"OSRELEASE=6.1\n"), None),
            (note(b"VMCOREINFO\0", b""), None),
            (vec![0xff; 100], None),
        ] {
            memory.ram.write_slice(&[0; 256], GuestAddress(at)).unwrap();
            memory.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
            assert_eq!(read(&memory.ram, (at, 256)).as_deref(), expected);
        }
        let good = note(b"VMCOREINFO\0", b"OSRELEASE=6.1\n");
        memory.ram.write_slice(&good, GuestAddress(at)).unwrap();
        for range in [
            (at, 0),
            (at, 11),
            (at, 30),
            (at, MOST + 1),
            (at, u64::MAX),
            (u64::MAX, 256),
            ((64 << 20) - 100, 256),
        ] {
            assert_eq!(read(&memory.ram, range), None, "{range:x?}");
        }
    }

    #[test]
    fn numbers_wrap_and_nonsense_is_nothing() {
        let text = b"A=5\nNUMBER(phys_base)=-16777216\nSYMBOL(_stext)=ffffffff81000000\nB=x\n";
        assert_eq!(number(text, "NUMBER(phys_base)", 10), Some(0x0100_0000_u64.wrapping_neg()));
        assert_eq!(number(text, "SYMBOL(_stext)", 16), Some(0xffff_ffff_8100_0000));
        assert_eq!(number(text, "B", 10), None);
        assert_eq!(number(text, "C", 10), None);
    }

    #[test]
    fn the_direct_map_is_found_in_the_page_tables() {
        let memory = Memory::new(64, &Backing::Anonymous).unwrap();
        let text = b"NUMBER(phys_base)=0\nSYMBOL(init_top_pgt)=ffffffff82000000\n\
            SYMBOL(_stext)=ffffffff81000000\nNUMBER(KERNEL_IMAGE_SIZE)=1073741824\n";
        let put = |at, value: u64| memory.ram.write_obj(value, GuestAddress(at)).unwrap();
        assert_eq!(Placement::of(text, &memory.ram).direct_map, None);
        put(0x200_0000 + 511 * 8, 0x2004_0067);
        put(0x200_0000 + 300 * 8, 0x0300_0067);
        put(0x300_0000 + 5 * 8, 0x0300_1067);
        let expected = Placement {
            base: Some(0),
            image: Some((0x100_0000, (1 << 30) - 0x100_0000)),
            direct_map: Some(0xffff_0000_0000_0000 | 300 << 39 | 5 << 30),
        };
        assert_eq!(Placement::of(text, &memory.ram), expected);
        let five = [&text[..], b"NUMBER(pgtable_l5_enabled)=1\n"].concat();
        assert_eq!(Placement::of(&five, &memory.ram).direct_map, None);
        // A table that lies nowhere.
        put(0x200_0000 + 300 * 8, 0x000f_ffff_ffff_f001);
        assert_eq!(Placement::of(text, &memory.ram).direct_map, None);
    }

    #[test]
    fn a_kernel_that_lies_about_its_place_is_not_followed() {
        let memory = Memory::new(64, &Backing::Anonymous).unwrap();
        let lie = b"NUMBER(phys_base)=-1\nSYMBOL(init_top_pgt)=ffffffffffffff00\n\
            SYMBOL(_stext)=ffffffffffffffff\nNUMBER(KERNEL_IMAGE_SIZE)=5\n";
        let placement = Placement::of(lie, &memory.ram);
        assert_eq!((placement.direct_map, placement.image), (None, None));
        assert_eq!(Placement::of(b"", &memory.ram), Placement::default());
    }
}
