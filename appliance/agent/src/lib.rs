// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program inside the appliance: it runs as PID 1 of a stock Linux kernel, waits for
//! calls on a virtio-serial port and carries them out.
//!
//! It holds no policy: what is mounted, read and changed is the host's decision. What it
//! guarantees is that paths of the guest resolve inside the guest's tree, that an edit
//! replaces a file as a whole, and that one call's failure leaves the others alone.

mod boot;
mod failure;
mod files;
mod ioctl;
mod modules;
mod mounts;
mod plugging;
mod present;
mod programs;
mod server;
mod tools;
mod volumes;

/// Whether this process is the appliance's first one and so has to be the agent.
pub fn is_appliance() -> bool {
    rustix::process::getpid().is_init()
        && std::env::args_os().next().is_some_and(|name| name == "/init" || name == "init")
}

/// Boots the appliance and serves calls until the host has it switched off.
pub fn run() -> ! {
    if let Err(failure) = boot::start() {
        // The console is all there is to complain to.
        boot::console(&format!("tranship agent: {}", failure.message));
    }
    boot::power_off()
}
