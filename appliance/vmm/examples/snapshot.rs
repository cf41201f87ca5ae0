// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Boots a guest, saves it while it runs, and restores it twice, each in a process of its own
//! that is confined as the appliance's is. `tests/nested/snapshot.sh` makes the guest.
//!
//! usage: snapshot KERNEL INITRAMFS MEMORY-MIB PROCESSORS [huge]

use std::collections::BTreeSet;
use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_vmm::{Backing, Disk, Machine, Parts, Snapshot, confine};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const DISK: &str = "/tmp/disk";
const MEMORY: &str = "/tmp/memory";
const STATE: &str = "/tmp/state";
const LINE: &str = "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check mitigations=off rdinit=/init";

fn main() -> Result<()> {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("cold") => cold(arguments.get(1..).unwrap_or(&[])),
        Some("early") => early(arguments.get(1..).unwrap_or(&[])),
        Some("rubbish") => rubbish(arguments.get(1..).unwrap_or(&[])),
        Some("warm") => warm(arguments.get(1..).unwrap_or(&[])),
        _ => all(&arguments),
    }
}

/// Every stage in a process of its own.
fn all(arguments: &[String]) -> Result<()> {
    let pattern: Vec<u8> = (0..8_u32 << 18).flat_map(u32::to_le_bytes).collect();
    std::fs::write(DISK, pattern)?;
    if arguments.iter().any(|word| word == "huge") {
        std::fs::write("/proc/sys/vm/nr_hugepages", "128")?;
    }
    let mut found = Vec::new();
    for stage in ["cold", "warm", "warm", "rubbish", "early"] {
        let output = Command::new("/proc/self/exe").arg(stage).args(arguments).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        print!("{said}{}", String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            return Err(format!("the stage {stage} failed: {}", output.status).into());
        }
        found.extend(
            said.lines().filter_map(|line| line.strip_prefix("entropy: ").map(str::to_owned)),
        );
    }
    found.sort_unstable();
    let all = found.len();
    found.dedup();
    if found.len() != all || all < 3 {
        return Err("two machines drew the same entropy".into());
    }
    println!("snapshot: all well");
    Ok(())
}

/// The guest's end of a conversation.
struct Guest {
    machine: Machine,
    control: UnixStream,
    answers: BufReader<UnixStream>,
    /// Keeps the second port open.
    _bulk: UnixStream,
}

/// What the guest says of itself.
#[derive(Debug)]
struct Answer {
    number: u32,
    uptime: f64,
    line: String,
}

fn parts(arguments: &[String]) -> Result<(Parts, UnixStream, UnixStream)> {
    let [kernel, initramfs, memory, processors, how @ ..] = arguments else {
        return Err("usage: snapshot KERNEL INITRAMFS MEMORY-MIB PROCESSORS [huge]".into());
    };
    let kvm: OwnedFd = File::options().read(true).write(true).open("/dev/kvm")?.into();
    let console = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3)?;
    let (control, far_control) = UnixStream::pair()?;
    control.set_read_timeout(Some(Duration::from_secs(100)))?;
    let (bulk, far_bulk) = UnixStream::pair()?;
    let options = tranship_formats::OpenOptions { read_only: true, ..Default::default() };
    let opened = tranship_formats::open(DISK.as_ref(), &options)?;
    let disk = Disk {
        device: Arc::clone(&opened.device),
        serial: "tools".into(),
        read_only: true,
        durable: true,
        sector_size: 512,
    };
    let huge = how.iter().any(|word| word == "huge");
    let parts = Parts {
        kvm,
        kernel: File::open(kernel)?,
        initramfs: File::open(initramfs)?,
        command_line: LINE.into(),
        memory_mib: memory.parse()?,
        backing: if huge { Backing::HugePages } else { Backing::Anonymous },
        processors: processors.parse()?,
        disks: vec![disk],
        ports: vec![
            ("org.tranship.control.0".into(), far_control),
            ("org.tranship.bulk.0".into(), far_bulk),
        ],
        console: File::from(console),
    };
    Ok((parts, control, bulk))
}

