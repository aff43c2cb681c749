//! A journal to read without touching the run's: a copy of its two files.
//!
//! SQLite cannot open a database with a write-ahead log and leave both as they
//! are: the last one to close it merges them.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use super::{Journal, RunMeta, StoreError};
use crate::store::names::{JOURNAL, JOURNAL_LOG};

/// The log's header, with the salts that change each time it begins anew.
const HEADER: usize = 32;
/// A live coordinator begins its log anew every few thousand commits.
const ATTEMPTS: usize = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// An open copy. It goes when this value is dropped.
#[derive(Debug)]
pub struct JournalCopy {
    /// The copy; its errors name files of the copy's folder.
    pub journal: Journal,
    /// What the run is.
    pub meta: RunMeta,
    // After the journal, which is dropped first.
    _folder: tempfile::TempDir,
}

impl JournalCopy {
    /// Copies the journal of the run in `root` and opens the copy. Also while a
    /// coordinator writes it: the log is copied after the database, and if it did
    /// not begin anew in between, it has everything that the database may lack.
    ///
    /// # Errors
    /// As [`Journal::open`]; or the copy that failed.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let folder = tempfile::tempdir()
            .map_err(StoreError::io("make a folder in", std::env::temp_dir()))?;
        let (database, log) = (root.join(JOURNAL), root.join(JOURNAL_LOG));
        let (database_copy, log_copy) =
            (folder.path().join(JOURNAL), folder.path().join(JOURNAL_LOG));
        for attempt in 1.. {
            let before = header(&log)?;
            fs::copy(&database, &database_copy).map_err(StoreError::io("copy", &database))?;
            match fs::copy(&log, &log_copy) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let _ = fs::remove_file(&log_copy);
                }
                Err(e) => return Err(StoreError::io("copy", &log)(e)),
            }
            if header(&log_copy)? == before || attempt == ATTEMPTS {
                break;
            }
            std::thread::sleep(PAUSE);
        }
        let (journal, meta) = Journal::open(&database_copy)?;
        Ok(Self { journal, meta, _folder: folder })
    }
}

/// What the log begins with; nothing where there is none.
fn header(log: &Path) -> Result<Vec<u8>, StoreError> {
    let mut header = Vec::with_capacity(HEADER);
    match fs::File::open(log).and_then(|file| file.take(HEADER as u64).read_to_end(&mut header)) {
        Ok(_) => Ok(header),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(StoreError::io("read", log)(e)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::CommittedPhase;
    use super::super::tests::{commit, journal};
    use super::*;

    #[test]
    fn a_copy_is_read_while_the_journal_is_written_and_leaves_it_alone() {
        let (dir, mut journal) = journal();
        journal.commit(&commit(0, CommittedPhase::Prepared, None)).unwrap();
        let files = || -> Vec<_> {
            [JOURNAL, JOURNAL_LOG].map(|name| fs::read(dir.path().join(name)).unwrap()).into()
        };
        let before = files();
        let copy = JournalCopy::open(dir.path()).unwrap();
        assert_eq!(copy.journal.commits().unwrap().len(), 1);
        drop(copy);
        assert_eq!(files(), before);
        journal.commit(&commit(1, CommittedPhase::Prepared, None)).unwrap();
        assert_eq!(JournalCopy::open(dir.path()).unwrap().journal.commits().unwrap().len(), 2);
    }
}
