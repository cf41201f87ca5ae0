// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backend that runs the machine in our own monitor: this program again, as a child that
//! gets everything as open descriptors and can open nothing itself.

use crate::backend::{Backend, Machine, MachineSpec, SnapshotFiles, SpecDisk};
use crate::drive::Server;
use crate::process::Process;
use crate::{Error, ErrorKind, Result};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tranship_block::DiskMeter;
use tranship_protocol::{BULK_PORT, CONTROL_PORT, TOOLS_SERIAL};
use tranship_vmm::channel::{Channel, Message, NewDisk, Request, Source};
use tranship_vmm::child::Order;

/// The name by which the program knows that it is to be a machine.
pub const MACHINE_NAME: &str = "tranship-machine";

/// The kernel's command line. The kernel finds neither firmware nor a keyboard to ask; the
/// machine's clock is KVM's. Nor does it look for chips that need workarounds before it knows of any
/// bus (`pci=noearly`), one port after the other.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off \
    cryptomgr.notests audit=0 8250.nr_uarts=1 random.trust_cpu=on selinux=0 no_timer_check \
    tsc=reliable net.ifnames=0 pci=noearly";

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

    fn order(
        spec: MachineSpec,
        far: Channel,
        from: Option<SnapshotFiles>,
        luggage: &mut Luggage,
    ) -> Result<Order> {
        let command_line = command_line(&spec);
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
            channel: luggage.add(far),
            command_line,
            memory_mib: spec.memory_mib.next_multiple_of(2),
            huge_pages: spec.huge_pages,
            processors,
            ports: vec![
                (CONTROL_PORT.into(), luggage.add(spec.control)),
                (BULK_PORT.into(), luggage.add(spec.bulk)),
            ],
            snapshot: from.map(|files| (luggage.add(files.state), luggage.add(files.memory))),
            own_disks: vec![(TOOLS_SERIAL.into(), luggage.add(open(&spec.tools, false)?))],
            trace: tranship_vmm::trace::wanted(),
        })
    }
}

fn open(path: &Path, write: bool) -> Result<File> {
    File::options().read(true).write(write).open(path).map_err(|error| {
        Error::new(ErrorKind::Launch, format!("opening {}", path.display())).because(error)
    })
}

/// The kernel's command line.
fn command_line(spec: &MachineSpec) -> String {
    let mut words = KERNEL_WORDS.to_owned();
    if !spec.append.is_empty() {
        words.push(' ');
        words.push_str(&spec.append);
    }
    words
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

    fn opens_images(&self) -> bool {
        true
    }

    fn most_plugged(&self) -> usize {
        MOST_DISKS
    }

    fn identity(&self, spec: &MachineSpec) -> Option<String> {
        let program = crate::snapshots::stamp(&self.program)?;
        Some(format!("{}\n{program}{}", self.name(), command_line(spec)))
    }

    fn start(&self, spec: MachineSpec, from: Option<SnapshotFiles>) -> Result<Box<dyn Machine>> {
        let mut luggage = Luggage::default();
        let (socket, disks) = (spec.disk_socket.clone(), spec.disks.clone());
        let (channel, far) = Channel::pair().map_err(|error| launch("the machine", error))?;
        let order = Self::order(spec, far, from, &mut luggage)?;
        tracing::debug!(?order, "starting the machine");
        let number = luggage.add(written(&order)?);
        let mut command = Command::new(&self.program);
        command.arg0(MACHINE_NAME).arg(number.to_string()).env_clear();
        let process = Process::start_traced(command, luggage.0)?;
        let machine = OwnMachine::new(process, channel, socket)?;
        for disk in &disks {
            machine.add_disk(disk)?;
        }
        machine.ask(&Request::Start, &[])?;
        Ok(Box::new(machine))
    }
}

/// The most disks: one place of the machine's is the appliance's own.
const MOST_DISKS: usize = tranship_vmm::MOST_DISKS - 1;

