// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's machine protocol (QMP): a JSON object a line; commands with numbers, and events.
//!
//! A guest that has broken out of QEMU's devices writes the other end, so nothing that comes
//! in is trusted to be short, well-formed or expected.

use crate::{Error, ErrorKind, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest line that is taken.
const MOST_LINE: u64 = 1 << 20;
/// Events that wait for somebody who looks for them; what is older goes.
const MOST_EVENTS: usize = 64;
/// The longest text of QEMU's that gets into an error.
const MOST_TEXT: usize = 1 << 10;
/// Events that somebody looks for; what else there is would only push these out.
const WANTED: &[&str] = &["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "MIGRATION"];

/// An event and its data.
#[derive(Debug)]
pub(super) struct Event {
    /// Its name.
    pub(super) name: String,
    /// What comes with it.
    pub(super) data: Value,
}

#[derive(Debug, Default)]
struct State {
    /// Major and minor number.
    version: Option<(u64, u64)>,
    /// The last answer and its number.
    reply: Option<(u64, std::result::Result<Value, String>)>,
    events: VecDeque<Event>,
    /// Why the guest does not run any more.
    shutdown: Option<String>,
    /// Why nothing more comes in.
    closed: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Our end of the line to QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: UnixStream,
    /// Number of the last command; locked while one is on its way.
    last: Mutex<u64>,
    shared: Arc<Shared>,
}

impl Qmp {
    /// Asks for the commands to be unlocked, and follows what comes in on a thread of its own.
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let follow = || {
            let incoming = stream.try_clone()?;
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("QMP".into()).spawn(move || {
                let why = shared.follow(BufReader::new(incoming));
                shared.change(|state| state.closed = Some(why));
            })?;
            stream.set_write_timeout(Some(Duration::from_secs(5)))?;
            // QEMU reads it after its greeting, whenever that is: nobody waits for it.
            (&stream).write_all(b"{\"execute\":\"qmp_capabilities\",\"id\":0}\n")
        };
        follow().map_err(|error: io::Error| lost("talking to QEMU").because(error))?;
        Ok(Self { stream, last: Mutex::new(0), shared })
    }

    /// QEMU's major and minor version, at most `limit` after its start.
    pub(super) fn version(&self, limit: Duration) -> Result<(u64, u64)> {
        self.shared.wait("the greeting", limit, |state| state.version.map(Ok))
    }

    /// Has a command carried out, and waits for its answer.
    pub(super) fn command(&self, name: &str, arguments: &Value, limit: Duration) -> Result<Value> {
        self.execute(name, arguments, None, limit)
    }

    /// The same for a command that takes a descriptor.
    pub(super) fn command_with(
        &self,
        name: &str,
        arguments: &Value,
        descriptor: impl AsFd,
        limit: Duration,
    ) -> Result<Value> {
        self.execute(name, arguments, Some(descriptor.as_fd()), limit)
    }

    fn execute(
        &self,
        name: &str,
        arguments: &Value,
        descriptor: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Value> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last += 1;
        let number = *last;
        let mut line = json!({ "execute": name, "id": number, "arguments": arguments }).to_string();
        line.push('\n');
        self.send(line.as_bytes(), descriptor)
            .map_err(|error| lost(&format!("QEMU: {name}")).because(error))?;
        self.shared.wait(name, limit, |state| {
            let answered = state.reply.as_ref().is_some_and(|(found, _)| *found == number);
            let (_, outcome) = state.reply.take_if(|_| answered)?;
            Some(outcome.map_err(|text| lost(&format!("QEMU: {name}: {text}"))))
        })
    }

    fn send(&self, mut line: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if let Some(descriptor) = descriptor {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let descriptors = [descriptor];
            if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                return Err(io::Error::other("no space for a descriptor"));
            }
            let sent =
                sendmsg(&self.stream, &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL)?;
            line = line.get(sent..).unwrap_or_default();
        }
        (&self.stream).write_all(line)
    }

    /// Waits for an event out of which `take` makes something.
    pub(super) fn event<T>(
        &self,
        what: &str,
        limit: Duration,
        take: impl Fn(&Event) -> Option<Result<T>>,
    ) -> Result<T> {
        self.shared.wait(what, limit, |state| {
            let (index, found) =
                state.events.iter().enumerate().find_map(|(at, event)| Some((at, take(event)?)))?;
            state.events.remove(index);
            Some(found)
        })
    }

    /// Why the guest does not run any more, if that is so.
    pub(super) fn shutdown(&self) -> Option<String> {
        self.shared.lock().shutdown.clone()
    }

    /// Waits until the guest does not run any more or QEMU has hung up; whether that is so.
    pub(super) fn wait_for_end(&self, limit: Duration) -> bool {
        let ended = |state: &mut State| {
            (state.shutdown.is_some() || state.closed.is_some()).then_some(Ok(()))
        };
        self.shared.wait("the end", limit, ended).is_ok()
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // The thread that reads has to end as well.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until `take` finds something in what has come in.
    fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        take: impl Fn(&mut State) -> Option<Result<T>>,
    ) -> Result<T> {
        let begun = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(found) = take(&mut state) {
                return found;
            }
            if let Some(why) = &state.closed {
                return Err(lost(&format!("QEMU: {what}: {why}")));
            }
            let Some(left) = limit.checked_sub(begun.elapsed()) else {
                return Err(lost(&format!("QEMU: {what}: no answer in {limit:?}")));
            };
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes in what comes, until nothing more does: why.
    fn follow(&self, mut from: impl BufRead) -> String {
        let mut line = Vec::new();
        loop {
            line.clear();
            match from.by_ref().take(MOST_LINE).read_until(b'\n', &mut line) {
                Ok(0) => return "it has hung up".to_owned(),
                Ok(_) if !line.ends_with(b"\n") => return "a line without an end".to_owned(),
                Ok(_) => {}
                Err(error) => return error.to_string(),
            }
            match serde_json::from_slice(&line) {
                Ok(Value::Object(message)) => self.change(|state| state.take(message)),
                Ok(_) => return "a line that is no object".to_owned(),
                Err(error) => return format!("a line that is not JSON: {error}"),
            }
        }
    }
}

impl State {
    fn take(&mut self, mut message: serde_json::Map<String, Value>) {
        if let Some(greeting) = message.get("QMP") {
            let number = |name| greeting["version"]["qemu"][name].as_u64();
            self.version = number("major").zip(number("minor"));
        } else if let Some(number) = message.get("id").and_then(Value::as_u64) {
            let outcome = match message.remove("return") {
                Some(value) => Ok(value),
                None => Err(text(message.get("error").map(|error| &error["desc"]))),
            };
            self.reply = Some((number, outcome));
        } else if let Some(name) = message.get("event").and_then(Value::as_str) {
            let name = name.to_owned();
            let data = message.remove("data").unwrap_or_default();
            if name == "SHUTDOWN" {
                self.shutdown = Some(text(data.get("reason")));
            } else if WANTED.contains(&name.as_str()) {
                if self.events.len() == MOST_EVENTS {
                    self.events.pop_front();
                }
                self.events.push_back(Event { name, data });
            }
        }
    }
}

/// What QEMU says, as far as it may get into a message of ours.
fn text(value: Option<&Value>) -> String {
    let text = value.and_then(Value::as_str).unwrap_or("it does not say why");
    text.chars().filter(|letter| !letter.is_control()).take(MOST_TEXT).collect()
}

fn lost(message: &str) -> Error {
    Error::new(ErrorKind::Launch, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn commands_have_answers_and_events_come_in_between() {
        let (near, far) = UnixStream::pair().unwrap();
        let peer = std::thread::spawn(move || {
            let mut lines = BufReader::new(far.try_clone().unwrap()).lines();
            let mut asked = || lines.next().unwrap().unwrap();
            let say = |line: &str| (&far).write_all(line.as_bytes()).unwrap();
            say("{\"QMP\": {\"version\": {\"qemu\": {\"major\": 9, \"minor\": 2}}}}\n");
            assert!(asked().contains("qmp_capabilities"));
            say("{\"return\": {}, \"id\": 0}\n");
            assert_eq!(asked(), r#"{"execute":"stop","id":1,"arguments":{}}"#);
            say(
                "{\"event\": \"STOP\"}\n{\"event\": \"MIGRATION\", \"data\": {\"status\": \"x\"}}\n",
            );
            say("{\"return\": {\"a\": 1}, \"id\": 1}\n");
            asked();
            say("{\"error\": {\"class\": \"c\", \"desc\": \"no such\\u001b thing\"}, \"id\": 2}\n");
            say("{\"event\": \"SHUTDOWN\", \"data\": {\"reason\": \"guest-reset\"}}\n");
        });
        let qmp = Qmp::new(near).unwrap();
        assert_eq!(qmp.version(LIMIT).unwrap(), (9, 2));
        assert_eq!(qmp.command("stop", &json!({}), LIMIT).unwrap(), json!({ "a": 1 }));
        let take = |event: &Event| event.data["status"].as_str().map(|text| Ok(text.to_owned()));
        assert_eq!(qmp.event("saving", LIMIT, take).unwrap(), "x");
        let error = qmp.command("device_del", &json!({}), LIMIT).unwrap_err();
        assert_eq!(error.to_string(), "QEMU: device_del: no such thing");
        assert!(qmp.wait_for_end(LIMIT));
        assert_eq!(qmp.shutdown().as_deref(), Some("guest-reset"));
        peer.join().unwrap();
    }

    #[test]
    fn nonsense_is_an_error_and_not_a_wait() {
        let long = vec![b'x'; usize::try_from(MOST_LINE).unwrap() + 1];
        for (lines, why) in [
            (&b"nonsense\n"[..], "not JSON"),
            (b"[1]\n", "no object"),
            (b"", "hung up"),
            (b"{\"QMP\": 1}\n{\"id\": -1, \"event\": 7}\n{}\n", "hung up"),
            (b"{\"return\": 1", "without an end"),
            (&[b'['; 4000], "without an end"),
            (&long, "without an end"),
        ] {
            let shared = Shared::default();
            let ended = shared.follow(lines);
            assert!(ended.contains(why), "{ended}");
            assert!(shared.lock().version.is_none());
        }
    }

    #[test]
    fn events_that_nobody_looks_for_do_not_pile_up() {
        let shared = Shared::default();
        let flood = "{\"event\": \"MIGRATION\"}\n{\"event\": \"VSERPORT_CHANGE\"}\n".repeat(1000);
        shared.follow(flood.as_bytes());
        assert_eq!(shared.lock().events.len(), MOST_EVENTS);
        assert!(shared.lock().events.iter().all(|event| event.name == "MIGRATION"));
    }

    #[test]
    fn a_silent_peer_is_given_up() {
        let (near, _far) = UnixStream::pair().unwrap();
        let qmp = Qmp::new(near).unwrap();
        let error = qmp.command("stop", &json!({}), Duration::from_millis(5)).unwrap_err();
        assert!(error.to_string().contains("stop: no answer in 5ms"), "{error}");
    }
}
