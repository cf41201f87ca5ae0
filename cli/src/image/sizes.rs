// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers of bytes, as people write and read them.

/// Why a text is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SizeError {
    /// It is none at all.
    Invalid,
    /// It is negative, or more than a file can have.
    OutOfRange,
}

/// The largest size: offsets are signed in the interfaces of the system.
const LARGEST: u64 = i64::MAX as u64;

/// Names of the powers of 1024.
const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// The bytes that `text` means: `1G`, `1.5k`, `0x10000`.
///
/// Suffixes are powers of 1024. A fraction needs one, since nothing is less than a byte,
/// and is cut off after the last whole byte; hexadecimal numbers have none.
pub(crate) fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start();
    if let Some(rest) = text.strip_prefix('-') {
        return match unsigned(rest) {
            Err(SizeError::Invalid) => Err(SizeError::Invalid),
            Ok(0) => Ok(0),
            _ => Err(SizeError::OutOfRange),
        };
    }
    let bytes = unsigned(text.strip_prefix('+').unwrap_or(text))?;
    if bytes > LARGEST { Err(SizeError::OutOfRange) } else { Ok(bytes) }
}

/// The number that `text` means, which is none of bytes: without suffixes and fractions.
pub(crate) fn parse_number(text: &str) -> Result<u64, SizeError> {
    let number = parse(text)?;
    let is_plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let digits = text.trim_start().trim_start_matches(['+', '-']);
    if is_plain(digits) || digits.starts_with("0x") || digits.starts_with("0X") {
        Ok(number)
    } else {
        Err(SizeError::Invalid)
    }
}

fn unsigned(text: &str) -> Result<u64, SizeError> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(SizeError::Invalid);
        }
        return u64::from_str_radix(digits, 16).map_err(|_| SizeError::OutOfRange);
    }
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, last)) if last.is_ascii_alphabetic() => {
            (text.get(..at).unwrap_or_default(), unit(last).ok_or(SizeError::Invalid)?)
        }
        _ => (text, 1),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.len() + fraction.len() == 0 || !digits(whole) || !digits(fraction) {
        return Err(SizeError::Invalid);
    }
    let whole = if whole.is_empty() {
        0
    } else {
        whole.parse::<u64>().map_err(|_| SizeError::OutOfRange)?
    };
    let part = part_of(fraction, unit);
    if unit == 1 && fraction.bytes().any(|digit| digit != b'0') {
        return Err(SizeError::Invalid);
    }
    whole.checked_mul(unit).and_then(|bytes| bytes.checked_add(part)).ok_or(SizeError::OutOfRange)
}

/// The whole bytes in the fraction of a unit that the digits after the point mean: exactly
/// those that qemu-img gets, which calculates in floating point.
fn part_of(digits: &str, unit: u64) -> u64 {
    let fraction: f64 = format!("0.{digits}").parse().unwrap_or(0.0);
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "units are powers of two, and a fraction of one is never negative"
    )]
    let part = (fraction * unit as f64) as u64;
    part
}

fn unit(letter: char) -> Option<u64> {
    let power = match letter.to_ascii_uppercase() {
        'B' => 0,
        'K' => 1,
        'M' => 2,
        'G' => 3,
        'T' => 4,
        'P' => 5,
        'E' => 6,
        _ => return None,
    };
    Some(1 << (10 * power))
}

/// A size with three significant digits: `1.38 MiB`.
///
/// From 1000 of a unit on, the next one is used.
pub(crate) fn display(bytes: u64) -> String {
    let mut power = 0;
    while power + 1 < UNITS.len() && u128::from(bytes) >= 1000 * (1_u128 << (10 * power)) {
        power += 1;
    }
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = bytes as f64 / (1_u64 << (10 * power)) as f64;
    format!("{} {}B", three_digits(value), UNITS.get(power).unwrap_or(&""))
}

/// What C's `%.3g` makes of a number below 1000.
fn three_digits(value: f64) -> String {
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else if value >= 1.0 {
        2
    } else {
        3
    };
    let text = format!("{value:.decimals$}");
    if text == "1000" {
        return "1e+03".to_owned();
    }
    if text.contains('.') {
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_qemu_img_takes_them_for() {
        let cases = [
            ("0", 0),
            (".5M", 524_288),
            ("1.", 1),
            ("1.k", 1024),
            ("0x10", 16),
            ("+5k", 5120),
            (" 5k", 5120),
            ("5B", 5),
            ("1.1k", 1126),
            ("0.1k", 102),
            ("00010", 10),
            ("1.5G", 1_610_612_736),
            ("1.0", 1),
            ("2T", 2 << 40),
            ("7.9999E", 9_223_256_744_704_315_136),
            ("9223372036854775807", i64::MAX as u64),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text), Ok(expected), "{text:?}");
        }
        for text in ["", "foo", "1.5", "1.5B", "5k ", "0x10k", "1kk", "1e3", "1KiB", "1,5k", "1Z"] {
            assert_eq!(parse(text), Err(SizeError::Invalid), "{text:?}");
        }
        for text in ["9223372036854775808", "8E", "-1", "-1G", "18446744073709551616"] {
            assert_eq!(parse(text), Err(SizeError::OutOfRange), "{text:?}");
        }
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        let cases = [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (2560, "2.5 KiB"),
            (960_512, "938 KiB"),
            (1_023_590, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_351_680, "1.29 MiB"),
            (10_514_432, "10 MiB"),
            (1 << 30, "1 GiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(display(bytes), expected, "{bytes}");
        }
    }
}