/// Time that the monitor has for an answer. Opening a disk of a slow server takes longest.
const ANSWER_LIMIT: Duration = Duration::from_mins(2);

/// Time that it has for figures, which it has at hand.
const COUNT_LIMIT: Duration = Duration::from_secs(5);

/// A machine in our monitor.
#[derive(Debug)]
struct OwnMachine {
    process: Process,
    line: Mutex<Line>,
    ended: Arc<(Mutex<Option<String>>, Condvar)>,
    disk_socket: PathBuf,
    /// Disks whose figures are still over there, by their serial numbers.
    counted: Mutex<Vec<(String, DiskMeter)>>,
}

/// Our side of the line to the monitor: one question at a time.
#[derive(Debug)]
struct Line {
    channel: Arc<Channel>,
    answers: Receiver<Message>,
}

impl OwnMachine {
    fn new(process: Process, channel: Channel, disk_socket: PathBuf) -> Result<Self> {
        let channel = Arc::new(channel);
        let ended = Arc::new((Mutex::new(None), Condvar::new()));
        // There is one question at a time: more answers than one wait for nobody.
        let (sender, answers) = std::sync::mpsc::sync_channel(1);
        let (listening, told) = (Arc::clone(&channel), Arc::clone(&ended));
        std::thread::Builder::new()
            .name("monitor".into())
            .spawn(move || {
                loop {
                    // What else the monitor may send, descriptors even, is dropped.
                    let answer = match listening.receive::<Message>() {
                        Ok(Some((Message::Ended(how), _))) => {
                            end(&told, how);
                            continue;
                        }
                        Ok(Some((answer, _))) => answer,
                        Ok(None) => break,
                        Err(error) => {
                            tracing::debug!(%error, "the monitor");
                            break;
                        }
                    };
                    if sender.try_send(answer).is_err() {
                        break;
                    }
                }
                // Whoever waits for an answer learns that there will be none.
                drop(sender);
            })
            .map_err(|error| launch("a thread for the monitor", error))?;
        let line = Mutex::new(Line { channel, answers });
        Ok(Self { process, line, ended, disk_socket, counted: Mutex::default() })
    }

