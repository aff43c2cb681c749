//! Length and hash of files that are made once, so that a flipped bit in them is
//! found however little of it shows.

use std::collections::BTreeMap;

use super::{Journal, StoreError};
use crate::domain::{Epoch, Iteration, Step};
use crate::store::manifest::{FileEntry, MANIFEST};
use crate::store::names;

/// Before a file's name, where counts are recorded by kind.
const KIND: &str = "file ";

/// A file's name in [`Journal::files`] that vouches for the manifest of the folder
/// that an epoch ended with. The folder is a snapshot, and an iteration's last one
/// becomes its checkpoint.
pub fn manifest_of(k: Iteration, epoch: Epoch) -> String {
    format!("{}/{MANIFEST}", names::snapshot(k, epoch))
}

/// The same, of a snapshot inside an epoch.
pub fn manifest_behind(k: Iteration, step: Step) -> String {
    format!("{}/{MANIFEST}", names::step_snapshot(k, step))
}

impl Journal {
    /// Records a file by its name in the run directory, in place of what was
    /// recorded of it before.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn record_file(&mut self, name: &str, entry: &FileEntry) -> Result<(), StoreError> {
        self.record_counts(&format!("{KIND}{name}"), &serde_json::json!(entry))
    }

    /// The files that were recorded, by name.
    ///
    /// # Errors
    /// [`StoreError::JournalDamaged`], or the operation that failed.
    pub fn files(&self) -> Result<BTreeMap<String, FileEntry>, StoreError> {
        let mut files = BTreeMap::new();
        for (kind, json) in self.counts()? {
            if let Some(name) = kind.strip_prefix(KIND) {
                let entry = serde_json::from_value(json)
                    .map_err(|e| self.damaged(format!("counts of {kind:?}: {e}")))?;
                files.insert(name.to_owned(), entry);
            }
        }
        Ok(files)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tests::journal;
    use super::*;

    #[test]
    fn a_file_is_recorded_by_its_name_and_the_last_record_counts() {
        let (_dir, mut journal) = journal();
        journal.record_counts("inputs", &serde_json::json!("fingerprint")).unwrap();
        for bytes in [1, 2] {
            journal.record_file("summary.json", &FileEntry::new(bytes, &[7; 32])).unwrap();
        }
        let name = manifest_of(Iteration(1), Epoch(0));
        assert_eq!(name, "snapshots/01-epoch-0/manifest.json");
        journal.record_file(&name, &FileEntry::new(3, &[8; 32])).unwrap();
        let files: Vec<_> =
            journal.files().unwrap().into_iter().map(|(name, entry)| (name, entry.bytes)).collect();
        assert_eq!(files, [(name, 3), ("summary.json".to_owned(), 2)]);
    }
}
