// SPDX-License-Identifier: Apache-2.0 OR MIT
//! bzip2: streams one after the other, of which only a full pass tells the sizes. Parallel
//! compressors write many short streams.

use crate::open::Builder;
use crate::piece::{Piece, Start};
use crate::source::{Source, failure};
use ::bzip2::bufread::BzDecoder;
use std::io::Read;
use std::sync::Arc;
use tranship_block::{BlockDevice, Result, Span, is_zero};

pub(crate) fn stream_decoder(source: Source) -> BzDecoder<Source> {
    BzDecoder::new(source)
}

/// Decompresses everything once.
pub(crate) fn pieces(file: &Arc<dyn BlockDevice>, builder: &mut Builder) -> Result<()> {
    let end = file.size();
    let mut at = 0;
    let mut buffer = vec![0; 64 << 10];
    while at < end {
        let mut head = [0; 3];
        let there = file.read_at(&mut head, at.min(end.saturating_sub(3)));
        if at > 0 && (there.is_err() || head != *b"BZh" || end.saturating_sub(at) < 3) {
            builder.warnings.push(format!(
                "{} bytes behind the bzip2 data are left out",
                end.saturating_sub(at)
            ));
            return Ok(());
        }
        let mut stream = BzDecoder::new(Source::new(file, Span::new(at, end.saturating_sub(at))));
        let mut len = 0_u64;
        let mut zero = true;
        loop {
            let got = match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(got) => got,
                Err(error) => {
                    builder.forgive(failure(error, "bzip2 stream").at(at))?;
                    let packed = Span::new(at, end.saturating_sub(at));
                    return builder.push(len, |span| Piece {
                        span,
                        packed,
                        zero,
                        start: Start::Plain,
                    });
                }
            };
            zero = zero && is_zero(buffer.get(..got).unwrap_or_default());
            len = len.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
            builder.check_size(len)?;
        }
        let next = stream.get_ref().position();
        let packed = Span::new(at, next.saturating_sub(at));
        builder.push(len, |span| Piece { span, packed, zero, start: Start::Plain })?;
        if next <= at {
            break;
        }
        at = next;
    }
    Ok(())
}
