// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening a disk in a process that can open nothing.
//!
//! A process that may open files opens the disk once and has noted which files that took; it
//! sends them, with the names under which they were asked for, to one that may not. There the
//! same disk is opened again, and each file that is asked for is found among those that were
//! sent. An image that changed in between can ask for other names, but gets no other files.
//!
//! With exports of NBD servers it is the same: their connections are sent, and a line to
//! somebody who makes more of them, to that server and no other.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tranship_block::{Error, ErrorKind, Result};
use tranship_nbd::{Address, ClientOptions, Dialer, Moved, Remote};
use tranship_raw::{Access, RawFile};

/// A file under the name by which it was asked for.
#[derive(Debug)]
pub struct NotedFile {
    /// The name.
    pub path: PathBuf,
    /// Whether it was opened for writing.
    pub writable: bool,
    /// The file.
    pub file: File,
}

/// An export under the name by which it was asked for.
#[derive(Debug)]
pub struct NotedServer {
    /// The name.
    pub name: String,
    /// Where it is.
    pub address: Address,
    /// How it is spoken to.
    pub options: ClientOptions,
    /// The connections to it.
    pub remote: Arc<Remote>,
}

/// What was opened for a disk.
#[derive(Debug, Default)]
pub struct Noted {
    /// Files.
    pub files: Vec<NotedFile>,
    /// Exports of servers.
    pub servers: Vec<NotedServer>,
}

/// An export under the name by which it will be asked for.
#[derive(Debug)]
pub struct GivenServer {
    /// The name.
    pub name: String,
    /// Who makes connections.
    pub dialer: Arc<Dialer>,
    /// Connections that are there already, for who asks first.
    pub connections: Mutex<Vec<(Moved, OwnedFd)>>,
}

/// What a process has that can open nothing.
#[derive(Debug, Default)]
pub struct Given {
    /// Files.
    pub files: Vec<NotedFile>,
    /// Exports of servers.
    pub servers: Vec<GivenServer>,
}

