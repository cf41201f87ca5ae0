// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens disks from descriptors: the process may open nothing itself.

use crate::channel::{NewDisk, NewServer, Source};
use crate::machine::Disk;
use crate::{Error, Result};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tranship_block::{BlockDevice, DiskMeter, Rate, Storage, Throttle, Throttled};
use tranship_formats::{Files, Given, GivenServer, NotedFile, OpenOptions, Spec};
use tranship_nbd::{ClientOptions, Dialer, Remote};
use tranship_qcow2::{CreateOptions, Qcow2};
use tranship_raw::{Access, RawFile};

type Opened = std::result::Result<Arc<dyn BlockDevice>, tranship_block::Error>;

/// Opens a disk whose descriptors have come with its description. What is thrown away is not
/// counted.
pub(super) fn open(disk: NewDisk, descriptors: Vec<OwnedFd>) -> Result<(Disk, DiskMeter)> {
    let refused = |message: String| Error::Disk { serial: disk.serial.clone(), message };
    let mut descriptors = descriptors.into_iter();
    let mut next = || {
        descriptors
            .next()
            .map(File::from)
            .ok_or_else(|| refused("it came without one of its descriptors".into()))
    };
    let meter = DiskMeter::new(disk.rate, disk.counts);
    let device = match &disk.source {
        Source::Raw => raw(next()?, Path::new(&disk.serial), disk.read_only)
            .map(|device| metered(device, &meter)),
        Source::Nbd { export } => {
            let stream = UnixStream::from(OwnedFd::from(next()?));
            nbd(stream, export, disk.read_only).map(|device| metered(device, &meter))
        }
        Source::Image { path, format, files, servers, discard } => {
            let mut given = Given::default();
            for (path, writable) in files {
                let (path, writable) = (path.clone(), *writable);
                given.files.push(NotedFile { path, writable, file: next()? });
            }
            for NewServer { name, connections } in servers {
                let dialer = Arc::new(Dialer::over(next()?.into()));
                let connections =
                    connections.iter().map(|moved| Ok((moved.clone(), next()?.into())));
                let connections = Mutex::new(connections.collect::<Result<_>>()?);
                given.servers.push(GivenServer { name: name.clone(), dialer, connections });
            }
            let overlay = if *discard { Some(next()?) } else { None };
            let read_only = disk.read_only || *discard;
            let image = image(path, format.as_deref(), given, read_only, &meter);
            match overlay {
                Some(file) => image.and_then(|image| over(image, file)),
                None => image,
            }
        }
    };
    let device = device.map_err(|error| refused(error.to_string()))?;
    let disk = Disk {
        device,
        serial: disk.serial,
        read_only: disk.read_only,
        durable: disk.durable,
        sector_size: disk.sector_size,
    };
    Ok((disk, meter))
}

fn metered(device: Arc<dyn BlockDevice>, meter: &DiskMeter) -> Arc<dyn BlockDevice> {
    in_sight(meter.device(device), meter)
}

/// What lies in a file as it is could be read past the disk, and would not be counted: a throttle
/// offers no such way, even one that everything may pass.
fn in_sight(device: Arc<dyn BlockDevice>, meter: &DiskMeter) -> Arc<dyn BlockDevice> {
    if !meter.is_counted() {
        return device;
    }
    Arc::new(Throttled::new(device, Throttle::new(Rate::default())))
}

fn raw(file: File, name: &Path, read_only: bool) -> Opened {
    let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
    Ok(Arc::new(RawFile::from_file(file, name, access)?))
}

fn nbd(stream: UnixStream, export: &str, read_only: bool) -> Opened {
    let options =
        ClientOptions { export: export.to_owned(), read_only, ..ClientOptions::default() };
    Ok(Arc::new(Remote::from_stream(stream, &options)?))
}

