// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whenever the power goes, the image stays valid and keeps what was flushed.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use support::{MIB, bytes_of, child_options, in_memory, open, options, parent};
use tranship_block::{BlockDevice, Extent, MemoryDevice, Repair, Result, Span, Storage, Zeroing};
use tranship_format_testing::{Op, PowerCut, apply, pattern};
use tranship_vhdx::{CreateOptions, OpenOptions, Parent, Shrink, Vhdx, check, compact, create};

fn open_valid(disk: Vec<u8>, parent: Option<&Parent>) -> Vhdx {
    let device = Arc::new(MemoryDevice::read_only(disk));
    let report = check(&*device, Repair::Nothing).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.details);
    let options = OpenOptions { parent: parent.cloned(), ..OpenOptions::default() };
    Vhdx::open_read_only(device, options).unwrap()
}

/// Opens what is left of the disk; every guest byte is from the last promise or from one
/// of the states that followed.
fn inspect(disk: Vec<u8>, parent: Option<&Parent>, promised: &[u8], states: &[Vec<u8>]) {
    let found = bytes_of(&open_valid(disk, parent));
    if found == promised {
        return;
    }
    assert_eq!(found.len(), promised.len());
    for start in (0..found.len()).step_by(4096) {
        let page = start..(start + 4096).min(found.len());
        let same = |state: &[u8]| found[page.clone()] == state[page.clone()];
        if same(promised) || states.iter().any(|state| same(state)) {
            continue;
        }
        for at in page.filter(|at| found[*at] != promised[*at]) {
            let known = states.iter().any(|state| found[at] == state[at]);
            assert!(known, "byte {at:#x} is {}, promised {}", found[at], promised[at]);
        }
    }
}

fn run(options: &CreateOptions, base: Option<Vec<u8>>, seed: u64) {
    let size = options.size;
    let parent = base.map(parent);
    let recorder = Arc::new(PowerCut::new(in_memory(options).snapshot()));
    let storage: Arc<dyn Storage> = recorder.clone();
    let mut image = open(&storage, parent.as_ref());
    let mut model = bytes_of(&image);
    let first = model.clone();
    let mut states = vec![model.clone()];
    let mut random = seed;
    let mut next = |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % limit
    };
    for step in 0..13 {
        let whole = next(2) == 0;
        // Each flush finds a block that is new.
        let block = (step / 4 * MIB).min(size - 1) / MIB * MIB;
        let at = if whole { block } else { block + next(MIB.min(size - block)) };
        let len = if whole { MIB } else { next(MIB / 4) + 1 }.min(size - at);
        let op = match step % 7 {
            2 => Op::Discard(at / MIB * MIB, MIB),
            4 => Op::Zero(at, len, Zeroing::MayUnmap),
            3 | 6 => Op::Flush,
            _ => Op::Write(at, len as usize, step),
        };
        apply(&image, &mut model, &op);
        states.push(model.clone());
        if matches!(op, Op::Flush) {
            recorder.promise(&model);
        }
        if step == 9 {
            drop(image);
            image = open(&storage, parent.as_ref());
        }
    }
    drop(image);
    recorder.promise(&model);
    recorder.replay(&first, seed, |disk, promised| {
        inspect(disk, parent.as_ref(), promised, &states);
    });
}

#[test]
fn a_dynamic_image_survives_every_cut() {
    run(&options(2 * MIB + 40_960), None, 1);
}

#[test]
fn a_differencing_image_survives_every_cut() {
    run(&child_options(2 * MIB), Some(pattern(1_500_000, 8)), 2);
}

