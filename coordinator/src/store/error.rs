//! What can go wrong with the run directory: which file, which operation, and
//! what the reader can do about it.

use std::io;
use std::path::{Path, PathBuf};

use super::manifest::VerifyError;

/// Why the run directory could not be used.
///
/// Causes are part of the message, remedy included, so [`source`] is empty:
/// a printed chain says each thing once.
///
/// [`source`]: std::error::Error::source
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused an operation on a file.
    #[error("{operation} {}: {}{}", path.display(), describe(cause), io_remedy(cause))]
    Io {
        /// What was being done: "write", "sync", "rename".
        operation: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// An earlier write to the journal failed, and was told.
    #[error("the journal is closed: an earlier write to it failed")]
    JournalClosed,
    /// A new run was to start in a directory that has one.
    #[error(
        "{} holds a run already; continue it with --resume or choose another --run-dir",
        .0.display()
    )]
    HoldsRun(PathBuf),
    /// A new run was to start among files that are not a run's.
    #[error(
        "{} is not empty and holds no run (it contains {found:?}); choose a new or an empty --run-dir",
        root.display()
    )]
    Occupied {
        /// The directory.
        root: PathBuf,
        /// The first name in it that no run has.
        found: String,
    },
    /// A run was to continue where none is.
    #[error("no run in {}: {why}; check --run-dir, or start a new run without --resume", root.display())]
    NoRun {
        /// The directory.
        root: PathBuf,
        /// What is missing.
        why: String,
    },
    /// Another coordinator works in this directory.
    #[error(
        "{} is locked by a live coordinator ({holder}); wait for it or stop it first",
        root.display()
    )]
    Locked {
        /// The directory.
        root: PathBuf,
        /// What the holder wrote about itself: process id and host.
        holder: String,
    },
    /// `journal.sqlite` is some other program's database.
    #[error(
        "{} is another program's database (application id {found:#010x}, expected {expected:#010x}); choose another --run-dir",
        path.display()
    )]
    ForeignJournal {
        /// The database.
        path: PathBuf,
        /// Its application id.
        found: i32,
        /// DRIFT's.
        expected: i32,
    },
    /// A later DRIFT wrote this journal.
    #[error(
        "{} has schema version {found}, this coordinator knows up to {known}; continue the run with the version of drift that wrote it",
        path.display()
    )]
    JournalTooNew {
        /// The database.
        path: PathBuf,
        /// Its schema version.
        found: i64,
        /// The newest this program knows.
        known: i64,
    },
    /// The journal's bytes are not those that were written.
    #[error("{} is damaged at {place}; {}", path.display(), survivor(intact.as_deref()))]
    JournalDamaged {
        /// The database.
        path: PathBuf,
        /// Table and row, or what SQLite said.
        place: String,
        /// Last published checkpoint whose every file still has its hash,
        /// relative to the run directory.
        intact: Option<PathBuf>,
    },
    /// SQLite refused an operation.
    #[error("{operation} in {}: {cause}{}", path.display(), sqlite_remedy(cause))]
    Journal {
        /// What was being done.
        operation: &'static str,
        /// The database.
        path: PathBuf,
        /// What SQLite said.
        cause: rusqlite::Error,
    },
    /// An arrow of the run was to be committed a second time.
    #[error("iteration {iteration} has committed {phase} already; a phase is committed once")]
    AlreadyCommitted {
        /// Which iteration.
        iteration: crate::domain::Iteration,
        /// Which phase, with its epoch where it has one.
        phase: String,
    },
    /// A number does not fit the journal's 64-bit signed integers.
    #[error("{what} {value} is larger than the journal can hold ({})", i64::MAX)]
    TooLarge {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A file of the run is not what it should be.
    #[error("{}: {problem}; {remedy}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found, and where.
        problem: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A folder's files are not those of its manifest.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// A folder of that name is there, and differs, and the file system cannot
    /// exchange two folders in one operation.
    #[error(
        "{} exists with other contents, and this file system cannot exchange folders atomically ({cause}); move it away by hand, then run again with --resume",
        target.display()
    )]
    CannotExchange {
        /// The published folder.
        target: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

impl StoreError {
    /// Wraps an operating-system error with what was done to which path.
    pub(crate) fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io { operation, path, cause }
    }

    pub(crate) fn malformed(
        path: &Path,
        problem: impl Into<String>,
        remedy: &'static str,
    ) -> StoreError {
        Self::Malformed { path: path.to_owned(), problem: problem.into(), remedy }
    }
}

/// The system's message without "(os error 28)", in lower case.
fn describe(cause: &io::Error) -> String {
    let text = cause.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => cause.kind().to_string(),
    }
}

fn io_remedy(cause: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    match cause.kind() {
        Kind::StorageFull | Kind::QuotaExceeded => {
            "; free space there, then run again with --resume: nothing published is lost"
        }
        Kind::ReadOnlyFilesystem => {
            "; the file system is read-only: remount it or choose another --run-dir"
        }
        Kind::PermissionDenied => {
            "; give this user write permission there or choose another --run-dir"
        }
        Kind::Unsupported => {
            "; this file system lacks the operation: choose a --run-dir on another (Lustre needs the mount option flock)"
        }
        _ => "",
    }
}

fn sqlite_remedy(cause: &rusqlite::Error) -> &'static str {
    use rusqlite::ErrorCode as Code;
    match cause.sqlite_error_code() {
        Some(Code::DiskFull) => {
            "; free space there, then run again with --resume: nothing committed is lost"
        }
        Some(Code::ReadOnly | Code::PermissionDenied | Code::CannotOpen) => {
            "; give this user write permission on the run directory"
        }
        Some(Code::DatabaseBusy | Code::DatabaseLocked) => {
            "; another program holds the journal open: close it"
        }
        Some(Code::SystemIoFailure) => {
            "; the disk or its mount failed: check the system log, then run again with --resume"
        }
        _ => "",
    }
}

fn survivor(intact: Option<&Path>) -> String {
    match intact {
        Some(checkpoint) => format!(
            "the last published checkpoint {} is intact: restore the journal from a backup, or start a new run from that checkpoint",
            checkpoint.display()
        ),
        None => "no published checkpoint is intact: restore the journal from a backup, or start again in a new --run-dir".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_named_with_its_remedy() {
        let error =
            StoreError::io("write", "/runs/a/config.toml")(io::Error::from_raw_os_error(28));
        assert_eq!(
            error.to_string(),
            "write /runs/a/config.toml: no space left on device; free space there, then run again with --resume: nothing published is lost"
        );
        assert!(std::error::Error::source(&error).is_none(), "the cause would be printed twice");
    }

    #[test]
    fn a_damaged_journal_points_at_what_survives() {
        let error = StoreError::JournalDamaged {
            path: "journal.sqlite".into(),
            place: "samples of shard 3, iteration 1".into(),
            intact: Some("iterations/01/checkpoint".into()),
        };
        assert_eq!(
            error.to_string(),
            "journal.sqlite is damaged at samples of shard 3, iteration 1; the last published checkpoint iterations/01/checkpoint is intact: restore the journal from a backup, or start a new run from that checkpoint"
        );
    }
}
