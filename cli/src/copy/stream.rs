// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pipes and whatever else has bytes in one order only.

use crate::failure::Failure;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Result, Span, Zeroing};

/// Bytes that are copied as if they were a disk: whole chunks of a manifest.
const WINDOW: usize = 8 << 20;

/// Windows that exist: one is filled while another one is written.
const WINDOWS: usize = 3;

/// How often a reader who waits looks whether it still should, in nanoseconds.
const LOOK: i64 = 200_000_000;

/// The end of a device without one.
pub(super) const ENDLESS: u64 = i64::MAX as u64;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Something that takes bytes from front to back, as a disk.
#[derive(Debug)]
pub(super) struct Sink {
    /// What takes them, and how many it has.
    out: Mutex<(File, u64)>,
}

impl Sink {
    pub(super) fn new(file: File) -> Self {
        Self { out: Mutex::new((file, 0)) }
    }

    fn append<'a>(&self, offset: u64, parts: impl Iterator<Item = &'a [u8]>) -> Result<()> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, at) = &mut *out;
        if *at != offset {
            let text = format!("a stream takes bytes in order, those at {at} are next");
            return Err(Error::usage(text).at(offset));
        }
        for part in parts {
            file.write_all(part)
                .map_err(|error| Error::io("cannot write to the stream", error).at(*at))?;
            *at = at.saturating_add(length(part));
        }
        Ok(())
    }
}

