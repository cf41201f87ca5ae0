// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One place for all disks of a program: each is held to a rate and counted from where it
//! is opened, and whoever works with it does not know.

use crate::{
    BlockDevice, Counts, Measured, PackedTarget, Rate, Statistics, Storage, Throttle, Throttled,
};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What disks are held to, and what they did. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    rate: Option<Rate>,
    counts: bool,
    disks: Arc<Mutex<Vec<Disk>>>,
}

#[derive(Debug)]
struct Disk {
    role: String,
    name: String,
    meter: DiskMeter,
}

/// The meter of one disk, for those who open it. The default one does nothing.
#[derive(Clone, Debug, Default)]
pub struct DiskMeter {
    throttle: Option<Throttle>,
    counted: Option<Counted>,
}

#[derive(Clone, Debug)]
struct Counted {
    disk: Measured<()>,
    files: Arc<Mutex<Vec<File>>>,
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    counted: Measured<()>,
}

/// The meter of one file of a disk. A file has no rate of its own.
#[derive(Clone, Debug, Default)]
pub struct FileMeter(Option<Measured<()>>);

/// What a disk did, as its user sees it, and what its files had to do for that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskStatistics {
    /// What it is for.
    pub role: String,
    /// What its user calls it.
    pub name: String,
    /// The disk in the image.
    #[serde(flatten)]
    pub disk: Statistics,
    /// The files that the image consists of or is based on, in the order in which they
    /// were opened.
    pub files: Vec<FileStatistics>,
}

/// What a file did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileStatistics {
    /// Where it is.
    pub path: PathBuf,
    /// What it did.
    #[serde(flatten)]
    pub file: Statistics,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Meter {
    /// Holds each disk to `rate`, if there is one, and counts if `counts` says so.
    pub fn new(rate: Option<Rate>, counts: bool) -> Self {
        Self { rate, counts, disks: Arc::default() }
    }

    /// Whether it holds disks to a rate or counts.
    pub fn is_active(&self) -> bool {
        self.rate.is_some() || self.counts
    }

    /// The meter of the disk called `name`. A disk that is opened again in the same role
    /// is the same.
    pub fn disk(&self, role: &str, name: &str) -> DiskMeter {
        if !self.is_active() {
            return DiskMeter::default();
        }
        let mut disks = locked(&self.disks);
        if let Some(known) = disks.iter().find(|disk| disk.role == role && disk.name == name) {
            return known.meter.clone();
        }
        let meter = DiskMeter::new(self.rate, self.counts);
        let (role, name) = (role.to_owned(), name.to_owned());
        disks.push(Disk { role, name, meter: meter.clone() });
        meter
    }

    /// What the disks did until now, in the order in which they were opened.
    pub fn statistics(&self) -> Vec<DiskStatistics> {
        let disks = locked(&self.disks);
        let told = disks.iter().filter_map(|disk| {
            let counted = disk.meter.counted.as_ref()?;
            let files = locked(&counted.files);
            let files = files.iter().map(|file| FileStatistics {
                path: file.path.clone(),
                file: file.counted.snapshot(),
            });
            Some(DiskStatistics {
                role: disk.role.clone(),
                name: disk.name.clone(),
                disk: counted.disk.snapshot(),
                files: files.collect(),
            })
        });
        told.collect()
    }
}

impl DiskMeter {
    /// The meter of a disk that no [`Meter`] knows: one whose figures go to another process.
    pub fn new(rate: Option<Rate>, counts: bool) -> Self {
        let counted = || Counted { disk: Measured::new(()), files: Arc::default() };
        Self { throttle: rate.map(Throttle::new), counted: counts.then(counted) }
    }

    /// What the disk is held to.
    pub fn rate(&self) -> Option<Rate> {
        self.throttle.as_ref().map(Throttle::rate)
    }

    /// Whether anything is counted.
    pub fn is_counted(&self) -> bool {
        self.counted.is_some()
    }

    /// The files that were counted so far.
    pub fn files(&self) -> Vec<PathBuf> {
        let Some(counted) = &self.counted else { return Vec::new() };
        locked(&counted.files).iter().map(|file| file.path.clone()).collect()
    }

    /// What was counted of the disk or of one of its files, if it is counted.
    pub fn counts(&self, file: Option<&Path>) -> Option<Counts> {
        self.measured(file).map(|measured| measured.counts())
    }

    /// Counts what another process has counted of the disk or of one of its files. Files that
    /// are not known are not counted.
    pub fn add(&self, file: Option<&Path>, counts: &Counts) {
        if let Some(measured) = self.measured(file) {
            measured.add(counts);
        }
    }

    fn measured(&self, file: Option<&Path>) -> Option<Measured<()>> {
        let counted = self.counted.as_ref()?;
        let Some(path) = file else { return Some(counted.disk.clone()) };
        let files = locked(&counted.files);
        files.iter().find(|known| known.path == path).map(|known| known.counted.clone())
    }

    /// The disk, held to the rate and counted. What it waits is not part of its latency.
    pub fn device(&self, device: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        let device = match &self.counted {
            Some(counted) => Arc::new(counted.disk.along(device)),
            None => device,
        };
        match &self.throttle {
            Some(throttle) => Arc::new(Throttled::new(device, throttle.clone())),
            None => device,
        }
    }

    /// The bytes of a file, for whom they are the disk.
    pub fn storage(&self, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        let storage = match &self.counted {
            Some(counted) => Arc::new(counted.disk.along(storage)),
            None => storage,
        };
        match &self.throttle {
            Some(throttle) => Arc::new(Throttled::new(storage, throttle.clone())),
            None => storage,
        }
    }

