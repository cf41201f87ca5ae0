// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A picture of the guest's screen.
//!
//! QEMU writes PNG only where it was built with a library for it, but PPM everywhere, so
//! PPM is what we ask for.

use super::qmp::Qmp;
use crate::{Error, ErrorKind, Result};
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Duration;

/// Pixels of the largest screen: 8192 by 4320.
const MOST_PIXELS: u64 = 8192 * 4320;

/// Stores what the screen of the machine shows as PNG at `target`; `folder` is private.
pub(crate) fn shoot(qmp: &mut Qmp, folder: &Path, target: &Path) -> Result<()> {
    let raw = folder.join("screen.ppm");
    let name = raw.to_str().ok_or_else(|| failed("the temporary folder's name is not UTF-8"))?;
    qmp.execute("screendump", json!({"filename": name}), Duration::from_secs(20))?;
    let len = std::fs::metadata(&raw).map_or(0, |facts| facts.len());
    if len > MOST_PIXELS * 3 + 64 {
        return Err(failed(format!("the picture has {len} bytes, more than any screen")));
    }
    let bytes = std::fs::read(&raw).map_err(|error| failed("QEMU's picture").because(error))?;
    let (width, height, pixels) = read_ppm(&bytes)?;
    let stored = |error: std::io::Error| {
        failed(format!("cannot store the picture at {}", target.display())).because(error)
    };
    let mut file = BufWriter::new(File::create(target).map_err(stored)?);
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written = encoder.write_header().and_then(|mut writer| {
        writer.write_image_data(pixels)?;
        writer.finish()
    });
    written.map_err(|error| stored(std::io::Error::other(error)))?;
    file.flush().map_err(stored)
}

/// Where the text of a screen in text mode lies in the machine's memory.
const TEXT_ADDRESS: u64 = 0xb8000;
/// All of it: where the screen begins therein moves when it scrolls.
const TEXT_LEN: usize = 32 << 10;
/// Letters and attributes of one line, a byte each in turn.
const TEXT_LINE: usize = 160;

/// What the screen of a PC in text mode shows, and what has scrolled out of it; anything at
/// all if it is in a graphics mode.
pub(crate) fn read_text(qmp: &mut Qmp, folder: &Path) -> Result<String> {
    let raw = folder.join("screen.text");
    let name = raw.to_str().ok_or_else(|| failed("the temporary folder's name is not UTF-8"))?;
    let arguments = json!({"val": TEXT_ADDRESS, "size": TEXT_LEN, "filename": name});
    qmp.execute("pmemsave", arguments, Duration::from_secs(5))?;
    let bytes = std::fs::read(&raw).map_err(|error| failed("QEMU's text").because(error))?;
    Ok(text_of(bytes.get(..TEXT_LEN).unwrap_or_default()))
}

fn text_of(memory: &[u8]) -> String {
    let lines = memory.chunks(TEXT_LINE).map(|line| {
        let letters = line.iter().step_by(2).map(|byte| match byte {
            b' '..=b'~' => char::from(*byte),
            _ => ' ',
        });
        let line: String = letters.collect();
        // A prompt ends with one space; the rest of its line is blank as well.
        format!("{} \n", line.trim_end())
    });
    lines.collect()
}

/// Width, height and the pixels, three bytes each, of a binary PPM.
fn read_ppm(bytes: &[u8]) -> Result<(u32, u32, &[u8])> {
    let mut rest = bytes.strip_prefix(b"P6").ok_or_else(|| failed("QEMU's picture is no PPM"))?;
    let mut numbers = [0_u32; 3];
    for (number, name) in numbers.iter_mut().zip(["width", "height", "largest value"]) {
        rest = rest.trim_ascii_start();
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let text = rest.get(..digits).and_then(|text| str::from_utf8(text).ok());
        *number = text
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| failed(format!("QEMU's picture has no {name}")))?;
        rest = rest.get(digits..).unwrap_or_default();
    }
    let [width, height, largest] = numbers;
    let pixels = rest.get(1..).unwrap_or_default();
    let expected = (u64::from(width) * u64::from(height)).saturating_mul(3);
    let is_whole = u64::try_from(pixels.len()) == Ok(expected) && expected > 0;
    if largest != 255 || expected > MOST_PIXELS * 3 || !is_whole {
        return Err(failed(format!(
            "QEMU's picture of {width} by {height} has {} bytes of pixels, expected {expected}",
            pixels.len()
        )));
    }
    Ok((width, height, pixels))
}

fn failed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Conversion, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_line_by_line_without_attributes() {
        let mut memory = vec![0; 2 * TEXT_LINE];
        for (place, letter) in (TEXT_LINE..).step_by(2).zip(b"(initramfs)") {
            memory[place] = *letter;
            memory[place + 1] = 7;
        }
        assert_eq!(text_of(&memory), " \n(initramfs) \n");
        assert_eq!(text_of(&[]), "");
    }

    #[test]
    fn pictures_are_read_whole_or_not_at_all() {
        let (width, height, pixels) = read_ppm(b"P6\n2 1\n255\n\n\x02\x03\x04\x05\x06").unwrap();
        assert_eq!((width, height, pixels), (2, 1, &b"\n\x02\x03\x04\x05\x06"[..]));
        for bytes in [
            &b""[..],
            b"P5\n1 1\n255\n123",
            b"P6\n1 1\n255\n12",
            b"P6\n1 1\n255\n1234",
            b"P6\n1 1\n65535\n123",
            b"P6\n0 0\n255\n",
            b"P6\n4294967296 1\n255\n",
            b"P6\n4294967295 4294967295\n255\n123",
            b"P6\n1",
        ] {
            assert!(read_ppm(bytes).is_err(), "{bytes:?}");
        }
    }
}
