// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Apple Data Compression: literals, and copies of what is up to 64 KiB back.

/// Decompresses `packed` into `out`, which has the size that is expected; nothing if it
/// does not fit exactly.
pub(crate) fn decompress(packed: &[u8], out: &mut [u8]) -> Option<()> {
    let mut rest = packed;
    let mut done = 0_usize;
    while done < out.len() {
        let (&control, tail) = rest.split_first()?;
        if control & 0x80 != 0 {
            let len = usize::from(control & 0x7f).checked_add(1)?;
            let (literal, tail) = tail.split_at_checked(len)?;
            let end = done.checked_add(len)?;
            out.get_mut(done..end)?.copy_from_slice(literal);
            (done, rest) = (end, tail);
            continue;
        }
        let (len, back, tail) = if control & 0x40 != 0 {
            let (&[high, low], tail) = tail.split_first_chunk()?;
            (usize::from(control & 0x3f).checked_add(4)?, u16::from_be_bytes([high, low]), tail)
        } else {
            let (&low, tail) = tail.split_first()?;
            let back = u16::from_be_bytes([control & 3, low]);
            (usize::from((control >> 2) & 0xf).checked_add(3)?, back, tail)
        };
        let from = done.checked_sub(usize::from(back).checked_add(1)?)?;
        // Byte by byte: a copy may reach into what it makes.
        for step in 0..len {
            let byte = *out.get(from.checked_add(step)?)?;
            *out.get_mut(done.checked_add(step)?)? = byte;
        }
        done = done.checked_add(len)?;
        rest = tail;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_both_kinds_of_copies() {
        let packed = [0x82, b'a', b'b', b'c', 0x00, 2, 0x41, 0, 0, 0x80, b'd'];
        let mut out = [0; 12];
        decompress(&packed, &mut out).unwrap();
        assert_eq!(&out, b"abcabccccccd");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for packed in [&[0x83, 1][..], &[0, 0], &[0x80, 1, 0x40, 0, 1], &[0x80], &[], &[0x89; 11]] {
            assert_eq!(decompress(packed, &mut [0; 8]), None, "{packed:?}");
        }
    }
}
