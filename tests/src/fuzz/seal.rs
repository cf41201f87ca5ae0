// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making checksums right again: whoever makes a hostile image does so, and a fuzzer that
//! cannot would never get past them.

use super::Image;
use sha2::{Digest, Sha256};
use tranship_block::{BlockDevice, Span};

/// CRC-32C of the headers, region tables and log entries of a VHDX.
pub(crate) fn vhdx(image: &Image) {
    const LARGEST_LOG: u64 = 2 << 20;
    for (at, len) in [(64, 4), (128, 4), (192, 64), (256, 64)] {
        crc32c(image, Span::new(at << 10, len << 10));
    }
    for header in [64 << 10, 128 << 10] {
        let Some(header) = image.get(Span::new(header, 80)) else { continue };
        let len = u64::from(u32::from_le_bytes(header[68..72].try_into().unwrap()));
        let at = u64::from_le_bytes(header[72..80].try_into().unwrap());
        for offset in (0..len.min(LARGEST_LOG)).step_by(4096) {
            let Some(start) = at.checked_add(offset) else { break };
            let Some(entry) = image.get(Span::new(start, 12)) else { break };
            if entry.starts_with(b"loge") {
                let entry = u64::from(u32::from_le_bytes(entry[8..12].try_into().unwrap()));
                // An entry that goes around the end of the log keeps its sum.
                crc32c(image, Span::new(start, entry.min(len - offset)));
            }
        }
    }
}

fn crc32c(image: &Image, span: Span) {
    let Some(mut bytes) = image.get(span).filter(|bytes| bytes.len() >= 8) else { return };
    bytes[4..8].fill(0);
    image.put(span.start + 4, &crc32c::crc32c(&bytes).to_le_bytes());
}

/// The sums of both footers and the dynamic header of a VHD.
pub(crate) fn vpc(image: &Image) {
    let footer = 64..68;
    for at in [Some(0), image.size().checked_sub(512), image.size().checked_sub(511)] {
        let Some(at) = at else { continue };
        let Some(bytes) = image.get(Span::new(at, 512)).filter(|b| b.starts_with(b"conectix"))
        else {
            continue;
        };
        sum(image, at, 512, footer.clone());
        let header = u64::from_be_bytes(bytes[16..24].try_into().unwrap());
        if header > 0 {
            sum(image, header, 1024, 36..40);
        }
    }
}

/// The one's complement of the sum of all bytes but its own.
fn sum(image: &Image, at: u64, len: u64, own: std::ops::Range<usize>) {
    let Some(bytes) = image.get(Span::new(at, len)) else { return };
    let others = bytes.iter().enumerate().filter(|(at, _)| !own.contains(at));
    let sum = others.fold(0_u32, |sum, (_, byte)| sum + u32::from(*byte));
    image.put(at + own.start as u64, &(!sum).to_be_bytes());
}

/// The SHA-256 of both headers of a LUKS2 container, over the binary header and its JSON.
pub(crate) fn luks(image: &Image) {
    const LARGEST: u64 = 64 << 10;
    const SUM: std::ops::Range<usize> = 448..512;
    for at in [0, 16 << 10, 32 << 10, 64 << 10] {
        let Some(head) = image.get(Span::new(at, 512)) else { continue };
        let is_header = head.starts_with(b"LUKS\xba\xbe") || head.starts_with(b"SKUL\xba\xbe");
        if !is_header || head[6..8] != [0, 2] {
            continue;
        }
        let len = u64::from_be_bytes(head[8..16].try_into().unwrap());
        let Some(mut bytes) = image.get(Span::new(at, len.min(LARGEST))) else { continue };
        if bytes.len() < SUM.end {
            continue;
        }
        bytes[SUM].fill(0);
        image.put(at + SUM.start as u64, &Sha256::digest(&bytes));
    }
}