impl Guest {
    fn start(machine: Machine, control: UnixStream, bulk: UnixStream) -> Result<Self> {
        confine::allow_only_what_a_machine_needs()?;
        Self::start_as(true, machine, control, bulk)
    }

    fn start_as(
        confined: bool,
        mut machine: Machine,
        control: UnixStream,
        bulk: UnixStream,
    ) -> Result<Self> {
        let answers = BufReader::new(control.try_clone()?);
        machine.start(confined)?;
        Ok(Self { machine, control, answers, _bulk: bulk })
    }

    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(1..) => Ok(line.trim_end().to_owned()),
            other => {
                let ending = self.machine.wait(Some(Duration::ZERO));
                Err(format!("no answer ({other:?}); the machine's end: {ending:?}").into())
            }
        }
    }

    fn ask(&mut self, word: &str) -> Result<Answer> {
        self.control.write_all(format!("{word}\n").as_bytes())?;
        let line = self.hear()?;
        println!("  guest: {line}");
        let mut fields = line.split(' ');
        let number = fields.next().unwrap_or_default().parse()?;
        if fields.next() != Some(word) {
            return Err(format!("an answer to something else: {line}").into());
        }
        let uptime = fields.next().unwrap_or_default().parse()?;
        let after: f64 = fields.next().unwrap_or_default().parse()?;
        // It slept for 0.1 s in between, on each processor.
        if !(uptime + 0.1..uptime + 30.0).contains(&after) {
            return Err(format!("a nap from {uptime} to {after}").into());
        }
        let expected = sum(number);
        if fields.next() != Some(expected.as_str()) {
            return Err(format!("the disk reads wrong: {line}, expected {expected}").into());
        }
        Ok(Answer { number, uptime, line })
    }
}

/// The guest adds up the four-byte numbers of two sectors of the disk.
fn sum(number: u32) -> String {
    let first = u64::from(number) * 128;
    (first..first + 256).sum::<u64>().to_string()
}

fn cold(arguments: &[String]) -> Result<()> {
    let begun = Instant::now();
    let (parts, control, bulk) = parts(arguments)?;
    let memory = File::create(MEMORY)?;
    let mut state = File::create(STATE)?;
    let mut pages = File::open("/proc/meminfo")?;
    let mut guest = Guest::start(Machine::build(parts)?, control, bulk)?;
    let hello = guest.hear()?;
    println!("cold: \"{hello}\" after {:?}", begun.elapsed());
    guest.ask("one")?;
    let mut last = guest.ask("two")?;
    for round in ["first", "second"] {
        let begun = Instant::now();
        let snapshot = guest.machine.save(&memory)?;
        let took = begun.elapsed();
        let bytes = snapshot.to_bytes()?;
        let data = memory.metadata()?;
        println!(
            "save ({round}): {took:?}, state {} bytes, memory {} MiB of {} MiB",
            bytes.len(),
            data.blocks() >> 11,
            data.len() >> 20
        );
        if round == "second" {
            state.write_all(&bytes)?;
        }
        let next = guest.ask("on")?;
        if next.number != last.number + 1 || next.uptime < last.uptime {
            return Err("the machine did not go on where it was".into());
        }
        last = next;
    }
    guest.ask("on")?;
    // Saving must not have taken huge pages that the guest never touched.
    let mut text = String::new();
    pages.read_to_string(&mut text)?;
    println!(
        "{}",
        text.lines().filter(|line| line.starts_with("HugePages_")).collect::<Vec<_>>().join(", ")
    );
    report("cold", &mut guest)
}