    /// A disk that is written once and compressed.
    pub fn packed(&self, target: Arc<dyn PackedTarget>) -> Arc<dyn PackedTarget> {
        let target = match &self.counted {
            Some(counted) => Arc::new(counted.disk.along(target)),
            None => target,
        };
        match &self.throttle {
            Some(throttle) => Arc::new(Throttled::new(target, throttle.clone())),
            None => target,
        }
    }

    /// The meter of the disk's file at `path`. A file that is opened again is the same.
    pub fn file(&self, path: &Path) -> FileMeter {
        let Some(counted) = &self.counted else { return FileMeter::default() };
        let mut files = locked(&counted.files);
        if let Some(known) = files.iter().find(|known| known.path == path) {
            return FileMeter(Some(known.counted.clone()));
        }
        let own = Measured::new(());
        files.push(File { path: path.to_owned(), counted: own.clone() });
        FileMeter(Some(own))
    }

    /// The files below `from` are below `to` now.
    pub fn moved(&self, from: &Path, to: &Path) {
        let Some(counted) = &self.counted else { return };
        for file in locked(&counted.files).iter_mut() {
            if let Ok(rest) = file.path.strip_prefix(from) {
                file.path = to.join(rest);
            }
        }
    }

    /// Counts zeroes that somebody had no need to write.
    pub fn note_zeroes_skipped(&self, bytes: u64) {
        if let Some(counted) = &self.counted {
            counted.disk.note_zeroes_skipped(bytes);
        }
    }
}

impl FileMeter {
    /// The file, counted.
    pub fn device(&self, file: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        match &self.0 {
            Some(counted) => Arc::new(counted.along(file)),
            None => file,
        }
    }

    /// The same, if it can be written.
    pub fn storage(&self, file: Arc<dyn Storage>) -> Arc<dyn Storage> {
        match &self.0 {
            Some(counted) => Arc::new(counted.along(file)),
            None => file,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;
    use std::num::NonZeroU64;
    use std::time::{Duration, Instant};

    fn disk() -> Arc<MemoryDevice> {
        Arc::new(MemoryDevice::new(vec![0; 100]))
    }

    #[test]
    fn a_disk_that_is_opened_again_is_counted_as_one() {
        let meter = Meter::new(None, true);
        for role in ["source", "source", "target"] {
            let own = meter.clone().disk(role, "a");
            own.device(disk()).read_at(&mut [0; 10], 0).unwrap();
            own.storage(disk()).write_at(&[0; 20], 0).unwrap();
            own.note_zeroes_skipped(7);
            let file = own.file(Path::new("f"));
            file.device(disk()).read_at(&mut [0; 3], 0).unwrap();
            file.storage(disk()).read_at(&mut [0; 4], 0).unwrap();
        }
        meter.disk("target", "a").file(Path::new("part/g"));
        meter.disk("target", "a").moved(Path::new("part"), Path::new("whole"));
        let told = meter.statistics();
        assert_eq!(told[1].files[1].path, Path::new("whole/g"));
        let numbers = told.iter().map(|told| {
            let DiskStatistics { role, name, disk, files } = told;
            let files: Vec<_> = files.iter().map(|file| file.file.reads.bytes).collect();
            let bytes = [disk.reads.bytes, disk.writes.bytes, disk.zeroes_skipped];
            (role.as_str(), name.as_str(), bytes, files)
        });
        let numbers: Vec<_> = numbers.collect();
        assert_eq!(
            numbers,
            [("source", "a", [20, 40, 14], vec![14]), ("target", "a", [10, 20, 7], vec![7, 0])]
        );
        let json = serde_json::to_value(&told).unwrap();
        assert_eq!(json[0]["reads"]["bytes"], 20);
        assert_eq!(json[1]["files"][0]["reads"]["operations"], 2);
    }

    #[test]
    fn every_disk_has_the_whole_rate_and_waiting_is_no_latency() {
        let rate = Rate { bytes: NonZeroU64::new(1000), operations: None };
        let meter = Meter::new(Some(rate), true);
        let begun = Instant::now();
        // The burst of a tenth of a second each: nobody waits.
        for name in ["a", "b", "c", "d"] {
            meter.disk("source", name).device(disk()).read_at(&mut [0; 100], 0).unwrap();
        }
        meter.disk("source", "a").device(disk()).read_at(&mut [0; 100], 0).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(100));
        assert!(meter.statistics()[0].disk.reads.max_microseconds < 90_000);
    }

    #[test]
    fn figures_of_another_process_are_added() {
        let meter = Meter::new(None, true);
        let here = meter.disk("image", "a");
        here.file(Path::new("f"));
        let there = DiskMeter::new(here.rate(), here.is_counted());
        there.device(disk()).read_at(&mut [0; 10], 0).unwrap();
        for (name, len) in [("f", 20), ("g", 30)] {
            there.file(Path::new(name)).device(disk()).read_at(&mut vec![0; len], 0).unwrap();
        }
        for file in [None, Some("f"), Some("g")].map(|name| name.map(Path::new)) {
            here.add(file, &there.counts(file).unwrap());
        }
        assert!(there.counts(Some(Path::new("h"))).is_none());
        let told = meter.statistics();
        assert_eq!(told[0].disk.reads.bytes, 10);
        // It was not this process' file.
        assert_eq!(here.files(), [Path::new("f")]);
        assert_eq!(told[0].files[0].file.reads.bytes, 20);
        assert!(DiskMeter::default().counts(None).is_none());
    }

    #[test]
    fn without_a_wish_nothing_is_put_around_a_disk() {
        let meter = Meter::default();
        let own: Arc<dyn BlockDevice> = disk();
        let same = meter.disk("source", "a").device(Arc::clone(&own));
        assert!(Arc::ptr_eq(&own, &same));
        assert!(meter.statistics().is_empty());
    }
}
