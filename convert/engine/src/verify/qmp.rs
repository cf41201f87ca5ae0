// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's machine protocol, as far as a boot test needs it.
//!
//! A machine that runs a hostile guest may be taken over by it, so what comes from QEMU is
//! bounded and never trusted.

use crate::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Bytes of one message.
const LONGEST_MESSAGE: u64 = 1 << 20;

/// One line from QEMU.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Message {
    /// What it says first.
    Greeting,
    /// A command was carried out.
    Return(u64, Value),
    /// A command failed, with the reason.
    Failure(u64, String),
    /// Something happened: its name and its data.
    Event(String, Value),
}

impl Message {
    /// Reads one line.
    pub(crate) fn parse(line: &str) -> Result<Self> {
        let unknown = || {
            let start: String = line.chars().take(120).collect();
            Error::new(ErrorKind::Conversion, format!("QEMU sent {start:?}, which is no message"))
        };
        let value: Value = serde_json::from_str(line).map_err(|error| unknown().because(error))?;
        let Value::Object(mut object) = value else {
            return Err(unknown());
        };
        if object.contains_key("QMP") {
            return Ok(Self::Greeting);
        }
        if let Some(Value::String(name)) = object.remove("event") {
            return Ok(Self::Event(name, object.remove("data").unwrap_or(Value::Null)));
        }
        let id = object.get("id").and_then(Value::as_u64).ok_or_else(unknown)?;
        if let Some(answer) = object.remove("return") {
            return Ok(Self::Return(id, answer));
        }
        let reason = object.get("error").and_then(|error| error.get("desc"));
        let reason = reason.and_then(Value::as_str).ok_or_else(unknown)?;
        Ok(Self::Failure(id, reason.chars().filter(|letter| !letter.is_control()).collect()))
    }
}

/// A connection to a running QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: UnixStream,
    answers: Receiver<Message>,
    next: u64,
}

impl Qmp {
    /// Reads from `stream` on a thread of its own and hands events to `on_event`.
    pub(crate) fn start(
        stream: UnixStream,
        on_event: impl Fn(&str, &Value) + Send + 'static,
    ) -> Result<Self> {
        let failed = |error| lost().because(error);
        stream.set_write_timeout(Some(Duration::from_secs(5))).map_err(failed)?;
        let reader = stream.try_clone().map_err(failed)?;
        let (sender, answers) = channel();
        std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || follow(reader, &sender, on_event))
            .map_err(failed)?;
        Ok(Self { stream, answers, next: 0 })
    }

    /// Waits for the greeting and switches to commands.
    pub(crate) fn negotiate(&mut self, limit: Duration) -> Result<()> {
        match self.answers.recv_timeout(limit) {
            Ok(Message::Greeting) => self.execute("qmp_capabilities", json!({}), limit).map(drop),
            _ => Err(lost()),
        }
    }

    /// Carries a command out and waits for its answer.
    pub(crate) fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        self.next += 1;
        let mut message = json!({"execute": command, "id": self.next});
        if arguments.as_object().is_some_and(|object| !object.is_empty()) {
            message["arguments"] = arguments;
        }
        let line = format!("{message}\n");
        self.stream.write_all(line.as_bytes()).map_err(|error| lost().because(error))?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.answers.recv_timeout(left) {
                Ok(Message::Return(id, answer)) if id == self.next => return Ok(answer),
                Ok(Message::Failure(id, reason)) if id == self.next => {
                    return Err(Error::new(
                        ErrorKind::Conversion,
                        format!("QEMU's {command}: {reason}"),
                    ));
                }
                // An answer to a command that was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::new(
                        ErrorKind::Conversion,
                        format!("QEMU's {command}: no answer in {limit:?}"),
                    ));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(lost()),
            }
        }
    }
}

fn follow(stream: UnixStream, answers: &Sender<Message>, on_event: impl Fn(&str, &Value)) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        match reader.by_ref().take(LONGEST_MESSAGE).read_line(&mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if !line.ends_with('\n') => {
                tracing::warn!("QEMU sent a message that is longer than {LONGEST_MESSAGE} bytes");
                return;
            }
            Ok(_) => {}
        }
        match Message::parse(&line) {
            Ok(Message::Event(name, data)) => on_event(&name, &data),
            Ok(message) => {
                if answers.send(message).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "QEMU's machine protocol");
                return;
            }
        }
    }
}

fn lost() -> Error {
    Error::new(ErrorKind::Conversion, "the connection to QEMU is lost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart() {
        let table = [
            (r#"{"QMP": {"version": {}}}"#, Message::Greeting),
            (r#"{"return": {}, "id": 7}"#, Message::Return(7, json!({}))),
            (
                r#"{"id": 7, "error": {"class": "x", "desc": "no\n"}}"#,
                Message::Failure(7, "no".into()),
            ),
            (
                r#"{"timestamp": {}, "event": "SHUTDOWN", "data": {"guest": true}}"#,
                Message::Event("SHUTDOWN".into(), json!({"guest": true})),
            ),
            (r#"{"event": "STOP"}"#, Message::Event("STOP".into(), Value::Null)),
        ];
        for (line, message) in table {
            assert_eq!(Message::parse(line).unwrap(), message, "{line}");
        }
        let deep = "[".repeat(100_000);
        for line in ["", "7", "{", "{}", r#"{"id": "x", "return": 1}"#, r#"{"id": 1}"#, &deep] {
            assert!(Message::parse(line).unwrap_err().to_string().contains("no message"), "{line}");
        }
    }

    /// A QEMU that says `text` and then hangs up.
    fn says(text: String) -> (Qmp, Receiver<String>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (sender, events) = channel();
        let qmp = Qmp::start(ours, move |name, _| sender.send(name.to_owned()).unwrap()).unwrap();
        std::thread::spawn(move || {
            let _ = theirs.write_all(text.as_bytes());
            // The commands have to be taken before the end, or writing them would fail.
            let _ = theirs.shutdown(std::net::Shutdown::Write);
            let _ = theirs.read_to_end(&mut Vec::new());
        });
        (qmp, events)
    }

    #[test]
    fn answers_reach_their_command_and_events_the_listener() {
        let text = "{\"QMP\": {}}\n{\"return\": {}, \"id\": 1}\n{\"event\": \"RESET\"}\n\
            {\"return\": {\"a\": 1}, \"id\": 2}\n{\"error\": {\"desc\": \"nope\"}, \"id\": 3}\n";
        let (mut qmp, events) = says(text.into());
        let limit = Duration::from_secs(20);
        qmp.negotiate(limit).unwrap();
        assert_eq!(qmp.execute("query", json!({"x": 1}), limit).unwrap(), json!({"a": 1}));
        assert_eq!(
            qmp.execute("bad", json!({}), limit).unwrap_err().to_string(),
            "QEMU's bad: nope"
        );
        assert!(qmp.execute("late", json!({}), limit).unwrap_err().to_string().contains("lost"));
        assert_eq!(events.recv().unwrap(), "RESET");
    }

    #[test]
    fn endless_messages_end_the_connection() {
        let text = format!("{{\"QMP\": \"{}\"}}\n", "x".repeat(2 << 20));
        let (mut qmp, _) = says(text);
        assert!(qmp.negotiate(Duration::from_secs(20)).unwrap_err().to_string().contains("lost"));
    }
}