fn warm(arguments: &[String]) -> Result<()> {
    let begun = Instant::now();
    let snapshot = Snapshot::from_bytes(&std::fs::read(STATE)?)?;
    let (parts, control, bulk) = parts(arguments)?;
    let again = File::create("/tmp/again")?;
    let machine = Machine::restore(parts, snapshot, File::open(MEMORY)?)?;
    let restored = begun.elapsed();
    let mut guest = Guest::start(machine, control, bulk)?;
    let started = begun.elapsed();
    guest.control.write_all(b"quick\n")?;
    let quick = guest.hear()?;
    println!("warm: restored {restored:?}, started {started:?}, \"{quick}\" {:?}", begun.elapsed());
    // The saved guest had answered three questions.
    for number in 4..7 {
        let answer = guest.ask("again")?;
        if answer.number != number {
            return Err(format!("answer {number} expected: {}", answer.line).into());
        }
    }
    // A restored machine is one like others.
    let begun = Instant::now();
    guest.machine.save(&again)?;
    println!("saved again: {:?}, memory {} MiB", begun.elapsed(), again.metadata()?.blocks() >> 11);
    guest.ask("still")?;
    report("warm", &mut guest)
}

/// Guests that were saved while they booted go on booting.
fn early(arguments: &[String]) -> Result<()> {
    for delay in [100, 700, 1500] {
        let delay = Duration::from_millis(delay);
        let memory = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open("/tmp/early")?;
        let (these, _control, _bulk) = parts(arguments)?;
        let mut machine = Machine::build(these)?;
        machine.start(false)?;
        machine.wait(Some(delay));
        // The guest may be asking for its ports just now.
        let snapshot = std::iter::repeat_with(|| {
            machine.wait(Some(Duration::from_millis(10)));
            machine.save(&memory)
        })
        .take(20)
        .find_map(std::result::Result::ok)
        .ok_or("the machine cannot be saved")?;
        drop(machine);
        let snapshot = Snapshot::from_bytes(&snapshot.to_bytes()?)?;
        let (these, control, bulk) = parts(arguments)?;
        let machine = Machine::restore(these, snapshot, memory)?;
        let mut guest = Guest::start_as(false, machine, control, bulk)?;
        println!("early: \"{}\" of a guest saved after {delay:?}", guest.hear()?);
        guest.ask("one")?;
        report("early", &mut guest)?;
    }
    Ok(())
}

/// Snapshots that are damaged under a checksum that is right: none does more than not being
/// restored, or a machine whose guest makes no sense.
fn rubbish(arguments: &[String]) -> Result<()> {
    let whole = std::fs::read(STATE)?;
    let (head, state) = whole.split_at(20);
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut next = |below: usize| {
        for shift in [13, -7, 17] {
            random ^= if shift > 0 { random << shift } else { random >> -shift };
        }
        usize::try_from(random >> 16).unwrap_or(0) % below
    };
    let (mut refused, mut ran, mut why) = (0, 0, BTreeSet::new());
    for _ in 0..20 {
        let mut state = state.to_vec();
        for _ in 0..=next(4) {
            let at = next(state.len());
            state[at] = u8::try_from(next(256))?;
        }
        let mut bytes = head.to_vec();
        bytes[16..].copy_from_slice(&crc32fast::hash(&state).to_le_bytes());
        bytes.extend(state);
        let (parts, _control, _bulk) = parts(arguments)?;
        let memory = File::open(MEMORY)?;
        let restored = Snapshot::from_bytes(&bytes)
            .and_then(|snapshot| Machine::restore(parts, snapshot, memory));
        match restored {
            Ok(mut machine) => {
                ran += 1;
                machine.start(false)?;
                machine.wait(Some(Duration::from_millis(20)));
                machine.stop();
            }
            Err(error) => {
                refused += 1;
                why.insert(error.to_string());
            }
        }
    }
    println!("rubbish: {refused} refused, {ran} ran");
    for error in why {
        println!("  {error}");
    }
    Ok(())
}

fn report(stage: &str, guest: &mut Guest) -> Result<()> {
    guest.control.write_all(b"report\n")?;
    loop {
        let line = guest.hear()?;
        if line == "." {
            break;
        }
        println!("{line}");
        if line.starts_with("complaint") {
            return Err(format!("{stage}: the kernel complains").into());
        }
    }
    for (what, count) in guest.machine.exits() {
        println!("  {count:6} {what}");
    }
    guest.control.write_all(b"off\n")?;
    match guest.machine.wait(Some(Duration::from_mins(1))) {
        Some(ending) => println!("{stage}: {ending}"),
        None => return Err("the guest does not switch itself off".into()),
    }
    Ok(())
}
