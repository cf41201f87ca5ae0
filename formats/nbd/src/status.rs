// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Answers to block status requests.

use crate::context::Context;
use crate::export::Export;
use std::time::{Duration, Instant};
use tranship_block::{Error, Result, Span};

/// An answer is cut short after this time.
const MOST_TIME: Duration = Duration::from_millis(50);
/// The longest extent of a 32-bit answer: the next request still begins where a cluster or
/// a grain of any size that is in use does.
pub(crate) const LONGEST_COMPACT: u64 = (1 << 32) - (64 << 10);

/// The extents of `span` from its start, as lengths and flags, as far as one reply goes:
/// at least one, at most `most`, none of them longer than `longest`, none past `span`.
pub(crate) fn extents(
    export: &Export,
    context: Context,
    span: Span,
    most: usize,
    longest: u64,
) -> Result<Vec<(u64, u64)>> {
    let started = Instant::now();
    let mut extents: Vec<(u64, u64)> = Vec::new();
    let mut at = span.start;
    while at < span.end() {
        let (flags, len) = match context.at(export, at) {
            Ok((flags, len)) if len > 0 => (flags, len),
            Ok(_) if extents.is_empty() => {
                return Err(Error::corrupt("device reported an empty extent").at(at));
            }
            Err(error) if extents.is_empty() => return Err(error.at(at)),
            // What is known so far is a valid answer; the next request meets the error.
            Ok(_) | Err(_) => break,
        };
        let len = len.min(span.end().saturating_sub(at));
        if extents.last().is_none_or(|(_, last)| *last != flags) {
            if extents.len() >= most.max(1) {
                break;
            }
            extents.push((0, flags));
        }
        if let Some((known, _)) = extents.last_mut() {
            *known = known.saturating_add(len);
            if *known > longest {
                *known = longest;
                break;
            }
        }
        at = at.saturating_add(len);
        if started.elapsed() > MOST_TIME {
            break;
        }
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tranship_block::{BlockDevice, Extent, ExtentKind, Zeroing};

    /// 64 TiB of which the first 100 KiB are data, told in pieces of at most 3 GiB.
    #[derive(Debug)]
    struct Huge;

    const DATA: u64 = 100 << 10;

    impl BlockDevice for Huge {
        fn size(&self) -> u64 {
            64 << 40
        }
        fn is_read_only(&self) -> bool {
            true
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
            Ok(())
        }
        fn write_zeroes(&self, _: Span, _: Zeroing) -> Result<()> {
            Ok(())
        }
        fn extent_at(&self, offset: u64) -> Result<Extent> {
            Ok(match DATA.checked_sub(offset) {
                Some(left) if left > 0 => Extent::new(ExtentKind::Data, left),
                _ => {
                    Extent::new(ExtentKind::Hole, (3 << 30).min(self.size().saturating_sub(offset)))
                }
            })
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn answers_are_merged_bounded_and_clipped() {
        let export = Export::new("", Arc::new(Huge));
        let ask = |start, len, most, longest| {
            extents(&export, Context::Allocation, Span::new(start, len), most, longest).unwrap()
        };
        let whole = 64 << 40;
        assert_eq!(ask(0, whole, 9, u64::MAX), [(DATA, 0), (whole - DATA, 3)]);
        assert_eq!(ask(0, whole, 1, u64::MAX), [(DATA, 0)]);
        assert_eq!(ask(0, 1, 9, u64::MAX), [(1, 0)]);
        assert_eq!(ask(DATA - 1, 2, 9, u64::MAX), [(1, 0), (1, 3)]);
        let compact = u64::from(u32::MAX);
        assert_eq!(ask(1 << 20, compact, 9, LONGEST_COMPACT), [(LONGEST_COMPACT, 3)]);
        assert_eq!(ask(0, compact, 9, LONGEST_COMPACT)[1], (compact - DATA, 3));
    }
}