fn image(
    path: &Path,
    format: Option<&str>,
    given: Given,
    read_only: bool,
    meter: &DiskMeter,
) -> Opened {
    let options = OpenOptions {
        format: format.map(str::parse).transpose()?,
        read_only,
        meter: meter.clone(),
        files: Files::Given(Arc::new(given)),
        ..OpenOptions::default()
    };
    Ok(in_sight(tranship_formats::open_spec(&Spec::from_word(path)?, &options)?.device, meter))
}

/// What is written to `image` goes into the empty `file`.
fn over(image: Arc<dyn BlockDevice>, file: File) -> Opened {
    let name = PathBuf::from("overlay of a read-only disk");
    let storage: Arc<dyn Storage> = Arc::new(RawFile::from_file(file, name, Access::ReadWrite)?);
    tranship_qcow2::create(&*storage, &CreateOptions::new(image.size()))?;
    let options = tranship_qcow2::OpenOptions { backing: Some(image), ..Default::default() };
    Ok(Arc::new(Qcow2::open(storage, options)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::num::NonZeroU64;
    use std::time::{Duration, Instant};

    fn file(size: usize) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; size]).unwrap();
        OwnedFd::from(file)
    }

    /// A raw disk of 64 KiB, described as an image.
    fn raw_image(discard: bool, rate: Option<Rate>, counts: bool) -> (Disk, DiskMeter) {
        let path = PathBuf::from("/nowhere/disk.raw");
        let source = Source::Image {
            path: path.clone(),
            format: Some("raw".into()),
            files: vec![(path, false)],
            servers: Vec::new(),
            discard,
        };
        let (serial, read_only) = ("tranship-0".to_owned(), !discard);
        let new =
            NewDisk { serial, read_only, durable: true, sector_size: 512, rate, counts, source };
        let overlay = discard.then(|| file(0));
        open(new, [file(64 << 10)].into_iter().chain(overlay).collect()).unwrap()
    }

    /// Operations and bytes of reads, and bytes written, that one part of a disk has counted.
    fn told(meter: &DiskMeter, file: Option<&str>) -> [u64; 3] {
        let sum = DiskMeter::new(None, true);
        sum.add(None, &meter.counts(file.map(Path::new)).unwrap());
        let counts = serde_json::to_value(sum.counts(None).unwrap()).unwrap();
        let number = |kind: &str, what: &str| counts[kind][what].as_u64().unwrap();
        [number("reads", "operations"), number("reads", "bytes"), number("writes", "bytes")]
    }

    #[test]
    fn everything_that_is_read_is_counted_and_what_is_thrown_away_is_not() {
        let (disk, meter) = raw_image(false, None, true);
        // Otherwise it could be read from its file, which nobody would see.
        assert!(disk.device.file_range(0).is_none());
        disk.device.read_at(&mut [0; 4096], 512).unwrap();
        assert_eq!(told(&meter, None), [1, 4096, 0]);
        assert_eq!(told(&meter, Some("/nowhere/disk.raw"))[1], 4096);
        assert!(meter.counts(Some(Path::new("/nowhere/else"))).is_none());

        let (disk, meter) = raw_image(true, None, true);
        disk.device.write_at(&[1; 512], 0).unwrap();
        disk.device.flush().unwrap();
        let mut found = [0; 1024];
        disk.device.read_at(&mut found, 0).unwrap();
        assert_eq!((found[0], found[512]), (1, 7));
        assert_eq!(told(&meter, None)[2], 0);

        let (disk, meter) = raw_image(false, None, false);
        assert!(disk.device.file_range(0).is_some());
        assert!(meter.counts(None).is_none());
    }

    #[test]
    fn a_rate_holds_here_as_well() {
        let rate = Rate { bytes: NonZeroU64::new(100_000), operations: None };
        let (disk, meter) = raw_image(false, Some(rate), false);
        let begun = Instant::now();
        for _ in 0..8 {
            disk.device.read_at(&mut [0; 4096], 0).unwrap();
        }
        // 327 ms at the rate, of which 100 are the burst.
        assert!(begun.elapsed() >= Duration::from_millis(220));
        assert!(!meter.is_counted());
    }
}
