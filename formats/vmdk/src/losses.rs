// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What was found to be unreadable while a disk was salvaged.

use std::sync::{Mutex, PoisonError};
use tranship_block::Error;

/// Descriptions that are kept.
const MOST: usize = 1000;

/// A list that readers of the disk add to.
#[derive(Debug, Default)]
pub(crate) struct Losses(Mutex<Vec<String>>);

impl Losses {
    /// Keeps the reason why bytes were replaced by zeroes.
    pub(crate) fn note(&self, error: &Error) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = error.to_string();
        if list.len() < MOST && !list.contains(&text) {
            list.push(text);
        }
    }

    /// The reasons so far.
    pub(crate) fn list(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
