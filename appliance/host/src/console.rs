// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The last words of the machine's console, bounded whatever the machine prints, and the events
//! that our own monitor tells beside them.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tranship_vmm::trace::{Event, SEPARATOR};

/// Bytes that are kept.
const KEPT: usize = 64 << 10;

/// The most bytes of a line that may be an event.
const MOST_LINE: u64 = 64 << 10;

/// What a stream carries.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source {
    /// Words alone, whatever they look like.
    Words,
    /// Words, and events of a process that was started at `begun`.
    Events {
        /// As [`tranship_vmm::trace::now`] says.
        begun: u64,
    },
}

/// The end of what the machine printed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Console(Arc<Mutex<VecDeque<u8>>>);

impl Console {
    /// Follows `stream` on a thread of its own until it ends.
    pub(crate) fn follow(
        &self,
        stream: impl Read + Send + 'static,
        source: Source,
    ) -> std::io::Result<()> {
        let kept = self.clone();
        std::thread::Builder::new().name("console".into()).spawn(move || match source {
            Source::Words => kept.keep_all(stream),
            Source::Events { begun } => kept.keep_words(stream, begun),
        })?;
        Ok(())
    }

    fn keep_all(&self, mut stream: impl Read) {
        let mut buffer = [0; 4096];
        while let Ok(count) = stream.read(&mut buffer) {
            if count == 0 {
                break;
            }
            self.keep(buffer.get(..count).unwrap_or_default());
        }
    }

    /// Tells events on and keeps the rest.
    fn keep_words(&self, stream: impl Read, begun: u64) {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.by_ref().take(MOST_LINE).read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            if let Some(event) = event(&line) {
                tell(&event, begun);
            } else {
                let words = String::from_utf8_lossy(&line);
                tracing::debug!(words = words.trim_end(), "the machine's process says");
                self.keep(&line);
            }
            line.clear();
        }
    }

    fn keep(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT);
        kept.drain(..excess);
    }

    /// What is kept, as text without control characters but line ends and tabs.
    pub(crate) fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        String::from_utf8_lossy(&bytes)
            .chars()
            .filter(|letter| !letter.is_control() || matches!(letter, '\n' | '\t'))
            .collect()
    }
}

/// The event that a line holds.
fn event(line: &[u8]) -> Option<Event> {
    let (&SEPARATOR, text) = line.split_first()? else { return None };
    serde_json::from_slice(text).ok()
}

/// Tells an event of another process as if it were ours, with the time since that was started.
fn tell(event: &Event, begun: u64) {
    let at = Duration::from_nanos(event.at.saturating_sub(begun));
    // A process that something has taken over could write what it likes.
    let clean = |text: &str| text.chars().filter(|c| !c.is_control()).collect::<String>();
    let (from, text) = (clean(&event.target), clean(&event.text));
    match event.level.as_str() {
        "ERROR" => tracing::error!(?at, from, "machine: {text}"),
        "WARN" => tracing::warn!(?at, from, "machine: {text}"),
        "INFO" => tracing::info!(?at, from, "machine: {text}"),
        "DEBUG" => tracing::debug!(?at, from, "machine: {text}"),
        _ => tracing::trace!(?at, from, "machine: {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept_and_escapes_are_dropped() {
        let console = Console::default();
        let mut text = vec![b'x'; KEPT];
        text.extend_from_slice(b"\x1b[2Jthe end\r\n");
        console.follow(std::io::Cursor::new(text), Source::Words).unwrap();
        for _ in 0..500 {
            if console.text().ends_with("[2Jthe end\n") {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("{:?}", console.text().get(KEPT - 20..));
    }

    /// Collects what is traced on this thread.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn traced(work: impl FnOnce()) -> String {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        let bytes = log.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn line(at: u64, text: &str) -> Vec<u8> {
        let event = Event {
            at,
            level: "DEBUG".into(),
            target: "tranship_vmm::board".into(),
            text: text.into(),
        };
        let mut line = vec![SEPARATOR];
        line.extend(serde_json::to_vec(&event).unwrap());
        line.push(b'\n');
        line
    }

    #[test]
    fn events_are_told_with_their_time_and_words_are_kept() {
        let mut stream = b"first words\n".to_vec();
        stream.extend(line(1_500_000_000, "device activated\u{1b}[2J kind=2"));
        stream.extend(b"\x1e{\"no\": \"event\"}\nlast words");
        let console = Console::default();
        let log = traced(|| console.keep_words(&*stream, 1_000_000_000));
        assert_eq!(console.text(), "first words\n{\"no\": \"event\"}\nlast words");
        assert!(log.contains("machine: device activated[2J kind=2 at=500ms"), "{log}");
        assert!(log.contains("from=\"tranship_vmm::board\""), "{log}");
        assert!(log.contains("words=\"last words\""), "{log}");
    }

    #[test]
    fn what_the_guest_prints_is_never_an_event() {
        let console = Console::default();
        let log = traced(|| console.keep_all(&*line(1, "forged")));
        assert!(log.is_empty(), "{log}");
        assert!(console.text().contains("forged"));
    }
}
