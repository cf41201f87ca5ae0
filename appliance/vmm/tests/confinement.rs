// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest that breaks out cannot do: each attempt is made from inside a process that
//! has given up what a machine gives up.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice};
use tranship_nbd::{Address, ClientOptions, Dialer, Export, Limits, Remote, Server};
use tranship_vmm::confine;

/// Names the attempt that the process started again is to make.
const ATTEMPT: &str = "TRANSHIP_VMM_TEST_ATTEMPT";
/// What it prints when it comes to that.
const READY: &str = "confined";

/// Names a descriptor that it inherits for it.
const LINE: &str = "TRANSHIP_VMM_TEST_LINE";

/// Starts this program again as a confined process that makes an attempt.
fn attempt(name: &str, as_nobody: bool) -> Output {
    attempt_with(name, as_nobody, None)
}

fn attempt_with(name: &str, as_nobody: bool, line: Option<&OwnedFd>) -> Output {
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["--exact", "inside", "--nocapture", "--test-threads=1"])
        .env(ATTEMPT, name)
        .stdin(Stdio::null());
    if let Some(line) = line {
        rustix::io::fcntl_setfd(line, rustix::io::FdFlags::empty()).unwrap();
        command.env(LINE, line.as_raw_fd().to_string());
    }
    if as_nobody {
        command.uid(65534).gid(65534);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(READY), "{name}: {said}{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Not a test but what the other process does.
#[test]
fn inside() {
    let Ok(attempt) = std::env::var(ATTEMPT) else { return };
    let mut kept = tempfile::tempfile().unwrap();
    kept.write_all(b"a disk").unwrap();
    let left = File::open("/proc/self/exe").unwrap();
    let line = std::env::var(LINE).ok().map(|number| number.parse().unwrap());
    let descriptors: BTreeSet<_> = line.into_iter().chain([kept.as_raw_fd()]).collect();
    confine::give_up_privileges(&descriptors).unwrap();
    if attempt != "landlock" {
        confine::allow_only_what_a_machine_needs().unwrap();
    }
    println!("{READY}");
    let said = match attempt.as_str() {
        // With Landlock alone, so that it is known to hold by itself, and with both.
        "landlock" | "open" => File::open("/etc/passwd").map(drop),
        "create" => File::create("/tmp/tranship-confinement").map(drop),
        "execute" => Err(Command::new("/bin/true").exec()),
        "connect" => std::net::TcpStream::connect("127.0.0.1:1").map(drop),
        "disk" => {
            let mut text = String::new();
            std::os::unix::fs::FileExt::read_at(&kept, &mut [0; 6], 0)
                .and_then(|_| (&kept).read_to_string(&mut text))
                .map(drop)
        }
        // An export of which only its dialer knows where it is.
        "dial" => {
            // SAFETY: whoever started this process has made the descriptor for it alone.
            let line = unsafe { OwnedFd::from_raw_fd(line.unwrap()) };
            let dialer = Some(Arc::new(Dialer::over(line)));
            let options = ClientOptions { dialer, ..Default::default() };
            let nowhere = Address::Unix(PathBuf::from("/nowhere"));
            let remote = Remote::connect(&nowhere, &options).unwrap();
            remote.write_at(&[7; 512], 512).unwrap();
            remote.flush().unwrap();
            let mut found = [0; 1024];
            remote.read_at(&mut found, 0).unwrap();
            assert_eq!((found[0], found[512], remote.connections()), (0, 7, 4));
            // Without it there is nothing.
            let options = ClientOptions { dialer: None, ..options };
            let error = Remote::connect(&nowhere, &options).unwrap_err();
            let cause = std::error::Error::source(&error).unwrap();
            let errno = cause.downcast_ref::<std::io::Error>().unwrap().raw_os_error().unwrap();
            Err(std::io::Error::from_raw_os_error(errno))
        }
        "inherited" => (&left).read(&mut [0; 4]).map(drop),
        "thread" => std::thread::Builder::new()
            .name("another".into())
            .spawn(|| File::open("/etc/passwd").map(drop))
            .unwrap()
            .join()
            .unwrap(),
        "mount" => {
            rustix::mount::unmount("/", rustix::mount::UnmountFlags::DETACH).map_err(Into::into)
        }
        "trace" => {
            // SAFETY: asks to be traced; nothing else of the process changes.
            let outcome = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
            if outcome == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        }
        other => panic!("nobody tries {other}"),
    };
    println!("{:?}", said.map_err(|error| error.raw_os_error()));
    // The harness would look at files.
    std::process::exit(0);
}

#[test]
fn files_programs_and_sockets_are_out_of_reach() {
    for nobody in [false, true] {
        if nobody && !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can become somebody else");
            continue;
        }
        for name in ["open", "create", "execute", "connect", "thread"] {
            let output = attempt(name, nobody);
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(said.contains("Err(Some(1))"), "{name}: {said}");
        }
        let said = attempt("disk", nobody).stdout;
        assert!(String::from_utf8_lossy(&said).contains("Ok(())"), "the disk cannot be read");
        let said = attempt("inherited", nobody).stdout;
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(said.contains("Err(Some(9))"), "an inherited descriptor is open: {said}");
    }
}

#[test]
fn a_server_is_reached_by_the_dialer_alone() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let device = Arc::new(MemoryDevice::new(vec![0; 1 << 20]));
    let export = Export { shared: true, ..Export::new("vda", device) };
    let running = Server::bind(&socket, vec![export], Limits::default()).unwrap().start().unwrap();
    let options = ClientOptions { export: "vda".into(), ..Default::default() };
    let line = Dialer::start(Address::Unix(socket), options).unwrap();
    let output = attempt_with("dial", false, Some(&line));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("Err(Some(1))"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    running.stop().unwrap();
}

#[test]
fn landlock_holds_without_the_filter() {
    let said = attempt("landlock", false).stdout;
    let said = String::from_utf8_lossy(&said).into_owned();
    if said.contains("Ok(())") {
        eprintln!("skipped: this kernel has no Landlock");
        return;
    }
    assert!(said.contains("Err(Some(13))"), "{said}");
}

#[test]
fn what_no_machine_does_ends_the_process() {
    for name in ["mount", "trace"] {
        let output = attempt(name, false);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{name}: {output:?}");
    }
}