    /// Asks the monitor for something and waits until it is done.
    fn ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        match self.answer(request, descriptors, ANSWER_LIMIT)? {
            Message::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks the monitor for what a disk has done, and counts that here.
    fn settle(&self, serial: &str, meter: &DiskMeter) -> Result<()> {
        // Which files there are is known here: it is not asked.
        for file in std::iter::once(None).chain(meter.files().into_iter().map(Some)) {
            let request = Request::Count { serial: serial.to_owned(), file };
            match self.answer(&request, &[], COUNT_LIMIT)? {
                Message::Counted(counts) => {
                    let Request::Count { file, .. } = &request else { continue };
                    meter.add(file.as_deref(), &counts);
                }
                other => return Err(unexpected(&other)),
            }
        }
        Ok(())
    }

    fn settle_all(&self, disks: Vec<(String, DiskMeter)>) {
        for (serial, meter) in disks {
            if let Err(error) = self.settle(&serial, &meter) {
                tracing::debug!(serial, %error, "what a disk did is not known");
                // Who does not answer once would be waited for each time.
                return;
            }
        }
    }

    /// The monitor's answer to a question.
    fn answer(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Message> {
        let line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = || {
            // It says why on its standard error.
            self.process.wait(Duration::from_secs(1));
            let why = self.ended().unwrap_or_else(|| "the monitor went away".into());
            Error::new(ErrorKind::Launch, why)
        };
        if line.channel.send(request, descriptors).is_err() {
            return Err(gone());
        }
        match line.answers.recv_timeout(limit) {
            Ok(Message::Failed(why)) => {
                Err(Error::new(ErrorKind::Launch, format!("the monitor: {why}")))
            }
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
            Err(RecvTimeoutError::Timeout) => {
                // A late answer would be taken for that of the next question.
                self.process.kill();
                Err(Error::new(
                    ErrorKind::Launch,
                    format!("the monitor did not answer in {limit:?}"),
                ))
            }
        }
    }
}

fn unexpected(answer: &Message) -> Error {
    Error::new(ErrorKind::Launch, format!("the monitor answered {answer:?} to something else"))
}

fn end(ended: &(Mutex<Option<String>>, Condvar), how: String) {
    ended.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(how);
    ended.1.notify_all();
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn launch(what: &str, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Launch, what.to_owned()).because(error)
}

impl Machine for OwnMachine {
    fn ended(&self) -> Option<String> {
        let told = self.ended.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        told.or_else(|| {
            self.process.exit_status().map(|status| format!("the monitor ended with {status}"))
        })
    }

    fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut told = self.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
        while told.is_none() && self.process.exit_status().is_none() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            // A monitor that dies without a word is noticed a little later.
            let turn = left.min(Duration::from_millis(50));
            told = self.ended.1.wait_timeout(told, turn).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn kill(&self) {
        self.process.kill();
    }

    fn console(&self) -> String {
        self.process.console()
    }

    fn add_disk(&self, disk: &SpecDisk) -> Result<()> {
        let SpecDisk { export, image, serial, read_only, sector_size, durable } = disk.clone();
        let meter = image.as_ref().map(|image| image.meter.clone()).unwrap_or_default();
        let (rate, counts) = (meter.rate(), meter.is_counted());
        let disk = |source| {
            let serial = serial.clone();
            NewDisk { serial, read_only, durable, sector_size, rate, counts, source }
        };
        let Some(image) = image else {
            let socket = UnixStream::connect(&self.disk_socket).map_err(|error| {
                Error::new(ErrorKind::Io, "connecting to the server of the disks").because(error)
            })?;
            let request = Request::Add(disk(Source::Nbd { export }));
            return self.ask(&request, &[socket.as_fd()]);
        };
        let handed_over =
            image.servers.iter().map(Server::hand_over).collect::<Result<Vec<_>>>()?;
        let (servers, sockets): (Vec<_>, Vec<_>) = handed_over.into_iter().unzip();
        let source = Source::Image {
            path: image.path.clone(),
            format: image.format.clone(),
            files: image.files.iter().map(|(path, write, _)| (path.clone(), *write)).collect(),
            servers,
            discard: image.discard,
        };
        let mut descriptors: Vec<BorrowedFd<'_>> =
            image.files.iter().map(|(_, _, file)| file.as_fd()).collect();
        descriptors.extend(sockets.iter().flatten().map(AsFd::as_fd));
        // A file without a name ends with the machine, however that ends.
        let overlay = image.discard.then(tempfile::tempfile).transpose();
        let overlay = overlay.map_err(|error| launch("making a temporary file", error))?;
        descriptors.extend(overlay.as_ref().map(AsFd::as_fd));
        self.ask(&Request::Add(disk(source)), &descriptors)?;
        tracing::debug!(serial, "the monitor has opened the image");
        if counts {
            locked(&self.counted).push((serial, meter));
        }
        Ok(())
    }

    fn remove_disk(&self, serial: &str) -> Result<()> {
        self.ask(&Request::Remove { serial: serial.to_owned() }, &[])?;
        let gone = locked(&self.counted).extract_if(.., |(one, _)| one == serial).collect();
        self.settle_all(gone);
        Ok(())
    }

    fn collect(&self) {
        let all = std::mem::take(&mut *locked(&self.counted));
        self.settle_all(all);
    }

    fn save(&self, files: &SnapshotFiles) -> Result<()> {
        self.ask(&Request::Save, &[files.state.as_fd(), files.memory.as_fd()])
    }

    fn dump(&self, to: &File, vmcoreinfo: Option<(u64, u64)>) -> Result<()> {
        self.ask(&Request::Dump { vmcoreinfo }, &[to.as_fd()])
    }
}

#[cfg(test)]
mod tests;
