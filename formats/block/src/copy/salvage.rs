// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Getting what can be got out of a disk that cannot be read everywhere.

use super::piece::{Done, length};
use super::work::{floor, is_damage};
use crate::{BlockDevice, Result, Span};

/// Fills `buf`; what cannot be read is narrowed to pieces of `unit` bytes, which become
/// zeroes and are noted in `done`, joined where they touch.
pub(super) fn read_around_damage(
    source: &dyn BlockDevice,
    buf: &mut [u8],
    offset: u64,
    unit: u64,
    done: &mut Done,
) -> Result<()> {
    let error = match source.read_at(buf, offset) {
        Ok(()) => return Ok(()),
        Err(error) if is_damage(&error) => error,
        Err(error) => return Err(error),
    };
    let span = Span::new(offset, length(buf));
    if floor(offset, unit).saturating_add(unit) < span.end() {
        // The first half, rounded up to units counted from byte 0 of the disk.
        let middle = offset.saturating_add(span.len.checked_div(2).unwrap_or(0));
        let middle = middle.checked_next_multiple_of(unit).unwrap_or(middle);
        // There is a multiple of it inside, if only one.
        let middle = if middle < span.end() { middle } else { middle.saturating_sub(unit) };
        let first = usize::try_from(middle.saturating_sub(offset)).unwrap_or(usize::MAX);
        if let Some((left, right)) = buf.split_at_mut_checked(first) {
            read_around_damage(source, left, offset, unit, done)?;
            return read_around_damage(source, right, middle, unit, done);
        }
    }
    buf.fill(0);
    done.copied.bytes_unreadable = done.copied.bytes_unreadable.saturating_add(span.len);
    match done.unreadable.last_mut() {
        Some((last, _)) if last.end() == span.start => {
            last.len = last.len.saturating_add(span.len);
        }
        _ => done.unreadable.push((span, error)),
    }
    Ok(())
}
