//! Making and opening the database: its identity, its version, its safety.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::{Connection, OpenFlags, params};

use super::checked::{RowSum, damaged, failed};
use super::{RunMeta, StoreError, publish};

/// "DRFT", at a fixed place in the file's header.
pub(super) const APPLICATION_ID: i32 = 0x4452_4654;
/// Raised when an older coordinator would misread the tables.
pub(super) const VERSION: i64 = 2;
const SCHEMA: &str = include_str!("schema.sql");
/// What version 2 added to it.
const RATINGS: &str = include_str!("ratings.sql");

pub(super) fn meta_sum(meta: &RunMeta) -> [u8; 32] {
    RowSum::of("run")
        .bytes(meta.run_id.as_bytes())
        .bytes(meta.config_sha256.as_bytes())
        .real(meta.created_at)
        .bytes(meta.drift_version.as_bytes())
        .finish()
}

/// Writes the empty database aside and gives it its name when it is whole.
pub(super) fn create(path: &Path, meta: &RunMeta) -> Result<(), StoreError> {
    publish::make_file(path, |aside| build(aside, meta).map_err(failed(aside, "create the tables")))
}

fn build(aside: &Path, meta: &RunMeta) -> rusqlite::Result<()> {
    let connection = Connection::open(aside)?;
    // A crash leaves a file without a name: nothing to roll back, so no file beside it.
    connection.pragma_update(None, "journal_mode", "MEMORY")?;
    connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    connection.pragma_update(None, "user_version", VERSION)?;
    connection.execute_batch(SCHEMA)?;
    connection.execute_batch(RATINGS)?;
    connection.execute(
        "INSERT INTO run VALUES (1, ?1, ?2, ?3, ?4, ?5)",
        params![
            meta.run_id,
            meta.config_sha256,
            meta.created_at,
            meta.drift_version,
            meta_sum(meta)
        ],
    )?;
    connection.close().map_err(|(_, cause)| cause)
}

/// The SQL that made each table and index of a database.
pub(super) fn definitions(connection: &Connection) -> rusqlite::Result<BTreeMap<String, String>> {
    let sql = "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL";
    let mut query = connection.prepare(sql)?;
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

/// The [`definitions`] of a new journal.
pub(super) fn expected_definitions() -> rusqlite::Result<BTreeMap<String, String>> {
    let fresh = Connection::open_in_memory()?;
    fresh.execute_batch(SCHEMA)?;
    fresh.execute_batch(RATINGS)?;
    definitions(&fresh)
}

pub(super) fn open(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection =
        Connection::open_with_flags(path, flags).map_err(failed(path, "open the file"))?;
    // Before anything else is believed: whose file this is, and how old.
    let ask =
        |pragma: &str| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    connection
        .pragma_update(None, "locking_mode", "EXCLUSIVE")
        .map_err(failed(path, "take the lock"))?;
    let application = ask("application_id").map_err(failed(path, "read the header"))?;
    if application == 0 && path.metadata().is_ok_and(|file| file.len() == 0) {
        return Err(damaged(path, "byte 0: the file is empty".to_owned()));
    }
    if application != i64::from(APPLICATION_ID) {
        return Err(StoreError::ForeignJournal {
            path: path.to_owned(),
            found: application as i32,
            expected: APPLICATION_ID,
        });
    }
    let found = ask("user_version").map_err(failed(path, "read the header"))?;
    if found > VERSION {
        return Err(StoreError::JournalTooNew { path: path.to_owned(), found, known: VERSION });
    }
    if found < 1 {
        return Err(damaged(
            path,
            format!("its header: schema version {found}, expected {VERSION}"),
        ));
    }
    configure(&connection).map_err(failed(path, "prepare for writing"))?;
    let structure: String = connection
        .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
        .map_err(failed(path, "check the structure"))?;
    if structure != "ok" {
        // SQLite's words begin with a line that names the database.
        let place = structure.lines().last().unwrap_or_default();
        return Err(damaged(path, place.to_owned()));
    }
    if found < VERSION {
        bring_up_to_date(&connection).map_err(failed(path, "add the tables of this version"))?;
    }
    Ok(connection)
}

/// A journal of version 1 gets the table that it lacks, all or nothing.
fn bring_up_to_date(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(&format!("BEGIN; {RATINGS} PRAGMA user_version = {VERSION}; COMMIT;"))
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "cell_size_check", true)
}
