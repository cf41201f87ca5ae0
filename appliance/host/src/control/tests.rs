// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::backend::{SnapshotFiles, SpecDisk};
use crate::session::CancelToken;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use tranship_protocol::Hello;

/// A machine with a few bytes of memory.
#[derive(Debug)]
struct Fake {
    dumpable: bool,
}

impl Machine for Fake {
    fn ended(&self) -> Option<String> {
        None
    }

    fn wait(&self, _: Duration) -> bool {
        false
    }

    fn kill(&self) {}

    fn console(&self) -> String {
        String::new()
    }

    fn add_disk(&self, _: &SpecDisk) -> Result<()> {
        Ok(())
    }

    fn remove_disk(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn save(&self, _: &SnapshotFiles) -> Result<()> {
        Ok(())
    }

    fn dump(&self, mut to: &File, vmcoreinfo: Option<(u64, u64)>) -> Result<()> {
        if !self.dumpable {
            return Err(Error::new(ErrorKind::Launch, "fake cannot dump its memory"));
        }
        assert_eq!(vmcoreinfo, Some((3, 4)));
        to.write_all(b"memory").map_err(|error| Error::new(ErrorKind::Io, "to").because(error))
    }
}

struct Running {
    folder: tempfile::TempDir,
    control: Control,
    _machine: Arc<dyn Machine>,
    _session: Arc<Session>,
    _streams: [UnixStream; 2],
}

fn start(folder: &Path, dumpable: bool) -> Running {
    let folder = tempfile::Builder::new()
        .prefix(FOLDER)
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir_in(folder)
        .unwrap();
    let ((control, far_control), (bulk, far_bulk)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let hello =
        Hello { version: 0, kernel: String::new(), stages: Vec::new(), vmcoreinfo: Some((3, 4)) };
    let session = Session::resume(control, bulk, CancelToken::default(), hello).unwrap();
    let (machine, session): (Arc<dyn Machine>, _) =
        (Arc::new(Fake { dumpable }), Arc::new(session));
    let status = Status::of_this_process("fake", Vec::new());
    let control = Control::start(folder.path(), status, &machine, &session).unwrap();
    Running {
        folder,
        control,
        _machine: machine,
        _session: session,
        _streams: [far_control, far_bulk],
    }
}

#[test]
fn appliances_are_found_and_dumped() {
    let top = tempfile::tempdir().unwrap();
    assert!(running(top.path()).unwrap().is_empty());
    // Neither a folder without a socket nor one of another name is one.
    std::fs::create_dir(top.path().join("tranship-empty")).unwrap();
    let one = start(top.path(), true);
    let found = running(top.path()).unwrap();
    let [appliance] = &found[..] else { panic!("{found:?}") };
    assert_eq!(appliance.status.pid, std::process::id());
    assert_eq!(appliance.status.backend, "fake");
    assert!(!appliance.status.command.is_empty());
    let mode = std::fs::metadata(one.folder.path().join(SOCKET)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"what was there before").unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    assert_eq!(dump(appliance, &file).unwrap(), 6);
    let mut text = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "memory");
    drop(one.control);
    assert!(running(top.path()).unwrap().is_empty());
    assert_eq!(dump(appliance, &file).unwrap_err().kind(), ErrorKind::Lost);
}

#[test]
fn what_cannot_be_dumped_says_why() {
    let top = tempfile::tempdir().unwrap();
    let _one = start(top.path(), false);
    let found = running(top.path()).unwrap();
    let file = tempfile::tempfile().unwrap();
    let error = dump(&found[0], &file).unwrap_err();
    assert_eq!(error.to_string(), "fake cannot dump its memory");
    // What is no file of the client's to write to is refused.
    for path in ["/dev/null", "/proc/self/exe"] {
        let file = File::open(path).unwrap();
        let error = dump(&found[0], &file).unwrap_err().to_string();
        assert_eq!(error, "a dump goes to a regular file that is open for writing", "{path}");
    }
}

#[test]
fn nonsense_does_not_end_it() {
    let top = tempfile::tempdir().unwrap();
    let one = start(top.path(), true);
    let socket = one.folder.path().join(SOCKET);
    let long = vec![0xff; 70_000];
    for nonsense in [&b"\n"[..], b"{}\n", b"\"reboot\"\n", &long] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        // It may hang up before the end of what is too long.
        let _ = stream.write_all(nonsense);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty());
    }
    // Without a file there is nothing to dump to.
    let answer = ask(&socket, &Request::Dump, None, LIMIT).unwrap();
    assert!(matches!(answer, Answer::Failed { .. }), "{answer:?}");
    assert_eq!(running(top.path()).unwrap().len(), 1);
}
