// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why KVM cannot be used, and what would help.

use std::path::Path;
use std::time::Duration;

/// The kind of an obstacle, for programs; [`crate::Verdict::reason`] is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// There is no `/dev/kvm`.
    NoDevice,
    /// This user may not open it.
    NoPermission,
    /// It speaks another version of the interface, or is something else.
    WrongVersion,
    /// The kernel lacks something that a guest needs.
    MissingCapability,
    /// A guest could not be set up.
    Setup,
    /// The processor's ring 0 is imitated, and something in it does not work.
    Emulation,
    /// It works, but so slowly that emulation without KVM is faster.
    TooSlow,
    /// It did not finish in time.
    TimedOut,
}

/// What the probe met.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("there is no /dev/kvm")]
    NoDevice,
    #[error("this user may not open /dev/kvm")]
    NoPermission,
    #[error("/dev/kvm cannot be opened: {0}")]
    Open(std::io::Error),
    #[error("/dev/kvm has interface version {0}, expected 12")]
    Version(i32),
    #[error("the kernel's KVM has no {0}")]
    Capability(&'static str),
    #[error("{what} failed: {error}")]
    Setup { what: &'static str, error: std::io::Error },
    #[error("the guest's ring 0 does not work: {how} after step \"{after}\"")]
    Emulation { after: &'static str, how: String },
    #[error(
        "a ring-0 loop takes {0:.0} ns a turn, expected at most 200: instructions are emulated"
    )]
    Slow(f64),
    #[error("the guest did not finish in {limit:?}, it got as far as \"{after}\"")]
    TimedOut { after: &'static str, limit: Duration },
}

impl Failure {
    pub(crate) fn cause(&self) -> Cause {
        match self {
            Self::NoDevice => Cause::NoDevice,
            Self::NoPermission => Cause::NoPermission,
            Self::Version(_) => Cause::WrongVersion,
            Self::Capability(_) => Cause::MissingCapability,
            Self::Open(_) | Self::Setup { .. } => Cause::Setup,
            Self::Emulation { .. } => Cause::Emulation,
            Self::Slow(_) => Cause::TooSlow,
            Self::TimedOut { .. } => Cause::TimedOut,
        }
    }

    /// What the owner of this host can do, in one sentence.
    pub(crate) fn remedy(&self) -> String {
        remedy(self.cause(), Host::look())
    }
}

/// What matters about this host.
#[derive(Clone, Copy, Debug, Default)]
struct Host {
    intel: bool,
    amd: bool,
    /// KVM without hardware support, as some clouds load it inside their guests.
    pvm: bool,
}

impl Host {
    fn look() -> Self {
        // Only for the words of the remedy: the flags of a container or of a nested
        // host say nothing certain about /dev/kvm.
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let has = |flag| flags.split_whitespace().any(|word| word == flag);
        let pvm = Path::new("/sys/module/kvm_pvm").exists();
        Self { intel: has("vmx"), amd: has("svm"), pvm }
    }
}

fn remedy(cause: Cause, host: Host) -> String {
    let text = match cause {
        Cause::NoDevice if host.intel => {
            "run `modprobe kvm_intel` as root, or pass /dev/kvm into this container"
        }
        Cause::NoDevice if host.amd => {
            "run `modprobe kvm_amd` as root, or pass /dev/kvm into this container"
        }
        Cause::NoDevice => {
            "switch virtualization on in the firmware, or nested virtualization on if this is \
             a virtual machine, and load kvm_intel or kvm_amd; a container needs /dev/kvm \
             passed in"
        }
        Cause::NoPermission => {
            "add this user to the group that owns /dev/kvm (`usermod -aG kvm USER`) and log in \
             again"
        }
        Cause::WrongVersion | Cause::MissingCapability => {
            "use a Linux kernel of version 4.12 or later with its own KVM modules"
        }
        Cause::Setup => {
            "end other hypervisors that hold the processor (VirtualBox, VMware), and look at \
             the kernel's log for messages about kvm"
        }
        Cause::Emulation | Cause::TooSlow | Cause::TimedOut if host.pvm => {
            "this host has kvm_pvm, which imitates ring 0 in software: use a host with \
             hardware virtualization, or go on without KVM"
        }
        Cause::Emulation | Cause::TooSlow => {
            "use a host with hardware virtualization or working nested virtualization, or go \
             on without KVM"
        }
        Cause::TimedOut => "try again when this host is less busy, or go on without KVM",
    };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remedy_fits_its_host() {
        let none = Host::default();
        let table = [
            (Cause::NoDevice, Host { intel: true, ..none }, "modprobe kvm_intel"),
            (Cause::NoDevice, Host { amd: true, ..none }, "modprobe kvm_amd"),
            (Cause::NoDevice, none, "firmware"),
            (Cause::NoPermission, none, "usermod -aG kvm"),
            (Cause::Emulation, Host { pvm: true, ..none }, "kvm_pvm"),
            (Cause::Emulation, none, "hardware virtualization"),
            (Cause::TimedOut, none, "less busy"),
        ];
        for (cause, host, expected) in table {
            let text = remedy(cause, host);
            assert!(text.contains(expected), "{cause:?}: {text}");
        }
    }
}
