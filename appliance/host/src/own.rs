// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backend that runs the machine in our own monitor: this program again, as a child that
//! gets everything as open descriptors and can open nothing itself.

use crate::backend::{Backend, Machine, MachineSpec, SnapshotFiles, SpecDisk};
use crate::process::{MachineProcess, Process};
use crate::{Error, ErrorKind, Result};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tranship_protocol::{BULK_PORT, CONTROL_PORT, TOOLS_SERIAL};
use tranship_vmm::child::{Order, OrderedDisk, Source};

/// The name by which the program knows that it is to be a machine.
pub const MACHINE_NAME: &str = "tranship-machine";

/// The kernel's command line. The kernel finds neither firmware nor a keyboard to ask; the
/// machine's clock is KVM's.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off \
    cryptomgr.notests audit=0 8250.nr_uarts=1 random.trust_cpu=on selinux=0 no_timer_check \
    tsc=reliable net.ifnames=0";

/// Our monitor.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    program: PathBuf,
}

/// Descriptors on their way to the child.
#[derive(Debug, Default)]
struct Luggage(Vec<OwnedFd>);

impl Luggage {
    /// Packs a descriptor; its number is the same over there.
    fn add(&mut self, fd: impl Into<OwnedFd>) -> i32 {
        let fd = fd.into();
        let number = fd.as_raw_fd();
        self.0.push(fd);
        number
    }
}

impl Own {
    pub(crate) fn new(program: &Path) -> Self {
        Self { program: program.to_owned() }
    }

    fn order(spec: MachineSpec, luggage: &mut Luggage) -> Result<Order> {
        let mut disks = vec![OrderedDisk {
            serial: TOOLS_SERIAL.into(),
            read_only: true,
            durable: false,
            sector_size: 512,
            source: Source::Raw(luggage.add(open(&spec.tools, false)?)),
        }];
        for disk in &spec.disks {
            let SpecDisk { export, serial, read_only, sector_size, durable } = disk;
            let socket = UnixStream::connect(&spec.disk_socket).map_err(|error| {
                Error::new(ErrorKind::Io, "connecting to the server of the disks").because(error)
            })?;
            disks.push(OrderedDisk {
                serial: serial.clone(),
                read_only: *read_only,
                durable: *durable,
                sector_size: *sector_size,
                source: Source::Nbd { socket: luggage.add(socket), export: export.clone() },
            });
        }
        let mut command_line = KERNEL_WORDS.to_owned();
        if !spec.append.is_empty() {
            command_line.push(' ');
            command_line.push_str(&spec.append);
        }
        let processors = u8::try_from(spec.processors)
            .ok()
            .filter(|count| (1..=tranship_vmm::MOST_PROCESSORS).contains(count))
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Usage,
                    format!(
                        "{} processors, from 1 to {} are possible",
                        spec.processors,
                        tranship_vmm::MOST_PROCESSORS
                    ),
                )
            })?;
        Ok(Order {
            kvm: luggage.add(open(Path::new("/dev/kvm"), true)?),
            kernel: luggage.add(open(&spec.kernel, false)?),
            initramfs: luggage.add(open(&spec.initramfs, false)?),
            command_line,
            memory_mib: spec.memory_mib.next_multiple_of(2),
            huge_pages: false,
            processors,
            ports: vec![
                (CONTROL_PORT.into(), luggage.add(spec.control)),
                (BULK_PORT.into(), luggage.add(spec.bulk)),
            ],
            disks,
        })
    }
}

fn open(path: &Path, write: bool) -> Result<File> {
    File::options().read(true).write(write).open(path).map_err(|error| {
        Error::new(ErrorKind::Launch, format!("opening {}", path.display())).because(error)
    })
}

/// The order as a file that the child inherits.
fn written(order: &Order) -> Result<File> {
    let failed = |error: std::io::Error| {
        Error::new(ErrorKind::Io, "writing the machine's order").because(error)
    };
    let text = serde_json::to_vec(order).map_err(|error| failed(error.into()))?;
    let file = memfd_create("order", MemfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let mut file = File::from(file);
    file.write_all(&text).map_err(failed)?;
    Ok(file)
}

impl Backend for Own {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn most_plugged(&self) -> usize {
        0
    }

    fn identity(&self, _: &MachineSpec) -> Option<String> {
        None
    }

    fn start(&self, spec: MachineSpec, _: Option<SnapshotFiles>) -> Result<Box<dyn Machine>> {
        let mut luggage = Luggage::default();
        let order = Self::order(spec, &mut luggage)?;
        tracing::debug!(?order, "starting the machine");
        let number = luggage.add(written(&order)?);
        let mut command = Command::new(&self.program);
        command.arg0(MACHINE_NAME).arg(number.to_string()).env_clear();
        let process = Process::start(command, luggage.0)?;
        Ok(Box::new(MachineProcess::new("the monitor", process)))
    }
}