#[test]
fn compacting_survives_every_cut() {
    let storage: Arc<dyn Storage> = in_memory(&options(5 * MIB));
    let image = open(&storage, None);
    image.write_at(&pattern(5 << 20, 1), 0).unwrap();
    image.write_at(&vec![0; 1 << 20], MIB).unwrap();
    image.discard(Span::new(3 * MIB, MIB)).unwrap();
    let model = bytes_of(&image);
    drop(image);
    let recorder = Arc::new(PowerCut::new(bytes_of(&*storage)));
    let compacted = compact(&(recorder.clone() as Arc<dyn Storage>)).unwrap();
    assert_eq!(compacted.before - compacted.after, 2 * MIB);
    recorder.replay(&model, 3, |disk, promised| inspect(disk, None, promised, &[]));
}

#[test]
fn resizing_survives_every_cut() {
    let storage: Arc<dyn Storage> = in_memory(&options(2 * MIB + 4096));
    let image = open(&storage, None);
    image.write_at(&pattern(2 << 20, 1), 4096).unwrap();
    drop(image);
    let recorder = Arc::new(PowerCut::new(bytes_of(&*storage)));
    let image = open(&(recorder.clone() as Arc<dyn Storage>), None);
    let old = bytes_of(&image);
    // More entries than the BAT has room for: it has to move.
    let new_size = 140_000 * MIB;
    image.resize(new_size, Shrink::KeepData).unwrap();
    drop(image);
    let mut sizes = std::collections::BTreeSet::new();
    recorder.replay(&old, 4, |disk, _| {
        let image = open_valid(disk, None);
        let mut found = vec![0; 3 << 20];
        let len = image.size().min(3 << 20) as usize;
        image.read_at(&mut found[..len], 0).unwrap();
        assert!(found[..old.len()] == old && found[old.len()..].iter().all(|byte| *byte == 0));
        sizes.insert(image.size());
    });
    assert_eq!(sizes.into_iter().collect::<Vec<_>>(), [2 * MIB + 4096, new_size]);
}

/// Hands writes on in sectors of 512 bytes, each of which may be lost by itself.
#[derive(Debug)]
struct Torn(Arc<PowerCut>);

impl BlockDevice for Torn {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        // Payload is no different in pieces.
        let piece = if buf.len() > 16 << 10 { 256 << 10 } else { 512 };
        for (at, bytes) in (offset..).step_by(piece).zip(buf.chunks(piece)) {
            self.0.write_at(bytes, at)?;
        }
        Ok(())
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.0.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.0.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
}

impl Storage for Torn {
    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }
}

#[test]
fn metadata_survives_when_sectors_of_a_write_are_lost() {
    let recorder = Arc::new(PowerCut::new(in_memory(&options(2 * MIB)).snapshot()));
    let storage: Arc<dyn Storage> = Arc::new(Torn(recorder.clone()));
    let image = open(&storage, None);
    let mut model = vec![0; 2 << 20];
    let mut states = vec![model.clone()];
    // What is written after the discard must not lie where the discarded block was.
    let ops = [
        Op::Write(0, 20_000, 1),
        Op::Flush,
        Op::Discard(0, MIB),
        Op::Write(MIB, 20_000, 2),
        Op::Flush,
    ];
    for op in ops {
        apply(&image, &mut model, &op);
        states.push(model.clone());
        if matches!(op, Op::Flush) {
            recorder.promise(&model);
        }
    }
    drop(image);
    recorder.promise(&model);
    recorder.replay(&states[0].clone(), 6, |disk, promised| inspect(disk, None, promised, &states));
}

#[test]
fn an_interrupted_creation_is_no_image() {
    let recorder = PowerCut::new(pattern(100_000, 3));
    let size = MIB + 512;
    create(&recorder, &options(size)).unwrap();
    let mut images = 0;
    recorder.replay(&[], 5, |disk, _| {
        let device = Arc::new(MemoryDevice::read_only(disk));
        if let Ok(image) = Vhdx::open_read_only(device, OpenOptions::default()) {
            assert_eq!(bytes_of(&image), vec![0; size as usize]);
            images += 1;
        }
    });
    assert!(images > 0, "the last state is an image");
}
