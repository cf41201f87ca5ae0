// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tar archives, as they come from whoever packs guests.

use std::path::{Component, Path};
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice};
use tranship_tar::{Archive, is_tar};

/// Bytes of a header.
const HEADER: usize = 512;
/// Where its checksum is.
const SUM: std::ops::Range<usize> = 148..156;

/// The first byte says whether the sums of headers are made right; an archive follows.
pub(crate) fn tar(input: &[u8]) {
    let (kind, bytes) = input.split_first().map_or((0, input), |(kind, rest)| (*kind, rest));
    let mut bytes = bytes.to_vec();
    if kind & 1 != 0 {
        bytes.chunks_exact_mut(HEADER).filter(|block| block[257..262] == *b"ustar").for_each(seal);
    }
    let file = Arc::new(MemoryDevice::read_only(bytes));
    is_tar(&*file).expect("memory can be read");
    let Ok(archive) = Archive::open(file.clone()) else { return };
    for name in archive.names() {
        let is_plain = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        assert!(!name.is_empty() && Path::new(name).components().all(is_plain), "{name:?}");
        let span = archive.span(name).expect("a member has a place");
        assert!(span.end() <= file.size(), "{name:?}: {span:?}");
        let member = archive.member(name).expect("a member can be opened");
        assert_eq!(member.size(), span.len);
        let mut start = vec![0; usize::try_from(span.len.min(4096)).unwrap()];
        member.read_at(&mut start, 0).expect("a member can be read");
    }
}

fn seal(header: &mut [u8]) {
    header[SUM].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[SUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
