// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the process gives up before a guest runs in it.
//!
//! A guest that breaks out finds itself in a process without privileges, without a way to
//! open a file, to start a program or to make a socket: it has the disks that the machine
//! has, and nothing else. None of this needs root or namespaces, so it holds in containers,
//! too.

mod syscalls;

use crate::{Error, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use std::collections::BTreeSet;
use std::os::fd::RawFd;

/// Closes all descriptors but the standard streams and `kept`, drops capabilities and the
/// way to get new ones, and gives up the filesystem and the network for good.
///
/// It holds for this thread and all that it starts afterwards, so it comes before the first
/// of them.
///
/// # Errors
///
/// What the kernel refuses, except where it is too old to know it.
pub fn give_up_privileges(kept: &BTreeSet<RawFd>) -> Result<()> {
    close_all_but(kept)?;
    rustix::thread::set_no_new_privs(true).map_err(Error::system("giving up new privileges"))?;
    // Nobody reads our memory through /proc or a core file.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(Error::system("hiding the process' memory"))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(Error::system("no core files"))?;
    drop_capabilities()?;
    give_up_files()
}

/// Closes every descriptor above the standard streams that is not in `kept`.
fn close_all_but(kept: &BTreeSet<RawFd>) -> Result<()> {
    let mut first = 3;
    for number in kept.iter().copied().chain([RawFd::MAX]) {
        let Ok(number) = u32::try_from(number) else { continue };
        if first < number {
            // SAFETY: descriptors above the standard streams belong to the order, which
            // keeps them, or to nobody: this process has opened nothing else.
            let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, number - 1, 0) };
            if outcome != 0 {
                let error = std::io::Error::last_os_error();
                return Err(Error::system("closing what was inherited")(error));
            }
        }
        first = number.saturating_add(1);
    }
    Ok(())
}

fn drop_capabilities() -> Result<()> {
    use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
    let held = capabilities(None).map_err(Error::system("asking for capabilities"))?;
    if held.permitted.is_empty() && held.effective.is_empty() {
        return Ok(());
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(Error::system("dropping capabilities"))
}

/// Landlock without a single rule: nothing can be opened, no TCP port be bound or reached,
/// no process outside be signalled.
fn give_up_files() -> Result<()> {
    let restrict = || {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V6))?
            .handle_access(AccessNet::from_all(ABI::V6))?
            .scope(Scope::from_all(ABI::V6))?
            .create()?
            .restrict_self()
    };
    let status = restrict().map_err(|error: landlock::RulesetError| {
        Error::Config(format!("giving up the filesystem: {error}"))
    })?;
    tracing::debug!(?status, "Landlock");
    Ok(())
}

/// Allows all threads of the process the system calls that a machine makes, and no others.
///
/// # Errors
///
/// A filter that the kernel does not take.
pub fn allow_only_what_a_machine_needs() -> Result<()> {
    for filter in syscalls::process()? {
        seccompiler::apply_filter_all_threads(&filter)
            .map_err(|error| Error::Config(format!("the filter of system calls: {error}")))?;
    }
    Ok(())
}

/// Allows the calling thread what a processor needs.
///
/// # Errors
///
/// A filter that the kernel does not take.
pub(crate) fn allow_only_what_a_processor_needs() -> Result<()> {
    let filter = syscalls::processor()?;
    seccompiler::apply_filter(&filter)
        .map_err(|error| Error::Config(format!("a processor's filter: {error}")))
}
