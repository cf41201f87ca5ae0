// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a running appliance can be asked from outside its process: what it is, and for its
//! memory.
//!
//! The process that launched it listens on a socket in its folder, which is its user's alone.
//! A request is a line of JSON, the answer another. Who asks for the memory brings the file
//! along, opened with rights of his own.

mod socket;

use crate::backend::Machine;
use crate::session::Session;
use crate::{Error, ErrorKind, Result};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Name of the socket in the appliance's folder, and how the folder's name begins.
const SOCKET: &str = "control";
pub(crate) const FOLDER: &str = "tranship-";
/// Time for a peer to say what it has to say.
const LIMIT: Duration = Duration::from_secs(5);
/// Time for a dump: a slow disk takes a while.
const DUMP_LIMIT: Duration = Duration::from_mins(30);

/// What a running appliance says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The process that launched it.
    pub pid: u32,
    /// That process' command line.
    pub command: String,
    /// Name of the backend.
    pub backend: String,
    /// When it was up, in seconds since 1970 UTC.
    pub since: u64,
    /// Its disks: the guest's name, and whether it is only read.
    pub disks: Vec<(String, bool)>,
}

impl Status {
    pub(crate) fn of_this_process(backend: &str, disks: Vec<(String, bool)>) -> Self {
        let command = std::fs::read("/proc/self/cmdline").unwrap_or_default();
        let words: Vec<_> = command
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty())
            .map(String::from_utf8_lossy)
            .collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            pid: std::process::id(),
            command: words.join(" "),
            backend: backend.to_owned(),
            since: now.as_secs(),
            disks,
        }
    }
}

/// A running appliance of this user.
#[derive(Clone, Debug)]
pub struct Appliance {
    /// What it says about itself.
    pub status: Status,
    socket: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// What are you?
    Status,
    /// Your memory, please, into the file that comes with this.
    Dump,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Status(Status),
    /// Size of the file.
    Dumped(u64),
    Failed {
        message: String,
        remedy: Option<String>,
    },
}

/// The listening side; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Control {
    listener: Arc<UnixListener>,
    path: PathBuf,
}

/// What requests are about.
#[derive(Debug)]
struct Asked {
    status: Status,
    machine: Weak<dyn Machine>,
    session: Weak<Session>,
}

impl Control {
    /// Listens in the appliance's folder.
    pub(crate) fn start(
        folder: &Path,
        status: Status,
        machine: &Arc<dyn Machine>,
        session: &Arc<Session>,
    ) -> Result<Self> {
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Io, "the appliance's control socket").because(error)
        };
        let path = folder.join(SOCKET);
        let listener = Arc::new(UnixListener::bind(&path).map_err(failed)?);
        // The folder keeps everybody else out, also before this.
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .map_err(failed)?;
        let asked =
            Asked { status, machine: Arc::downgrade(machine), session: Arc::downgrade(session) };
        let accepting = Arc::clone(&listener);
        std::thread::Builder::new()
            .name("appliance control".into())
            .spawn(move || {
                // The error is that of a socket that was shut down.
                while let Ok((stream, _)) = accepting.accept() {
                    if let Err(error) = serve(&stream, &asked) {
                        tracing::debug!(%error, "a request to the appliance failed");
                    }
                }
            })
            .map_err(failed)?;
        Ok(Self { listener, path })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
    }
}

/// Answers one request.
fn serve(stream: &UnixStream, asked: &Asked) -> std::io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    if !peer.uid.is_root() && peer.uid != rustix::process::geteuid() {
        return Err(std::io::Error::other(format!("it comes from user {}", peer.uid.as_raw())));
    }
    let (request, file) = socket::receive::<Request>(stream)?;
    tracing::debug!(?request, pid = peer.pid.as_raw_nonzero().get(), "the appliance is asked");
    let answer = match request {
        Request::Status => Ok(Answer::Status(asked.status.clone())),
        Request::Dump => asked.dump(file.as_ref()).map(Answer::Dumped),
    };
    let answer = answer.unwrap_or_else(|error| {
        let mut message = error.to_string();
        if let Some(cause) = std::error::Error::source(&error) {
            message = format!("{message}: {cause}");
        }
        Answer::Failed { message, remedy: error.remedy().map(ToOwned::to_owned) }
    });
    socket::send(stream, &answer, None)
}