impl BlockDevice for Sink {
    fn size(&self) -> u64 {
        ENDLESS
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, _buf: &mut [u8], offset: u64) -> Result<()> {
        Err(Error::usage("a stream cannot be read back").at(offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.append(offset, std::iter::once(buf))
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        let whole = length(&ZEROES);
        let parts = (0..span.len.div_ceil(whole)).filter_map(|number| {
            let left = span.len.saturating_sub(number.saturating_mul(whole)).min(whole);
            ZEROES.get(..usize::try_from(left).ok()?)
        });
        self.append(span.start, parts)
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent::new(ExtentKind::Data, ENDLESS.saturating_sub(offset).max(1)))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// Some bytes of a stream at their places in it: a disk whose lower part has gone by.
#[derive(Debug)]
pub(super) struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    /// Where its bytes begin.
    pub(super) fn start(&self) -> u64 {
        self.start
    }
}

impl BlockDevice for Window {
    fn size(&self) -> u64 {
        self.start.saturating_add(length(&self.bytes))
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let wanted = offset
            .checked_sub(self.start)
            .and_then(|start| self.bytes.get(usize::try_from(start).ok()?..))
            .and_then(|tail| tail.get(..buf.len()))
            .ok_or_else(|| Error::usage("this part of the stream is not there").at(offset))?;
        buf.copy_from_slice(wanted);
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent::new(ExtentKind::Data, self.size().saturating_sub(offset).max(1)))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// Cuts what comes out of `input` into windows, reading ahead while `work` has one, until
/// `is_cancelled` says that nobody wants more.
///
/// Returns how many bytes there were.
pub(super) fn windows(
    input: &File,
    is_cancelled: impl Fn() -> bool + Sync,
    mut work: impl FnMut(&Window) -> std::result::Result<(), Failure>,
) -> std::result::Result<u64, Failure> {
    let stop = &AtomicBool::new(false);
    let is_cancelled = &is_cancelled;
    std::thread::scope(|scope| {
        let (full, filled) = channel::<Result<Vec<u8>>>();
        let (spare, spares) = channel();
        for _ in 0..WINDOWS {
            // Nobody has left yet.
            let _ = spare.send(Vec::new());
        }
        let is_over = move || stop.load(Ordering::Relaxed) || is_cancelled();
        scope.spawn(move || read_ahead(input, is_over, &full, &spares));
        let mut start = 0;
        let outcome = filled.iter().try_for_each(|bytes| {
            let window = Window { start, bytes: bytes? };
            work(&window)?;
            start = window.size();
            // The reader may have come to the end.
            let _ = spare.send(window.bytes);
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        outcome.map(|()| start)
    })
}

/// Fills spare windows until the stream ends or nobody wants more.
fn read_ahead(
    mut input: &File,
    is_over: impl Fn() -> bool,
    full: &Sender<Result<Vec<u8>>>,
    spares: &Receiver<Vec<u8>>,
) {
    let mut total: u64 = 0;
    while let Ok(mut bytes) = spares.recv() {
        bytes.resize(WINDOW, 0);
        let mut count = 0;
        // A pipe gives less than what is asked for: only nothing at all is its end.
        let ended = loop {
            let Some(rest) = bytes.get_mut(count..).filter(|rest| !rest.is_empty()) else {
                break Ok(false);
            };
            match wait(input, &is_over).and_then(|()| input.read(rest)) {
                Ok(0) => break Ok(true),
                Ok(more) => count = count.saturating_add(more),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        bytes.truncate(count);
        total = total.saturating_add(length(&bytes));
        let is_last = !matches!(ended, Ok(false));
        if !bytes.is_empty() && full.send(Ok(bytes)).is_err() {
            return;
        }
        if let Err(error) = ended {
            let error = Error::io("reading the stream failed", error).at(total);
            // Whoever has left has an error of its own.
            let _ = full.send(Err(error));
        }
        if is_last {
            return;
        }
    }
}

/// Waits until there is something to read, or the stream has ended.
fn wait(input: &File, is_over: impl Fn() -> bool) -> std::io::Result<()> {
    let limit = Timespec { tv_sec: 0, tv_nsec: LOOK };
    loop {
        if is_over() {
            return Err(std::io::Error::new(ErrorKind::BrokenPipe, "nobody wants more"));
        }
        match poll(&mut [PollFd::new(input, PollFlags::IN)], Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe with a thread that writes `bytes` into it in pieces of `piece`.
    fn pipe(bytes: Vec<u8>, piece: usize) -> File {
        let (reader, writer) = std::io::pipe().unwrap();
        std::thread::spawn(move || {
            let mut writer = writer;
            bytes.chunks(piece).try_for_each(|piece| writer.write_all(piece))
        });
        File::from(std::os::fd::OwnedFd::from(reader))
    }

    #[test]
    fn short_reads_make_whole_windows() {
        for len in [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW + 17] {
            let bytes: Vec<u8> = (0..=250).cycle().take(len).collect();
            let mut seen = Vec::new();
            let total = windows(
                &pipe(bytes.clone(), 10_007),
                || false,
                |window| {
                    let len = window.size() - window.start();
                    assert_eq!(window.start(), length(&seen));
                    assert!(len == WINDOW as u64 || window.size() == length(&bytes));
                    let mut part = vec![0; usize::try_from(len).unwrap()];
                    window.read_at(&mut part, window.start()).unwrap();
                    assert!(window.read_at(&mut [0; 2], window.size() - 1).is_err());
                    seen.extend(part);
                    Ok(())
                },
            );
            assert_eq!(total.unwrap(), len as u64);
            assert!(seen == bytes, "{len}");
        }
    }

    #[test]
    fn who_fails_does_not_wait_for_more() {
        let (reader, writer) = std::io::pipe().unwrap();
        let input = File::from(std::os::fd::OwnedFd::from(reader));
        std::thread::spawn({
            let mut writer = writer.try_clone().unwrap();
            move || writer.write_all(&vec![1; WINDOW])
        });
        let failure = windows(&input, || false, |_| Err(Failure::usage("full"))).unwrap_err();
        assert_eq!(failure.message(), "full");
        drop(writer);
    }

    #[test]
    fn a_silent_stream_can_be_left() {
        let (reader, writer) = std::io::pipe().unwrap();
        let input = File::from(std::os::fd::OwnedFd::from(reader));
        assert!(windows(&input, || true, |_| Ok(())).is_err());
        drop(writer);
    }

    #[test]
    fn a_sink_takes_bytes_and_zeroes_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let sink = Sink::new(File::create(&path).unwrap());
        sink.write_at(&[1, 2], 0).unwrap();
        sink.write_zeroes(Span::new(2, 100_000), Zeroing::MayUnmap).unwrap();
        assert_eq!(sink.write_at(&[3], 7).unwrap_err().offset(), Some(7));
        sink.write_at(&[3], 100_002).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len(), &bytes[..3], bytes[100_002]), (100_003, &[1, 2, 0][..], 3));
    }
}
