// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeping what the guest prints while looking for signs in it.

use super::signs::{Sign, Watcher, plain};
use crate::{Error, ErrorKind, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

/// Bytes of the console log; what a guest prints after that is not kept.
const LONGEST_LOG: u64 = 8 << 20;
/// Bytes at the end that [`tail`] looks at.
const TAIL_BYTES: usize = 4096;

/// Follows `stream` until QEMU ends: everything goes to `log`, the first sign to `signs`.
pub(crate) fn follow(
    name: &str,
    mut stream: UnixStream,
    mut log: Option<File>,
    mut watcher: Watcher,
    signs: Sender<Sign>,
) -> Result<JoinHandle<()>> {
    let work = move || {
        let mut buffer = [0; 4096];
        let mut left = LONGEST_LOG;
        let mut signs = Some(signs);
        loop {
            let count = match stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let bytes = buffer.get(..count).unwrap_or_default();
            if let Some(file) = &mut log {
                let kept = usize::try_from(left).unwrap_or(usize::MAX).min(count);
                left = left.saturating_sub(kept as u64);
                if let Err(error) = file.write_all(bytes.get(..kept).unwrap_or_default()) {
                    tracing::warn!(%error, "the console log ends here");
                    log = None;
                }
            }
            if let Some(sign) = signs.as_ref().and_then(|_| watcher.take(bytes)) {
                // One is enough; what comes later could only contradict it.
                let _ = signs.take().map(|signs| signs.send(sign));
            }
        }
    };
    std::thread::Builder::new().name(name.into()).spawn(work).map_err(|error| {
        Error::new(ErrorKind::Transient, format!("starting the thread {name}")).because(error)
    })
}

/// The last lines of a console log, without escapes and control characters.
pub(crate) fn tail(log: &Path, lines: usize) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let start = bytes.len().saturating_sub(TAIL_BYTES);
    let text = plain(bytes.get(start..).unwrap_or_default());
    let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::signs::Wanted;
    use std::sync::mpsc::channel;

    #[test]
    fn the_log_is_bounded_and_the_first_sign_reported_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (sender, signs) = channel();
        let file = File::create(&path).unwrap();
        let thread = follow("test", ours, Some(file), Watcher::new(Wanted::Login), sender).unwrap();
        theirs
            .write_all(b"first\r\n\x1b[1mhost login: \r\nKernel panic - not syncing\n\n")
            .unwrap();
        assert!(matches!(signs.recv().unwrap(), Sign::Life(_)));
        let line = [b'x'; 4096];
        for _ in 0..LONGEST_LOG / 4096 + 2 {
            theirs.write_all(&line).unwrap();
        }
        drop(theirs);
        thread.join().unwrap();
        assert!(signs.recv().is_err());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), LONGEST_LOG);
        std::fs::write(&path, "a\n\x1b[1mb\r\n\nc\n").unwrap();
        assert_eq!(tail(&path, 2), "b\nc");
        assert_eq!(tail(&folder.path().join("none"), 2), "");
    }
}
