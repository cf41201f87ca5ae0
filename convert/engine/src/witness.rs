// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Remembers what went wrong with a disk behind the appliance's back.
//!
//! Every failure of a disk is the same I/O error to the kernel in the appliance, and one of
//! a write that it had put off may reach no program at all. The first failure as it really
//! was is kept here, so that a full folder can be told from a damaged source, and neither
//! passes for a conversion.

use crate::Result;
use crate::disks::from_block;
use std::io::{IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{BlockDevice, Extent, Span, Zeroing};

type Outcome<T> = tranship_block::Result<T>;

/// A device that passes everything on and keeps the first failure of each direction.
#[derive(Debug)]
pub(crate) struct Witness {
    device: Arc<dyn BlockDevice>,
    /// What the appliance calls it: `sda`.
    name: String,
    read: Mutex<Option<tranship_block::Error>>,
    written: Mutex<Option<tranship_block::Error>>,
}

impl Witness {
    pub(crate) fn new(device: Arc<dyn BlockDevice>, name: String) -> Self {
        Self { device, name, read: Mutex::default(), written: Mutex::default() }
    }
}

/// Keeps a first failure and passes on one of the same kind.
fn keep<T>(kept: &Mutex<Option<tranship_block::Error>>, outcome: Outcome<T>) -> Outcome<T> {
    outcome.map_err(|error| {
        let passed_on = tranship_block::Error::new(error.kind(), error.to_string());
        kept.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        passed_on
    })
}

fn take(kept: &Mutex<Option<tranship_block::Error>>) -> Option<tranship_block::Error> {
    kept.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// The outcome of work on these disks, in view of what happened to them: a failed write
/// spoils the work in any case, a failed read explains its failure.
pub(crate) fn judge<T>(outcome: Result<T>, disks: &[Arc<Witness>]) -> Result<T> {
    let first = |kept: fn(&Witness) -> &Mutex<Option<tranship_block::Error>>| {
        disks.iter().find_map(|disk| Some((&disk.name, take(kept(disk))?)))
    };
    // A write reads what it changes in part only, so that its failure may be the source's.
    if let Some((name, error)) = first(|disk| &disk.written) {
        return Err(from_block(format!("keeping the changes of disk {name}"), error, true));
    }
    outcome.map_err(|failure| match first(|disk| &disk.read) {
        Some((name, error)) => {
            from_block(format!("reading disk {name} of the source"), error, true)
        }
        None => failure,
    })
}

impl BlockDevice for Witness {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn is_read_only(&self) -> bool {
        self.device.is_read_only()
    }

    fn preferred_block(&self) -> u32 {
        self.device.preferred_block()
    }

    fn sector_size(&self) -> u32 {
        self.device.sector_size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Outcome<()> {
        keep(&self.read, self.device.read_at(buf, offset))
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Outcome<()> {
        keep(&self.read, self.device.read_vectored_at(bufs, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Outcome<()> {
        keep(&self.written, self.device.write_at(buf, offset))
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Outcome<()> {
        keep(&self.written, self.device.write_vectored_at(bufs, offset))
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Outcome<()> {
        keep(&self.written, self.device.write_zeroes(span, mode))
    }

    fn discard(&self, span: Span) -> Outcome<()> {
        // A hint: nothing is lost where it is not taken, and the kernel stops giving it.
        self.device.discard(span)
    }

    fn extent_at(&self, offset: u64) -> Outcome<Extent> {
        keep(&self.read, self.device.extent_at(offset))
    }

    fn flush(&self) -> Outcome<()> {
        keep(&self.written, self.device.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, ErrorKind};
    use tranship_block::ErrorKind as BlockKind;

    /// Fails in the way that each call is told to.
    #[derive(Debug)]
    struct Broken(BlockKind);

    impl BlockDevice for Broken {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> Outcome<()> {
            Err(tranship_block::Error::new(self.0, "first"))
        }
        fn write_at(&self, _: &[u8], _: u64) -> Outcome<()> {
            Err(tranship_block::Error::new(self.0, "first"))
        }
        fn write_zeroes(&self, _: Span, _: Zeroing) -> Outcome<()> {
            Err(tranship_block::Error::new(BlockKind::Io, "later"))
        }
        fn extent_at(&self, _: u64) -> Outcome<Extent> {
            Err(tranship_block::Error::new(BlockKind::Io, "later"))
        }
        fn flush(&self) -> Outcome<()> {
            Ok(())
        }
    }

    fn witness(kind: BlockKind) -> Arc<Witness> {
        Arc::new(Witness::new(Arc::new(Broken(kind)), "sda".to_owned()))
    }

    fn failed() -> Result<()> {
        Err(Error::new(ErrorKind::Conversion, "mounting failed"))
    }

    #[test]
    fn a_failed_write_spoils_even_what_seems_well() {
        let disk = witness(BlockKind::NoSpace);
        disk.write_at(&[0], 0).unwrap_err();
        disk.write_zeroes(Span::new(0, 1), Zeroing::MayUnmap).unwrap_err();
        let error = judge(Ok(()), &[disk]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient);
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("first"), "{cause}");
    }

    #[test]
    fn a_failed_read_explains_a_failure_and_makes_none() {
        let disk = witness(BlockKind::Corrupt);
        disk.read_at(&mut [0], 0).unwrap_err();
        disk.extent_at(0).unwrap_err();
        judge(Ok(()), &[Arc::clone(&disk)]).unwrap();
        let error = judge(failed(), &[disk]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Input);
        assert_eq!(error.to_string(), "reading disk sda of the source");
    }

    #[test]
    fn without_a_failure_of_a_disk_nothing_changes() {
        let disks = [witness(BlockKind::Io)];
        disks[0].flush().unwrap();
        assert_eq!(judge(failed(), &disks).unwrap_err().kind(), ErrorKind::Conversion);
        judge(Ok(()), &disks).unwrap();
    }
}
