// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Comparing a source with the checksums that came with it, beside other work.

use crate::disks::from_source;
use crate::{Error, ErrorKind, Event, Reporter, Request, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tranship_appliance::CancelToken;
use tranship_source::{Source, SourceKind};

/// Compares the manifest's checksums while `work` goes on; a mismatch stops both.
pub(crate) fn beside_verification<T>(
    request: &Request,
    source: &Source,
    reporter: &dyn Reporter,
    cancel: &CancelToken,
    work: impl FnOnce(&CancelToken) -> Result<T>,
) -> Result<T> {
    // Only OVF packages come with checksums.
    let has_checksums = matches!(source.kind, SourceKind::Ova | SourceKind::Ovf);
    if !request.verify_manifest || !has_checksums {
        return work(cancel);
    }
    // Stops the work if the checksums do not match, without pretending that the user did.
    let inner = CancelToken::default();
    let over = AtomicBool::new(false);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Passes the user's cancellation on to both sides until both are done.
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                if cancel.is_cancelled() {
                    inner.cancel();
                    stop.store(true, Ordering::SeqCst);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let checking = scope.spawn(|| {
            let progress = |done, total| {
                let event = Event::step("source.verify", "verifying checksums").at(done, total);
                reporter.report(&event);
            };
            let outcome = source.verify_manifest(&progress, &stop);
            if outcome.is_err() {
                inner.cancel();
            }
            outcome
        });
        let worked = work(&inner);
        if worked.is_err() {
            stop.store(true, Ordering::SeqCst);
        }
        let verified = checking.join();
        over.store(true, Ordering::SeqCst);
        match verified {
            Ok(Ok(notes)) => {
                for note in notes {
                    reporter.report(&Event::warning("source.manifest", note));
                }
                worked
            }
            // The work failed first and the verification was only told to stop.
            Ok(Err(error)) if error.kind() == tranship_source::ErrorKind::Cancelled => {
                worked.and_then(|_| Err(Error::new(ErrorKind::Interrupted, "interrupted")))
            }
            Ok(Err(error)) => Err(from_source("verifying the source".to_owned(), error)),
            Err(_) => Err(Error::new(ErrorKind::Conversion, "the verification ended abruptly")),
        }
    })
}
