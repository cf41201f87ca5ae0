// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;
use crate::drive::Image;
use std::num::NonZeroU64;
use tranship_block::{BlockDevice, Counts, MemoryDevice, Meter, Rate};

const SERIAL: &str = "tranship-0";
const DISK: &str = "/nowhere/disk.raw";

/// A machine whose monitor is the test.
fn machine() -> (OwnMachine, Channel) {
    let mut command = Command::new("sleep");
    command.arg("60");
    let process = Process::start(command, Vec::new()).unwrap();
    let (here, there) = Channel::pair().unwrap();
    (OwnMachine::new(process, here, PathBuf::new()).unwrap(), there)
}

fn counted_disk(meter: &Meter) -> SpecDisk {
    let own = meter.disk("image", DISK);
    own.file(Path::new(DISK));
    let image = Image {
        path: DISK.into(),
        format: None,
        files: Arc::new(vec![(DISK.into(), false, tempfile::tempfile().unwrap())]),
        servers: Arc::default(),
        discard: false,
        meter: own,
    };
    SpecDisk {
        export: "disk0".into(),
        image: Some(Arc::new(image)),
        serial: SERIAL.into(),
        read_only: true,
        sector_size: 512,
        durable: false,
    }
}

/// What a disk has counted that has read so many bytes.
fn counts(bytes: usize) -> Counts {
    let meter = DiskMeter::new(None, true);
    let device = meter.device(Arc::new(MemoryDevice::new(vec![0; bytes])));
    device.read_at(&mut vec![0; bytes], 0).unwrap();
    meter.counts(None).unwrap()
}

/// Answers requests for the rest of the test, and gives them to it.
fn answering(
    line: Channel,
    answer: impl Fn(&Request) -> Message + Send + 'static,
) -> Receiver<Request> {
    let (sender, asked) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while let Ok(Some((request, _))) = line.receive::<Request>() {
            let answer = answer(&request);
            let _ = sender.send(request);
            line.send(&answer, &[]).unwrap();
        }
    });
    asked
}

#[test]
fn figures_are_fetched_once_for_each_disk_and_file() {
    let rate = Rate { bytes: NonZeroU64::new(1000), operations: None };
    let meter = Meter::new(Some(rate), true);
    let (machine, line) = machine();
    let asked = answering(line, |request| match request {
        Request::Count { file: None, .. } => Message::Counted(Box::new(counts(10))),
        Request::Count { .. } => Message::Counted(Box::new(counts(20))),
        _ => Message::Done,
    });
    machine.add_disk(&counted_disk(&meter)).unwrap();
    machine.remove_disk(SERIAL).unwrap();
    machine.add_disk(&counted_disk(&meter)).unwrap();
    machine.collect();
    machine.collect();
    let told = meter.statistics();
    assert_eq!(told[0].disk.reads.bytes, 20);
    assert_eq!((told[0].files.len(), told[0].files[0].file.reads.bytes), (1, 40));
    let asked: Vec<Request> = asked.try_iter().collect();
    assert!(
        matches!(&asked[0], Request::Add(new) if new.counts && new.rate == Some(rate)),
        "{asked:?}"
    );
    let questions = asked.iter().filter(|asked| matches!(asked, Request::Count { .. })).count();
    assert_eq!((questions, asked.len()), (4, 7));
}

#[test]
fn a_monitor_that_answers_something_else_is_not_counted() {
    for answer in [Message::Done, Message::Failed("no".into())] {
        let meter = Meter::new(None, true);
        let (machine, line) = machine();
        let _asked = answering(line, move |request| match request {
            Request::Count { .. } => answer.clone(),
            _ => Message::Done,
        });
        machine.add_disk(&counted_disk(&meter)).unwrap();
        machine.collect();
        assert_eq!(meter.statistics()[0].disk.reads.operations, 0);
    }
    // Figures are no answer to anything else.
    let (machine, line) = machine();
    let _asked = answering(line, |_| Message::Counted(Box::default()));
    assert_eq!(machine.remove_disk(SERIAL).unwrap_err().kind(), ErrorKind::Launch);
}

#[test]
fn a_monitor_that_never_stops_answering_is_not_listened_to() {
    let (machine, line) = machine();
    for _ in 0..100 {
        if line.send(&Message::Done, &[]).is_err() {
            break;
        }
    }
    // Some may be taken for answers to questions, as long as no two of them come between two
    // questions.
    assert!((0..50).any(|_| machine.remove_disk(SERIAL).is_err()));
}
