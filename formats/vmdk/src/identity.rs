// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The content id: a number that changes with the contents, so that a snapshot notices
//! when the disk below it was written.

use crate::descriptor::{NO_PARENT, with_cid};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{BlockDevice, Error, Result, Span, Storage};

/// A number nobody can foresee, unlike those that mean something special.
pub(crate) fn random_cid() -> u32 {
    loop {
        let random = RandomState::new().build_hasher().finish();
        let cid = u32::try_from(random & u64::from(u32::MAX)).unwrap_or(0);
        if cid < NO_PARENT.saturating_sub(1) && cid != 0 {
            return cid;
        }
    }
}

/// Where the descriptor of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DescriptorPlace {
    /// It is the first file of the disk.
    File,
    /// It is embedded in a sparse extent.
    Embedded(Span),
    /// There is none.
    Nowhere,
}

/// The descriptor of a disk that is open for writing.
#[derive(Debug)]
pub(crate) struct Identity {
    storage: Arc<dyn Storage>,
    place: DescriptorPlace,
    cid: AtomicU32,
    changed: AtomicBool,
    turn: Mutex<()>,
}

impl Identity {
    pub(crate) fn new(storage: Arc<dyn Storage>, place: DescriptorPlace, cid: u32) -> Self {
        Self {
            storage,
            place,
            cid: AtomicU32::new(cid),
            changed: AtomicBool::new(false),
            turn: Mutex::new(()),
        }
    }

    /// The content id as it is now.
    pub(crate) fn cid(&self) -> u32 {
        self.cid.load(Ordering::Acquire)
    }

    /// Whether the disk was written.
    pub(crate) fn has_changed(&self) -> bool {
        self.changed.load(Ordering::Acquire)
    }

    /// Changes the id when it is called first: before anything else is written.
    pub(crate) fn touch(&self) -> Result<()> {
        if self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        let cid = random_cid();
        let (span, embedded) = match self.place {
            DescriptorPlace::File => (Span::new(0, self.storage.size()), None),
            DescriptorPlace::Embedded(span) => (span, Some(span)),
            DescriptorPlace::Nowhere => (Span::new(0, 0), None),
        };
        let mut text = vec![0; usize::try_from(span.len).unwrap_or(0)];
        self.storage.read_at(&mut text, span.start)?;
        if let Some(text) = with_cid(&text, cid) {
            store_text(&*self.storage, embedded, &text).map_err(|error| error.at(span.start))?;
            // A snapshot of the old contents must not fit to the new ones after a crash.
            self.storage.flush()?;
        }
        self.cid.store(cid, Ordering::Release);
        self.changed.store(true, Ordering::Release);
        Ok(())
    }
}

/// Replaces a descriptor: the `embedded` one, whose NUL bytes at the end give way, or the
/// whole file.
pub(crate) fn store_text(storage: &dyn Storage, embedded: Option<Span>, text: &[u8]) -> Result<()> {
    let Some(span) = embedded else {
        let len = u64::try_from(text.len()).unwrap_or(u64::MAX);
        if len > storage.size() {
            storage.set_len(len)?;
        }
        storage.write_at(text, 0)?;
        return if len < storage.size() { storage.set_len(len) } else { Ok(()) };
    };
    storage.write_at(&padded(span, text)?, span.start)
}

/// The bytes of the place `span` with the descriptor `text` in it.
pub(crate) fn padded(span: Span, text: &[u8]) -> Result<Vec<u8>> {
    let text = text.trim_ascii_end();
    let end = text.iter().rposition(|byte| *byte != 0).map_or(0, |last| last.saturating_add(1));
    let text = text.get(..end).unwrap_or_default();
    let mut bytes = vec![0; usize::try_from(span.len).unwrap_or(0)];
    // A NUL byte ends the text.
    let room = bytes.len().saturating_sub(2);
    match bytes.get_mut(..text.len()) {
        Some(place) if text.len() <= room => place.copy_from_slice(text),
        _ => {
            return Err(Error::unsupported(format!(
                "descriptor of {} bytes does not fit into the {} bytes that are reserved for it",
                text.len(),
                span.len
            )));
        }
    }
    if let Some(end) = bytes.get_mut(text.len()) {
        *end = b'\n';
    }
    Ok(bytes)
}