/// Where the files come from that a disk consists of.
#[derive(Clone, Debug, Default)]
pub enum Files {
    /// From the filesystem, by their names.
    #[default]
    System,
    /// From the filesystem; each is noted.
    Noting(Arc<Mutex<Noted>>),
    /// From what was noted elsewhere; there are no others.
    Given(Arc<Given>),
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Files {
    /// Everything that was noted since the last call.
    pub fn noted(&self) -> Noted {
        match self {
            Self::Noting(noted) => std::mem::take(&mut *locked(noted)),
            Self::System | Self::Given(_) => Noted::default(),
        }
    }

    /// Whether there is a regular file at `path`.
    pub(crate) fn has(&self, path: &Path) -> bool {
        match self {
            Self::Given(given) => given.files.iter().any(|noted| noted.path == path),
            Self::System | Self::Noting(_) => path.is_file(),
        }
    }

    /// The file at `path`: from what was given, or from `open`.
    pub(crate) fn open(
        &self,
        path: &Path,
        access: Access,
        open: impl FnOnce() -> Result<RawFile>,
    ) -> Result<RawFile> {
        let writable = access == Access::ReadWrite;
        let shared = |file: &File| {
            file.try_clone()
                .map_err(|error| Error::io("cannot share the file", error).in_file(path))
        };
        match self {
            Self::System => open(),
            Self::Noting(noted) => {
                let opened = open()?;
                let file = shared(opened.file())?;
                locked(noted).files.push(NotedFile { path: path.to_owned(), writable, file });
                Ok(opened)
            }
            Self::Given(given) => {
                let found = given
                    .files
                    .iter()
                    .find(|noted| noted.path == path && (noted.writable || !writable))
                    .ok_or_else(|| {
                        Error::new(ErrorKind::Denied, "the file is not among those that were given")
                            .in_file(path)
                    })?;
                RawFile::from_file(shared(&found.file)?, path, access)
            }
        }
    }

    /// The export of the server at `address` that is called `name`: from what was given, or by
    /// connecting.
    pub(crate) fn connect(
        &self,
        name: &str,
        address: &Address,
        options: &ClientOptions,
    ) -> Result<Arc<Remote>> {
        match self {
            Self::System => Remote::connect(address, options).map(Arc::new),
            Self::Noting(noted) => {
                let remote = Arc::new(Remote::connect(address, options)?);
                locked(noted).servers.push(NotedServer {
                    name: name.to_owned(),
                    address: address.clone(),
                    options: options.clone(),
                    remote: Arc::clone(&remote),
                });
                Ok(remote)
            }
            Self::Given(given) => {
                let found = given.servers.iter().find(|server| server.name == name);
                let found = found.ok_or_else(|| {
                    let why = "the server is not among those that were given";
                    Error::new(ErrorKind::Denied, why)
                })?;
                let dialer = Some(Arc::clone(&found.dialer));
                let options = ClientOptions { dialer, ..options.clone() };
                let connections = std::mem::take(&mut *locked(&found.connections));
                let remote = if connections.is_empty() {
                    Remote::connect(address, &options)
                } else {
                    Remote::take_over(connections, address, &options)
                };
                remote.map(Arc::new)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Format, OpenOptions, Spec, open, open_spec};
    use std::time::Duration;
    use tranship_block::BlockDevice;

    /// Opens the disk at `path` noting its files, moves these away, and opens it from the notes.
    fn handed_over(path: &Path, format: Format) -> Arc<dyn BlockDevice> {
        let files = Files::Noting(Arc::default());
        let options = OpenOptions { format: Some(format), files, ..OpenOptions::default() };
        let first = open(path, &options).unwrap();
        drop(first);
        let noted = options.files.noted();
        assert!(!noted.files.is_empty());
        for file in &noted.files {
            std::fs::remove_file(&file.path).unwrap();
        }
        let given = Given { files: noted.files, ..Given::default() };
        let options = OpenOptions { files: Files::Given(Arc::new(given)), ..options };
        open(path, &options).unwrap().device
    }

    #[test]
    fn a_chain_is_opened_from_what_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base.raw");
        std::fs::write(&base, vec![7; 1 << 20]).unwrap();
        let top = folder.path().join("top.qcow2");
        let backing =
            tranship_qcow2::Backing { name: "base.raw".into(), format: Some("raw".into()) };
        let created = tranship_qcow2::CreateOptions {
            backing: Some(backing),
            ..tranship_qcow2::CreateOptions::new(1 << 20)
        };
        let file = RawFile::create(&top, 0).unwrap();
        tranship_qcow2::create(&file, &created).unwrap();
        drop(file);
        let device = handed_over(&top, Format::Qcow2);
        let mut found = [0; 512];
        device.read_at(&mut found, 4096).unwrap();
        assert_eq!(found, [7; 512]);
        device.write_at(&[9; 512], 4096).unwrap();
        device.read_at(&mut found, 4096).unwrap();
        assert_eq!(found, [9; 512]);
    }

    /// An export with a QCOW2 image of 1 MiB in it, over `socket`. It takes one client at a time.
    fn serve(disk: &Path, socket: &Path) -> tranship_nbd::Running {
        let file = Arc::new(RawFile::open(disk, Access::ReadWrite).unwrap());
        let limits = tranship_nbd::Limits { connections: 1, ..Default::default() };
        let export =
            tranship_nbd::Export { shared: false, ..tranship_nbd::Export::new("vda", file) };
        tranship_nbd::Server::bind(socket, vec![export], limits).unwrap().start().unwrap()
    }

    /// What another process gets of what was noted here.
    fn given(noted: Noted) -> Given {
        let given = |noted: NotedServer| {
            let line = Dialer::start(noted.address, noted.options).unwrap();
            GivenServer {
                name: noted.name,
                dialer: Arc::new(Dialer::over(line)),
                connections: Mutex::new(noted.remote.hand_over()),
            }
        };
        let servers = noted.servers.into_iter().map(given).collect();
        Given { files: noted.files, servers }
    }

    #[test]
    fn an_image_in_an_export_goes_on_elsewhere_and_outlives_its_server() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, socket) = (folder.path().join("disk"), folder.path().join("socket"));
        let file = RawFile::create(&disk, 0).unwrap();
        tranship_qcow2::create(&file, &tranship_qcow2::CreateOptions::new(1 << 20)).unwrap();
        drop(file);
        // An export cannot grow.
        File::options().write(true).open(&disk).unwrap().set_len(1 << 20).unwrap();
        let running = serve(&disk, &socket);
        let name = format!(
            r#"json:{{"driver": "qcow2", "file": {{"driver": "nbd", "export": "vda",
            "server.type": "unix", "server.path": "{}", "reconnect-delay": "20"}}}}"#,
            socket.display()
        );
        let spec = Spec::from_name(&name).unwrap();
        let options = OpenOptions { files: Files::Noting(Arc::default()), ..Default::default() };
        drop(open_spec(&spec, &options).unwrap());
        let noted = options.files.noted();
        assert_eq!((noted.files.len(), noted.servers.len()), (0, 1));
        let files = Files::Given(Arc::new(given(noted)));
        let options = OpenOptions { files, ..OpenOptions::default() };
        let device = open_spec(&spec, &options).unwrap().device;
        device.write_at(&[9; 4096], 8192).unwrap();
        device.flush().unwrap();
        running.stop().unwrap();
        std::thread::scope(|scope| {
            let again = scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(300));
                serve(&disk, &socket)
            });
            let mut found = [0; 4096];
            device.read_at(&mut found, 8192).unwrap();
            assert_eq!(found, [9; 4096]);
            drop(device);
            again.join().unwrap().stop().unwrap();
        });
        // What has been handed over once is not there a second time, nor is any other server.
        for name in [name.as_str(), "nbd+unix:///vda?socket=/nowhere"] {
            let spec = Spec::from_name(name).unwrap();
            let files = Files::Given(Arc::default());
            let options = OpenOptions { files, ..OpenOptions::default() };
            assert_eq!(open_spec(&spec, &options).unwrap_err().kind(), ErrorKind::Denied);
        }
    }

    #[test]
    fn an_export_below_a_file_is_noted_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, socket) = (folder.path().join("disk"), folder.path().join("socket"));
        std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
        let running = serve(&disk, &socket);
        let uri = format!("nbd+unix:///vda?socket={}", socket.display());
        let backing =
            tranship_qcow2::Backing { name: uri.as_str().into(), format: Some("raw".into()) };
        let created = tranship_qcow2::CreateOptions {
            backing: Some(backing),
            ..tranship_qcow2::CreateOptions::new(1 << 20)
        };
        let top = folder.path().join("top.qcow2");
        let file = RawFile::create(&top, 0).unwrap();
        tranship_qcow2::create(&file, &created).unwrap();
        drop(file);
        let files = Files::Noting(Arc::default());
        let allowed = vec![PathBuf::from(&uri)];
        let options = OpenOptions { allowed, files, ..OpenOptions::default() };
        drop(open(&top, &options).unwrap());
        let noted = options.files.noted();
        assert_eq!((noted.files.len(), noted.servers.len()), (1, 1));
        let files = Files::Given(Arc::new(given(noted)));
        let device = open(&top, &OpenOptions { files, ..options }).unwrap().device;
        device.write_at(&[9; 512], 512).unwrap();
        let mut found = [0; 1024];
        device.read_at(&mut found, 0).unwrap();
        assert_eq!((found[0], found[512]), (7, 9));
        drop(device);
        running.stop().unwrap();
    }

    #[test]
    fn nothing_else_can_be_had() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, vec![7; 4096]).unwrap();
        let files = Files::Given(Arc::default());
        let options = OpenOptions { format: Some(Format::Raw), files, ..OpenOptions::default() };
        let error = open(&path, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.to_string().contains("disk.raw"), "{error}");
        // What was opened for reading is not written.
        let file = File::open(&path).unwrap();
        let noted = NotedFile { path: path.clone(), writable: false, file };
        let given = Given { files: vec![noted], ..Given::default() };
        let options = OpenOptions { files: Files::Given(Arc::new(given)), ..options };
        assert!(open(&path, &options).is_err());
        assert!(open(&path, &OpenOptions { read_only: true, ..options }).is_ok());
    }
}
