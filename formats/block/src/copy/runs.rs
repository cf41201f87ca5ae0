// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which bytes of a piece are read, and which of these are worth writing.

use super::work::{Kind, Piece, Run, floor};
use crate::{Span, is_zero};

/// Appends a run that begins where the last one ends.
fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        _ if run.span.is_empty() => {}
        Some(last) if last.kind == run.kind => {
            last.span.len = run.span.end().saturating_sub(last.span.start);
        }
        _ => runs.push(run),
    }
}

/// Rounds data outward to whole blocks, so that every block is either written whole or
/// not at all, and joins data with less than `gap` bytes in between.
pub(super) fn plan(piece: &Piece, block: u64, gap: u64) -> Vec<Run> {
    let whole = piece.span();
    let mut runs: Vec<Run> = Vec::with_capacity(piece.runs.len());
    for run in &piece.runs {
        let done = runs.last().map_or(whole.start, |last| last.span.end());
        if run.kind != Kind::Data {
            push(&mut runs, Run::new(done.max(run.span.start), run.span.end(), run.kind));
            continue;
        }
        let mut start = floor(run.span.start, block).max(whole.start);
        let end = run.span.end().checked_next_multiple_of(block).unwrap_or(whole.end());
        let end = end.min(whole.end());
        if let [.., before, between] = runs.as_slice()
            && before.kind == Kind::Data
            && between.span.start.saturating_add(gap) > run.span.start
        {
            start = between.span.start;
        }
        while runs.last().is_some_and(|last| last.kind != Kind::Data && last.span.start >= start) {
            runs.pop();
        }
        match runs.last_mut() {
            Some(last) if last.kind == Kind::Data => start = start.max(last.span.end()),
            Some(last) => last.span.len = start.saturating_sub(last.span.start),
            None => {}
        }
        push(&mut runs, Run::new(start, end.max(start), Kind::Data));
    }
    runs
}

/// Appends the parts of `bytes`, which lie at `span` of the disk, to `runs`: blocks that
/// are all zero, if at least `least` bytes of them follow one another, and the rest.
pub(super) fn find_zeroes(runs: &mut Vec<Run>, bytes: &[u8], span: Span, block: u64, least: u64) {
    if least == 0 {
        push(runs, Run { span, kind: Kind::Data });
        return;
    }
    let mut rest = bytes;
    let mut at = span.start;
    // Zeroes that are not yet known to be enough.
    let mut zeroes = at;
    while !rest.is_empty() {
        let to_end = block.saturating_sub(at.checked_rem(block).unwrap_or(0));
        let len = usize::try_from(to_end).unwrap_or(usize::MAX).min(rest.len());
        let Some((head, tail)) = rest.split_at_checked(len) else { break };
        let end = at.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        if !is_zero(head) {
            // At the front of the bytes nothing is gained by writing zeroes along.
            let enough = zeroes == span.start || at.saturating_sub(zeroes) >= least;
            let kind = if enough { Kind::Zero } else { Kind::Data };
            push(runs, Run::new(zeroes, at, kind));
            push(runs, Run::new(at, end, Kind::Data));
            zeroes = end;
        }
        rest = tail;
        at = end;
    }
    push(runs, Run::new(zeroes, at, Kind::Zero));
}

#[cfg(test)]
mod tests {
    use super::*;
    use Kind::{Data, Skip, Zero};

    type Runs<'a> = &'a [(u64, u64, Kind)];

    fn piece(runs: Runs<'_>) -> Piece {
        Piece {
            runs: runs.iter().map(|(start, end, kind)| Run::new(*start, *end, *kind)).collect(),
        }
    }

    #[test]
    fn data_grows_to_whole_blocks_and_over_short_gaps() {
        let cases: &[(Runs<'_>, u64, Runs<'_>)] = &[
            (&[(0, 99, Zero)], 0, &[(0, 99, Zero)]),
            (&[(0, 3, Data), (3, 40, Zero)], 0, &[(0, 10, Data), (10, 40, Zero)]),
            (
                &[(0, 25, Zero), (25, 26, Data), (26, 40, Skip)],
                0,
                &[(0, 20, Zero), (20, 30, Data), (30, 40, Skip)],
            ),
            (&[(0, 1, Data), (1, 2, Zero), (2, 3, Data), (3, 9, Skip)], 0, &[(0, 9, Data)]),
            (
                &[(0, 10, Data), (10, 25, Zero), (25, 30, Data)],
                0,
                &[(0, 10, Data), (10, 20, Zero), (20, 30, Data)],
            ),
            (
                &[(0, 10, Data), (10, 25, Zero), (25, 30, Data)],
                15,
                &[(0, 10, Data), (10, 20, Zero), (20, 30, Data)],
            ),
            (&[(0, 10, Data), (10, 25, Zero), (25, 30, Data)], 16, &[(0, 30, Data)]),
            (&[(5, 6, Data), (6, 12, Zero), (12, 13, Skip), (13, 15, Data)], 0, &[(5, 15, Data)]),
        ];
        for (given, gap, expected) in cases {
            assert_eq!(plan(&piece(given), 10, *gap), piece(expected).runs, "{given:?}");
        }
    }

    #[test]
    fn zeroes_count_from_a_length_on() {
        let bytes = |text: &str| text.bytes().map(|byte| byte - b'0').collect::<Vec<u8>>();
        let cases: &[(&str, u64, u64, Runs<'_>)] = &[
            ("0000", 0, 2, &[(0, 4, Zero)]),
            ("0000", 0, 0, &[(0, 4, Data)]),
            ("1100001", 0, 4, &[(0, 2, Data), (2, 6, Zero), (6, 7, Data)]),
            ("1100001", 0, 5, &[(0, 7, Data)]),
            ("0100", 0, 2, &[(0, 2, Data), (2, 4, Zero)]),
            ("00010", 0, 9, &[(0, 2, Zero), (2, 4, Data), (4, 5, Zero)]),
            ("01000", 1, 2, &[(1, 2, Zero), (2, 4, Data), (4, 6, Zero)]),
        ];
        for (text, start, least, expected) in cases {
            let bytes = bytes(text);
            let mut runs = Vec::new();
            let span = Span::new(*start, u64::try_from(bytes.len()).unwrap());
            find_zeroes(&mut runs, &bytes, span, 2, *least);
            assert_eq!(runs, piece(expected).runs, "{text} {least}");
        }
    }
}
