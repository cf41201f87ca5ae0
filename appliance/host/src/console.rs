// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The last words of the machine's console, bounded whatever the machine prints.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that are kept.
const KEPT: usize = 64 << 10;

/// The end of what the machine printed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Console(Arc<Mutex<VecDeque<u8>>>);

impl Console {
    /// Follows `stream` on a thread of its own until it ends.
    pub(crate) fn follow(&self, mut stream: impl Read + Send + 'static) -> std::io::Result<()> {
        let kept = Arc::clone(&self.0);
        std::thread::Builder::new().name("console".into()).spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = stream.read(&mut buffer) {
                if count == 0 {
                    break;
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(&buffer[..count]);
                let excess = kept.len().saturating_sub(KEPT);
                kept.drain(..excess);
            }
        })?;
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept_and_escapes_are_dropped() {
        let console = Console::default();
        let mut text = vec![b'x'; KEPT];
        text.extend_from_slice(b"\x1b[2Jthe end\r\n");
        console.follow(std::io::Cursor::new(text)).unwrap();
        for _ in 0..500 {
            if console.text().ends_with("[2Jthe end\n") {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        panic!("{:?}", console.text().get(KEPT - 20..));
    }
}
