// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Boots a kernel with an initramfs and tells how long it took, and what it cost.
//!
//! usage: boot KERNEL INITRAMFS MEMORY-MIB PROCESSORS COMMAND-LINE [DISK...]

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_vmm::{Backing, Disk, Machine, Parts};

fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, memory, processors, line, disks @ ..] = arguments.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS MEMORY-MIB PROCESSORS COMMAND-LINE".into());
    };
    let begun = Instant::now();
    let kvm: OwnedFd = File::options().read(true).write(true).open("/dev/kvm")?.into();
    let console = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3)?;
    let (mut control, far_control) = UnixStream::pair()?;
    let (_bulk, far_bulk) = UnixStream::pair()?;
    let disks = disks
        .iter()
        .enumerate()
        .map(|(index, path)| {
            let options = tranship_formats::OpenOptions { read_only: true, ..Default::default() };
            let opened = tranship_formats::open(path.as_ref(), &options)?;
            Ok(Disk {
                device: Arc::clone(&opened.device),
                serial: format!("tranship-{index}"),
                read_only: true,
                durable: true,
                sector_size: opened.device.sector_size(),
            })
        })
        .collect::<Result<_, Box<dyn Error>>>()?;
    let mut machine = Machine::build(Parts {
        kvm,
        kernel: File::open(kernel)?,
        initramfs: File::open(initramfs)?,
        command_line: line.clone(),
        memory_mib: memory.parse()?,
        backing: Backing::Anonymous,
        processors: processors.parse()?,
        disks,
        ports: vec![
            ("org.tranship.control.0".into(), far_control),
            ("org.tranship.bulk.0".into(), far_bulk),
        ],
        console: File::from(console),
    })?;
    eprintln!("built after {:?}", begun.elapsed());
    machine.start(false)?;
    control.set_read_timeout(Some(Duration::from_mins(1)))?;
    let mut hello = [0; 64];
    match control.read(&mut hello) {
        Ok(count) => eprintln!("{count} bytes from the agent after {:?}", begun.elapsed()),
        Err(error) => eprintln!("no word from the agent: {error}"),
    }
    drop(control);
    let ending = machine.wait(Some(Duration::from_secs(5)));
    eprintln!("{:?} after {:?}", ending.map(|how| how.to_string()), begun.elapsed());
    for (what, count) in machine.exits() {
        eprintln!("{count:8} {what}");
    }
    Ok(())
}
