//! Reading rows with suspicion: sums of rows, and which errors mean damage.

use std::path::{Path, PathBuf};

use rusqlite::{ErrorCode, Params, Row};
use sha2::{Digest, Sha256};

use super::{Journal, Manifest, StoreError, publish};

/// SHA-256 over a row's columns, each with its length, and its table's name.
pub(super) struct RowSum(Sha256);

impl RowSum {
    pub(super) fn of(table: &str) -> Self {
        Self(Sha256::new()).bytes(table.as_bytes())
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    pub(super) fn integer(self, value: i64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A REAL as SQLite gives it back: without the sign of zero.
    pub(super) fn real(self, value: f64) -> Self {
        self.bytes(&(value + 0.0).to_le_bytes())
    }

    pub(super) fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// SQLite's integers are signed.
pub(super) fn integer(what: &'static str, value: u64) -> Result<i64, StoreError> {
    i64::try_from(value).map_err(|_| StoreError::TooLarge { what, value })
}

impl Journal {
    /// All rows of a query, or the error with what was being done.
    pub(super) fn rows<T>(
        &self,
        operation: &'static str,
        sql: &str,
        params: impl Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let mut query = self.connection.prepare_cached(sql).map_err(self.failed(operation))?;
        let rows = query.query_map(params, read).map_err(self.failed(operation))?;
        rows.collect::<rusqlite::Result<_>>().map_err(self.failed(operation))
    }

    /// Compares a row's sum with the one that was written with it.
    pub(super) fn check(
        &self,
        computed: [u8; 32],
        written: &[u8],
        place: impl FnOnce() -> String,
    ) -> Result<(), StoreError> {
        if computed == written { Ok(()) } else { Err(self.damaged(place())) }
    }

    pub(super) fn json(
        &self,
        text: &str,
        place: impl FnOnce() -> String,
    ) -> Result<serde_json::Value, StoreError> {
        serde_json::from_str(text).map_err(|e| self.damaged(format!("{}: {e}", place())))
    }

    pub(super) fn damaged(&self, place: String) -> StoreError {
        damaged(&self.path, place)
    }

    pub(super) fn failed(
        &self,
        operation: &'static str,
    ) -> impl Fn(rusqlite::Error) -> StoreError + use<> {
        failed(&self.path, operation)
    }
}

/// Tells damage from other failures of SQLite.
pub(super) fn failed(
    path: &Path,
    operation: &'static str,
) -> impl Fn(rusqlite::Error) -> StoreError + use<> {
    use rusqlite::Error;
    let path = path.to_owned();
    move |cause| {
        let is_damage = match &cause {
            Error::SqliteFailure(e, _) => {
                matches!(e.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
            }
            // Every column is typed: what cannot be read was not written by us.
            Error::FromSqlConversionFailure(..)
            | Error::IntegralValueOutOfRange(..)
            | Error::InvalidColumnType(..)
            | Error::Utf8Error(..)
            | Error::QueryReturnedNoRows => true,
            _ => false,
        };
        if is_damage {
            damaged(&path, format!("the place where it was to {operation} ({cause})"))
        } else {
            StoreError::Journal { operation, path: path.clone(), cause }
        }
    }
}

pub(super) fn damaged(path: &Path, place: String) -> StoreError {
    let intact = path.parent().and_then(last_intact_checkpoint);
    StoreError::JournalDamaged { path: path.to_owned(), place, intact }
}

/// The newest published checkpoint all of whose files have their hashes,
/// relative to the run directory. Reads gigabytes: only asked when the journal
/// cannot answer.
fn last_intact_checkpoint(root: &Path) -> Option<PathBuf> {
    let iterations = publish::list(&root.join("iterations")).ok()?;
    iterations.iter().rev().find_map(|entry| {
        let checkpoint = entry.path().join("checkpoint");
        Manifest::load(&checkpoint).ok()?.verify(&checkpoint).ok()?;
        checkpoint.strip_prefix(root).ok().map(Path::to_owned)
    })
}
