// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a disk is written down for a fuzzer: short, whatever its size, and so that nearly
//! every change of a byte gives another disk.
//!
//! Metadata of a few hundred bytes lies in images of many megabytes. So an input has the
//! sectors that are not zero and where they lie, in two files, and what is done with them:
//!
//! | byte | |
//! |---|---|
//! | 0 | bits that switch things on and off |
//! | 1 | a number that formats choose variants by |
//! | 2 | [`OPS`] operations of 4 bytes |
//! | 34 | for both files: whole sectors (u32), bytes behind them (u16) |
//! | 46 | number of pieces |
//! | 47 | for each piece: first sector (u32, the top bit is the file), sectors (u16) |
//! | | the bytes of the pieces, one behind the other |
//!
//! Numbers are little endian. What is missing at the end counts as zero.

use super::Image;

/// Operations of every case.
pub(super) const OPS: usize = 8;
const SECTOR: usize = 512;
const HEAD: usize = 47;
const PIECE: usize = 6;
const SECOND_FILE: u32 = 1 << 31;

/// A decoded input.
#[derive(Clone, Debug, Default)]
pub struct Case {
    /// Bits that switch things on and off.
    pub flags: u8,
    /// Which variant of the work is done.
    pub variant: u8,
    /// What is written.
    pub ops: [Op; OPS],
    /// The image, and another file for what it refers to.
    pub files: [Contents; 2],
}

/// Something that is done to a disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Op {
    /// What.
    pub kind: u8,
    /// Where, as a part of the disk's size.
    pub place: u16,
    /// How much.
    pub len: u8,
}

/// The bytes of a file.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Length in bytes.
    pub len: u64,
    /// Offsets of bytes that are not zero.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

impl Contents {
    /// The contents of a whole file.
    pub fn of(bytes: &[u8]) -> Self {
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
            if sector.iter().all(|byte| *byte == 0) {
                continue;
            }
            let at = (number * SECTOR) as u64;
            match pieces.last_mut() {
                Some((start, piece)) if *start + piece.len() as u64 == at => piece.extend(sector),
                _ => pieces.push((at, sector.to_vec())),
            }
        }
        Self { len: bytes.len() as u64, pieces }
    }

    /// A file in memory with these contents.
    pub fn image(&self) -> Image {
        let image = Image::new(self.len);
        for (at, bytes) in &self.pieces {
            image.put(*at, bytes);
        }
        image
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let len = self.0.len().min(N);
        bytes[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
        bytes
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (now, later) = self.0.split_at(self.0.len().min(len));
        self.0 = later;
        now.to_vec()
    }
}

impl Case {
    /// What `input` means; every input means something.
    pub fn decode(input: &[u8]) -> Self {
        let mut reader = Reader(input);
        let mut case = Self::default();
        [case.flags, case.variant] = reader.take();
        for op in &mut case.ops {
            let [kind, low, high, len] = reader.take();
            *op = Op { kind, place: u16::from_le_bytes([low, high]), len };
        }
        for file in &mut case.files {
            let sectors = u64::from(u32::from_le_bytes(reader.take()));
            let rest = u64::from(u16::from_le_bytes(reader.take()));
            file.len = sectors * SECTOR as u64 + rest;
        }
        let [count] = reader.take();
        let table: Vec<_> = (0..count)
            .map(|_| (u32::from_le_bytes(reader.take()), u16::from_le_bytes(reader.take())))
            .collect();
        for (first, sectors) in table {
            let at = u64::from(first & !SECOND_FILE) * SECTOR as u64;
            let bytes = reader.bytes(usize::from(sectors) * SECTOR);
            let file = usize::from(first & SECOND_FILE != 0);
            case.files[file].pieces.push((at, bytes));
        }
        case
    }

    /// The input that means this; none if it has too many pieces.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut head = vec![self.flags, self.variant];
        for op in &self.ops {
            let [low, high] = op.place.to_le_bytes();
            head.extend([op.kind, low, high, op.len]);
        }
        for file in &self.files {
            head.extend(u32::try_from(file.len / SECTOR as u64).ok()?.to_le_bytes());
            head.extend(u16::try_from(file.len % SECTOR as u64).ok()?.to_le_bytes());
        }
        let (mut table, mut payload) = (Vec::new(), Vec::new());
        for (number, file) in self.files.iter().enumerate() {
            for (at, bytes) in &file.pieces {
                let first = u32::try_from(at / SECTOR as u64).ok()?;
                let first = if number == 0 { first } else { first | SECOND_FILE };
                table.extend(first.to_le_bytes());
                table.extend(u16::try_from(bytes.len().div_ceil(SECTOR)).ok()?.to_le_bytes());
                payload.extend(bytes);
                payload.resize(payload.len().next_multiple_of(SECTOR), 0);
            }
        }
        head.push(u8::try_from(table.len() / PIECE).ok()?);
        assert_eq!(head.len(), HEAD);
        Some([head, table, payload].concat())
    }

    /// Whether flag `bit` is set.
    pub fn has(&self, bit: u8) -> bool {
        self.flags & 1 << bit != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::BlockDevice;

    #[test]
    fn a_file_comes_out_as_it_went_in() {
        let mut bytes = vec![0; 3 << 20];
        bytes[0..700].fill(1);
        bytes[2 << 20] = 2;
        bytes.extend([3; 77]);
        let ops = [Op { kind: 1, place: 0x1234, len: 9 }; OPS];
        let files = [Contents::of(&bytes), Contents::of(b"x")];
        let case = Case { flags: 0x12, variant: 7, ops, files };
        let input = case.encode().unwrap();
        assert!(input.len() < 4096);
        let again = Case::decode(&input);
        assert_eq!(again.encode().unwrap(), input);
        assert_eq!((again.flags, again.variant, again.ops[7].place), (0x12, 7, 0x1234));
        let image = again.files[0].image();
        let mut found = vec![9; bytes.len()];
        image.read_at(&mut found, 0).unwrap();
        assert_eq!(found, bytes);
        assert_eq!(again.files[1].image().size(), 1);
    }

    #[test]
    fn every_input_means_something() {
        for len in 0..200 {
            Case::decode(&vec![0xff; len]);
        }
    }
}
