// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From the kernel's hand-over to the first message.

use crate::failure::{Result, io, plain, system};
use crate::{modules, server};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::Mode;
use rustix::mount::{MountFlags, mount};
use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::time::Duration;
use tranship_protocol::{BULK_PORT, CONTROL_PORT, Hello, VERSION};

/// Starts everything and serves until the host hangs up or asks for the end.
pub(crate) fn start() -> Result<()> {
    let mut stages = Vec::new();
    for (kind, target) in [(c"devtmpfs", c"/dev"), (c"proc", c"/proc"), (c"sysfs", c"/sys")] {
        mount_special(kind, target)?;
    }
    note(&mut stages, "kernel");
    // A hostile filesystem that oopses the kernel must end the appliance, not hang it.
    let _ = fs::write("/proc/sys/kernel/panic_on_oops", "1");
    modules::load_boot_modules()?;
    note(&mut stages, "modules");
    let control = open_port(CONTROL_PORT)?;
    let bulk = open_port(BULK_PORT)?;
    note(&mut stages, "ports");
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let vmcoreinfo = vmcoreinfo();
    server::serve(control, bulk, &Hello { version: VERSION, kernel, stages, vmcoreinfo })
}

fn mount_special(kind: &CStr, target: &CStr) -> Result<()> {
    let _ = rustix::fs::mkdir(target, Mode::from_raw_mode(0o755));
    match mount(kind, target, kind, MountFlags::empty(), None) {
        // The kernel may have mounted devtmpfs itself.
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(error) => Err(system(format_args!("mounting {}", target.to_string_lossy()), error)),
    }
}

/// Microseconds since the kernel began.
fn note(stages: &mut Vec<(String, u64)>, name: &str) {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let micros = u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000
        + u64::try_from(now.tv_nsec / 1000).unwrap_or(0);
    stages.push((name.to_owned(), micros));
}

/// Address and size of the kernel's notes.
fn vmcoreinfo() -> Option<(u64, u64)> {
    address_and_size(&fs::read_to_string("/sys/kernel/vmcoreinfo").ok()?)
}

/// Two hexadecimal numbers, of which the kernel gives the first one a prefix.
fn address_and_size(text: &str) -> Option<(u64, u64)> {
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let (address, size) = text.trim().split_once(' ')?;
    Some((number(address)?, number(size)?))
}

/// Opens the virtio-serial port called `name`, which the driver may still be announcing.
fn open_port(name: &str) -> Result<File> {
    // 10 s in all: far more than the driver needs on the slowest machine.
    for _ in 0..5000 {
        if let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") {
            for port in ports.flatten() {
                let found = fs::read_to_string(port.path().join("name")).unwrap_or_default();
                if found.trim_end() == name {
                    let device = std::path::Path::new("/dev").join(port.file_name());
                    let port = OpenOptions::new()
                        .read(true)
                        .write(true)
                        .open(&device)
                        .map_err(|error| io(device.display(), &error))?;
                    wait_for_host(&port)?;
                    return Ok(port);
                }
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Err(plain(format!("the machine has no virtio-serial port called {name}")))
}

/// Waits until the driver knows that the host's end is open: before that a read returns
/// end of file.
fn wait_for_host(port: &File) -> Result<()> {
    for _ in 0..5000 {
        let mut ready = [PollFd::new(port, PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut ready, Some(&now)).map_err(|error| system("poll", error))?;
        if !ready.iter().any(|port| port.revents().contains(PollFlags::HUP)) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Err(plain("the host did not open its end of the virtio-serial port"))
}

/// Prints a line on the kernel's console.
pub(crate) fn console(line: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = writeln!(console, "{line}");
    }
}

/// Ends the machine.
pub(crate) fn power_off() -> ! {
    rustix::fs::sync();
    // The machine is started so that a reset ends it: quicker than ACPI's way off.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_where_its_notes_are() {
        for (text, expected) in [
            ("0x000000002a12a000 1024\n", Some((0x2a12_a000, 0x1024))),
            ("2a12a000 1000\n", Some((0x2a12_a000, 0x1000))),
            ("0x2a12a000\n", None),
            ("somewhere 1024\n", None),
        ] {
            assert_eq!(address_and_size(text), expected, "{text}");
        }
    }
}
