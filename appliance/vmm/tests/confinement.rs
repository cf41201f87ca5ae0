// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest that breaks out cannot do: each attempt is made from inside a process that
//! has given up what a machine gives up.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output, Stdio};
use tranship_vmm::confine;

/// Names the attempt that the process started again is to make.
const ATTEMPT: &str = "TRANSHIP_VMM_TEST_ATTEMPT";
/// What it prints when it comes to that.
const READY: &str = "confined";

/// Starts this program again as a confined process that makes an attempt.
fn attempt(name: &str, as_nobody: bool) -> Output {
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["--exact", "inside", "--nocapture", "--test-threads=1"])
        .env(ATTEMPT, name)
        .stdin(Stdio::null());
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
    confine::give_up_privileges(&BTreeSet::from([kept.as_raw_fd()])).unwrap();
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