impl Asked {
    fn dump(&self, to: Option<&File>) -> Result<u64> {
        let usage = |message| Error::new(ErrorKind::Usage, message);
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Io, "the file for the memory").because(error)
        };
        let to = to.ok_or_else(|| usage("a dump needs a file to go to"))?;
        let flags = rustix::fs::fcntl_getfl(to).map_err(|error| failed(error.into()))?;
        if !to.metadata().map_err(failed)?.is_file()
            || flags & OFlags::RWMODE == OFlags::RDONLY
            || flags.intersects(OFlags::APPEND | OFlags::PATH)
        {
            return Err(usage("a dump goes to a regular file that is open for writing"));
        }
        let (Some(machine), Some(session)) = (self.machine.upgrade(), self.session.upgrade())
        else {
            return Err(Error::new(ErrorKind::Lost, "the appliance is about to end"));
        };
        to.set_len(0).map_err(failed)?;
        let vmcoreinfo = session.hello().vmcoreinfo;
        session.standing_still(|| machine.dump(to, vmcoreinfo))?;
        to.metadata().map_err(failed).map(|facts| facts.len())
    }
}

/// The running appliances of this user whose folders are in `runtime_dir`.
///
/// # Errors
///
/// [`ErrorKind::Io`] if that folder cannot be read.
pub fn running(runtime_dir: &Path) -> Result<Vec<Appliance>> {
    let failed = |error| {
        Error::new(ErrorKind::Io, format!("reading {}", runtime_dir.display())).because(error)
    };
    let mut running = Vec::new();
    for entry in std::fs::read_dir(runtime_dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let socket = entry.path().join(SOCKET);
        if !entry.file_name().as_encoded_bytes().starts_with(FOLDER.as_bytes())
            || !is_ours(&entry.path())
        {
            continue;
        }
        // What does not answer is none, or not any more.
        match ask(&socket, &Request::Status, None, LIMIT) {
            Ok(Answer::Status(status)) => running.push(Appliance { status, socket }),
            other => tracing::debug!(?other, socket = %socket.display(), "not a running appliance"),
        }
    }
    running.sort_by_key(|appliance| (appliance.status.since, appliance.status.pid));
    Ok(running)
}

/// Whether a folder belongs to this user.
fn is_ours(folder: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let facts = std::fs::symlink_metadata(folder);
    facts.is_ok_and(|facts| facts.is_dir() && facts.uid() == rustix::process::geteuid().as_raw())
}

/// Has a running appliance write its memory into `to`, a regular file; the file's size.
///
/// # Errors
///
/// [`ErrorKind::Launch`] if its backend cannot do that, and [`ErrorKind::Lost`] if it ends
/// meanwhile.
pub fn dump(appliance: &Appliance, to: &File) -> Result<u64> {
    match ask(&appliance.socket, &Request::Dump, Some(to), DUMP_LIMIT) {
        Ok(Answer::Dumped(size)) => Ok(size),
        Ok(Answer::Failed { message, remedy }) => {
            let error = Error::new(ErrorKind::Launch, message);
            Err(match remedy {
                Some(remedy) => error.with_remedy(remedy),
                None => error,
            })
        }
        Ok(Answer::Status(_)) => {
            Err(Error::new(ErrorKind::Lost, "the appliance answered something else"))
        }
        Err(error) => Err(Error::new(
            ErrorKind::Lost,
            format!("the appliance of process {} did not answer", appliance.status.pid),
        )
        .because(error)),
    }
}

fn ask(
    socket: &Path,
    request: &Request,
    file: Option<&File>,
    limit: Duration,
) -> std::io::Result<Answer> {
    let stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.set_read_timeout(Some(limit))?;
    socket::send(&stream, request, file)?;
    Ok(socket::receive(&stream)?.0)
}

#[cfg(test)]
mod tests;
