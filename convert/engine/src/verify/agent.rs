// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Asking the QEMU guest agent whether it is there.

use super::signs::Sign;
use crate::{Error, ErrorKind, Result};
use serde_json::Value;
use std::io::{ErrorKind as IoKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

const PING: &[u8] = b"{\"execute\":\"guest-ping\"}\n";
/// Bytes of one answer; anything longer is no answer to a ping.
const LONGEST_ANSWER: usize = 64 << 10;

/// Asks every `period` until there is an answer or QEMU ends.
pub(crate) fn follow(mut stream: UnixStream, period: Duration, signs: Sender<Sign>) -> Result<()> {
    let failed = |error| {
        Error::new(ErrorKind::Transient, "the connection to the guest agent").because(error)
    };
    stream.set_read_timeout(Some(period)).map_err(failed)?;
    // Nobody reads before the agent is up; a full socket must not hold us.
    stream.set_write_timeout(Some(Duration::from_secs(1))).map_err(failed)?;
    let work = move || {
        let mut line = Vec::new();
        let mut buffer = [0; 4096];
        let mut asked: Option<Instant> = None;
        loop {
            if asked.is_none_or(|asked| asked.elapsed() >= period) {
                let _ = stream.write_all(PING);
                asked = Some(Instant::now());
            }
            let count = match stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error)
                    if matches!(
                        error.kind(),
                        IoKind::WouldBlock | IoKind::TimedOut | IoKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(_) => return,
            };
            for byte in buffer.get(..count).unwrap_or_default() {
                if *byte != b'\n' && line.len() < LONGEST_ANSWER {
                    line.push(*byte);
                    continue;
                }
                if is_answer(&line) {
                    let _ = signs.send(Sign::Life("the guest agent answers".into()));
                    return;
                }
                line.clear();
            }
        }
    };
    std::thread::Builder::new().name("guest agent".into()).spawn(work).map_err(failed)?;
    Ok(())
}

/// Whether `line` says that a command was carried out; errors of a half-read command are no
/// sign, the next ping will be answered.
fn is_answer(line: &[u8]) -> bool {
    let value: Option<Value> = serde_json::from_slice(line).ok();
    value.is_some_and(|value| value.get("return").is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn only_an_answer_is_a_sign() {
        for (line, expected) in [
            (&b"{\"return\": {}}"[..], true),
            (b"{\"error\": {\"class\": \"GenericError\"}}", false),
            (b"{\"execute\":\"guest-ping\"}", false),
            (b"7", false),
            (b"\xff\xff", false),
        ] {
            assert_eq!(is_answer(line), expected, "{line:?}");
        }
    }

    #[test]
    fn an_agent_that_comes_late_is_found() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (sender, signs) = channel();
        follow(ours, Duration::from_millis(20), sender).unwrap();
        let mut ping = vec![0; PING.len() * 2];
        theirs.read_exact(&mut ping).unwrap();
        assert_eq!(ping, [PING, PING].concat());
        theirs.write_all(&vec![b'x'; LONGEST_ANSWER * 2]).unwrap();
        theirs.write_all(b"\n{\"return\": {}}\n").unwrap();
        assert!(matches!(signs.recv().unwrap(), Sign::Life(_)));
    }
}
