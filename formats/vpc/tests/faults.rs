// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Storage that fails, creations that are interrupted, sizes that change under way.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use support::{BLOCK, assert_clean, in_memory, in_tiny_blocks, initially, open, options, over};
use tranship_block::{
    BlockDevice, Error, ErrorKind, Extent, MemoryDevice, Repair, Result, Span, Storage, Zeroing,
};
use tranship_format_testing::{PowerCut, contents, pattern, verify};
use tranship_vpc::{Kind, Vpc, check, create};

const SIZE: u64 = 64 << 10;

/// Storage whose change number `left` fails, and no other.
#[derive(Debug)]
struct Failing {
    device: Arc<MemoryDevice>,
    left: AtomicI64,
}

impl Failing {
    fn count(&self) -> Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 0 {
            return Err(Error::new(ErrorKind::NoSpace, "nothing is left"));
        }
        Ok(())
    }
}

impl BlockDevice for Failing {
    fn size(&self) -> u64 {
        self.device.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.count()?;
        self.device.write_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.count()?;
        self.device.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.device.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        self.count()
    }
}

impl Storage for Failing {
    fn set_len(&self, len: u64) -> Result<()> {
        self.count()?;
        self.device.set_len(len)
    }
}

#[test]
fn a_failed_change_spoils_nothing_else() {
    let base = pattern(20_000, 1);
    for base in [None, Some(base.as_slice())] {
        let kind = if base.is_some() { Kind::Differencing } else { Kind::Dynamic };
        let mut failures = 0;
        for fails_at in 0.. {
            let device = in_memory(kind, SIZE);
            let storage =
                Arc::new(Failing { device: device.clone(), left: AtomicI64::new(fails_at) });
            let disk = Vpc::open(storage.clone(), over(base)).unwrap();
            let mut model = initially(SIZE as usize, base);
            let mut failed = false;
            for step in 0..12_u64 {
                let at = step * 7919 % 6 * u64::from(BLOCK) + step * 100;
                let bytes = pattern(3000 + step as usize * 500, step);
                let span = Span::new(at, bytes.len() as u64);
                let range = at as usize..span.end() as usize;
                let done = match step % 4 {
                    3 => disk.write_zeroes(Span::new(0, 20_000), Zeroing::MayUnmap),
                    _ => disk.write_at(&bytes, at),
                };
                match (step % 4, done) {
                    (3, Ok(())) => model[..20_000].fill(0),
                    (_, Ok(())) => model[range].copy_from_slice(&bytes),
                    (_, Err(error)) => {
                        assert_eq!(error.kind(), ErrorKind::NoSpace);
                        failed = true;
                        // What was to be changed may be either; the rest has to be as it was.
                        let range = if step % 4 == 3 { 0..20_000 } else { range };
                        let found = contents(&disk);
                        model[range.clone()].copy_from_slice(&found[range]);
                    }
                }
                verify(&disk, &model);
                if step % 3 == 2 {
                    failed |= disk.flush().is_err();
                }
            }
            failures += u32::from(failed);
            disk.flush().or_else(|_| disk.flush()).unwrap();
            verify(&disk, &model);
            drop(disk);
            verify(&open(&device, base), &model);
            let report = check(&*device, Repair::All).unwrap();
            assert!(report.is_clean(), "{report:?}");
            if storage.left.load(Ordering::SeqCst) >= 0 {
                break;
            }
        }
        assert!(failures > 30, "only {failures} changes of the storage failed");
    }
}

#[test]
fn an_interrupted_creation_is_no_image_or_a_whole_one() {
    // The file was an image before, larger than the new one.
    for kind in [Kind::Fixed, Kind::Dynamic, Kind::Differencing] {
        for before in [Kind::Fixed, Kind::Dynamic] {
            let storage = PowerCut::new(in_memory(before, 2 * SIZE).snapshot());
            create(&storage, &options(kind, SIZE)).unwrap();
            let (mut old, mut none, mut whole) = (0, 0, 0);
            storage.replay(&[], 5, |bytes, _| {
                let device = Arc::new(MemoryDevice::read_only(bytes));
                let base = (kind == Kind::Differencing).then_some(&[][..]);
                match Vpc::open_read_only(device, over(base)) {
                    Err(_) => none += 1,
                    Ok(disk) if disk.size() == SIZE => {
                        assert_eq!(disk.kind(), kind);
                        // Storage that is not a file may have anything where a fixed disk is.
                        if kind != Kind::Fixed {
                            verify(&disk, &vec![0; SIZE as usize]);
                        }
                        whole += 1;
                    }
                    Ok(_) => old += 1,
                }
            });
            assert_eq!(old, 0);
            assert!(none > 0 && whole > 0, "{kind:?}: {none} {whole}");
        }
    }
}

#[test]
fn a_disk_grows_while_it_is_used() {
    let base = pattern(30_000, 3);
    for base in [None, Some(base.as_slice())] {
        let kind = if base.is_some() { Kind::Differencing } else { Kind::Dynamic };
        let storage = in_tiny_blocks(kind, SIZE);
        let disk = open(&storage, base);
        let grown = AtomicU64::new(SIZE);
        std::thread::scope(|scope| {
            for thread in 0..3_u64 {
                let disk = &disk;
                scope.spawn(move || {
                    let mut buf = [0; 700];
                    for round in 0..60_u64 {
                        let at = (round * 3 + thread) * 333;
                        let bytes = pattern(333, at);
                        disk.write_at(&bytes, at).unwrap();
                        disk.read_at(&mut buf[..333], at).unwrap();
                        assert!(buf[..333] == bytes);
                        if round % 16 == thread {
                            disk.flush().unwrap();
                        }
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..20 {
                    let size = grown.fetch_add(16 << 10, Ordering::SeqCst) + (16 << 10);
                    disk.resize(size).unwrap();
                }
            });
        });
        let size = grown.load(Ordering::SeqCst);
        assert_eq!(disk.size(), size);
        let mut model = initially(size as usize, base);
        for at in (0..180 * 333).step_by(333) {
            model[at..at + 333].copy_from_slice(&pattern(333, at as u64));
        }
        verify(&disk, &model);
        drop(disk);
        verify(&open(&storage, base), &model);
        assert_clean(&*storage);
    }
}
