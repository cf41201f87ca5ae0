// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What checking an image's metadata finds, in the same words for every format.

/// Descriptions that a report keeps.
const MOST_DETAILS: usize = 1000;

/// What a check may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: look only.
    #[default]
    Nothing,
    /// Space that nothing refers to is given back.
    Leaks,
    /// Whatever can be mended without guessing at the guest's data.
    All,
}

/// What a check has found. Numbers of clusters mean the format's own unit: a cluster, a
/// block, a grain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions left in the image: data may be lost, or will be by writing.
    pub corruptions: u64,
    /// Clusters left that take space and belong to nothing.
    pub leaks: u64,
    /// Contradictions that were mended.
    pub corruptions_fixed: u64,
    /// Clusters that were given back.
    pub leaks_fixed: u64,
    /// Places that could not be looked at.
    pub check_errors: u64,
    /// What was found, in words; a very long list is cut.
    pub details: Vec<String>,
    /// Clusters that the virtual size has.
    pub total_clusters: u64,
    /// Clusters of the guest that are stored in the image.
    pub allocated_clusters: u64,
    /// Of these, those that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Of these, compressed ones.
    pub compressed_clusters: u64,
    /// The byte after the last one in use.
    pub image_end_offset: u64,
}

impl CheckReport {
    /// Counts a contradiction.
    pub fn corruption(&mut self, detail: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(1);
        self.note(detail);
    }

    /// Counts `clusters` that belong to nothing.
    pub fn leak(&mut self, clusters: u64, detail: impl FnOnce() -> String) {
        self.leaks = self.leaks.saturating_add(clusters);
        self.note(detail);
    }

    /// Keeps a description.
    pub fn note(&mut self, detail: impl FnOnce() -> String) {
        if self.details.len() < MOST_DETAILS {
            self.details.push(detail());
        }
    }

    /// Whether nothing is wrong with the image any more.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }
}
