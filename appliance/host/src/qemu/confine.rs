// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What QEMU may open: its own files, the ones that the machine boots from, and no others.
//!
//! Landlock's rules hold from before the program is loaded, on every kernel that knows
//! Landlock, as far as it does.

use crate::{Error, ErrorKind, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// The newest set of rules that is asked for.
const NEWEST: ABI = ABI::V6;

/// Where programs, libraries, and the data that belongs to them are.
const PROGRAMS: &[&str] = &["/usr", "/lib", "/lib64", "/bin", "/sbin"];

/// What libraries read while they are loaded: the loader's, and the ciphers' for disks by NBD.
const SETTINGS: &[&str] = &[
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/crypto-policies",
    "/etc/gnutls",
    "/etc/pki/tls/openssl.cnf",
    "/etc/ssl/openssl.cnf",
    "/etc/localtime",
    "/dev/urandom",
    "/dev/random",
    "/proc/cpuinfo",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
];

/// Rules that let `program` start, read `files` and use `devices`. `None` where the kernel does
/// not know Landlock.
pub(super) fn rules(program: &Path, files: &[&Path], devices: &[&Path]) -> Result<Option<OwnedFd>> {
    let made = make(program, files, devices).map_err(|error| {
        Error::new(ErrorKind::Launch, "restricting what QEMU may open").because(error)
    })?;
    let rules: Option<OwnedFd> = made.into();
    tracing::debug!(known = rules.is_some(), "Landlock for QEMU");
    Ok(rules)
}

fn make(
    program: &Path,
    files: &[&Path],
    devices: &[&Path],
) -> std::result::Result<RulesetCreated, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let use_device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    rules = allow(rules, PROGRAMS, read | AccessFs::Execute)?;
    // A link in /usr/local/bin may lead to a tree of its own, such as /opt/qemu/bin.
    let program = program.canonicalize().unwrap_or_default();
    if let Some(tree) = program.parent().and_then(Path::parent)
        && !PROGRAMS.iter().any(|place| program.starts_with(place))
        && tree.parent().is_some()
    {
        rules = allow(rules, &[tree], read | AccessFs::Execute)?;
    }
    rules = allow(rules, SETTINGS, read)?;
    rules = allow(rules, &["/dev/null"], use_device)?;
    rules = allow(rules, files, read)?;
    allow(rules, devices, use_device)
}

/// Allows `access` below each of `paths` that is there.
fn allow<P: AsRef<Path>>(
    mut rules: RulesetCreated,
    paths: &[P],
    access: BitFlags<AccessFs>,
) -> std::result::Result<RulesetCreated, RulesetError> {
    for path in paths {
        let Ok(opened) = PathFd::new(path) else { continue };
        // What can only be done with a folder is no right of a file.
        let file = !path.as_ref().is_dir();
        let access = if file { access & AccessFs::from_file(NEWEST) } else { access };
        rules = rules.add_rule(PathBeneath::new(opened, access))?;
    }
    Ok(rules)
}

/// Has `command` start under `rules`.
pub(super) fn restrict(command: &mut Command, rules: OwnedFd) {
    // SAFETY: between fork and exec the closure only makes two system calls with numbers; it
    // neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            rustix::thread::set_no_new_privs(true)?;
            // SAFETY: the call takes a descriptor, which `rules` keeps open, and flags.
            match libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Output;

    fn shell(script: &str, files: &[&Path]) -> Option<Output> {
        let rules = rules(Path::new("/bin/sh"), files, &[]).unwrap();
        if rules.is_none() {
            eprintln!("skipped: this kernel has no Landlock");
        }
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(std::process::Stdio::null());
        restrict(&mut command, rules?);
        Some(command.output().unwrap())
    }

    #[test]
    fn only_what_was_named_can_be_opened_or_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("named"), "yes").unwrap();
        std::fs::write(path("other"), "no").unwrap();
        std::fs::write(path("program"), "#!/bin/sh\necho ran\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(path("program"), mode).unwrap();
        let at = folder.path().display();
        let named = path("named");
        for (script, allowed) in [
            (format!("cat {at}/named"), true),
            ("ls /usr".to_owned(), true),
            ("echo x > /dev/null".to_owned(), true),
            (format!("cat {at}/other"), false),
            (format!("{at}/program"), false),
            (format!("echo x > {at}/named"), false),
            (format!("echo x > {at}/new"), false),
            (format!("rm {at}/other"), false),
            ("cat /etc/passwd".to_owned(), false),
            ("ls /".to_owned(), false),
        ] {
            let Some(output) = shell(&script, &[&named]) else { return };
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.success(), allowed, "{script}: {said}");
            assert!(allowed || said.contains("ermission denied"), "{script}: {said}");
        }
        assert_eq!(std::fs::read(path("other")).unwrap(), b"no");
    }
}
