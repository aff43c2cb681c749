//! `journal.sqlite`: what has happened in the run, in the order it happened.
//!
//! One connection writes; each call is one transaction and is durable when it
//! returns (write-ahead log, `synchronous=FULL`). The database is held in
//! exclusive locking mode, so that it needs no shared memory and works on the
//! network file systems of clusters; no other program can read it meanwhile
//! (`metrics.jsonl` is there for that).
//!
//! Damage is looked for where bytes are read: SQLite's own structure check when
//! the journal is opened, and a SHA-256 with every row. A write-ahead log whose
//! tail is torn ends where it is torn; the run then continues from the arrow
//! before, and does what it did again, to the same bytes.

mod audit;
mod checked;
mod copy;
mod discard;
mod files;
mod log;
mod ratings;
mod samples;
mod schema;
mod training;
mod writer;

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

use self::checked::RowSum;
use super::error::StoreError;
use super::manifest::Manifest;
use super::publish;
use crate::domain::{Epoch, Iteration};

pub use self::audit::{Rows, Torn};
pub use self::copy::JournalCopy;
pub use self::discard::Discard;
pub use self::files::{manifest_behind, manifest_of};
pub use self::log::torn_at;
pub use self::training::StepRecord;
pub use self::writer::{Entry, JournalWriter};

/// In the detail of [`CommittedPhase::Sampled`]: whether a reward model rates the samples
/// before they make pairs.
pub const TO_BE_RATED: &str = "to_be_rated";

/// What a run is: fixed when it begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunMeta {
    /// Name of the run.
    pub run_id: String,
    /// SHA-256 of `config.toml`, hexadecimal: a run continues under the
    /// configuration it began with.
    pub config_sha256: String,
    /// When it began, in seconds since 1970.
    pub created_at: f64,
    /// Version of DRIFT that began it.
    pub drift_version: String,
}

/// A phase whose result is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommittedPhase {
    /// The corpus is read and counted.
    Prepared,
    /// Every shard's samples are recorded.
    Sampled,
    /// What the reward model says of every sample is recorded.
    Rated,
    /// `pairs.parquet` is published.
    Paired,
    /// Every pair's reference log-probabilities are recorded.
    Scored,
    /// An epoch's steps are done and its snapshot is published.
    Trained,
    /// The held-out pairs are evaluated after an epoch.
    Evaluated,
    /// The iteration's checkpoint is published.
    Published,
    /// The run is over.
    Finished,
}

impl CommittedPhase {
    const ALL: [Self; 9] = [
        Self::Prepared,
        Self::Sampled,
        Self::Rated,
        Self::Paired,
        Self::Scored,
        Self::Trained,
        Self::Evaluated,
        Self::Published,
        Self::Finished,
    ];

    /// As the journal spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::Sampled => "sampled",
            Self::Rated => "rated",
            Self::Paired => "paired",
            Self::Scored => "scored",
            Self::Trained => "trained",
            Self::Evaluated => "evaluated",
            Self::Published => "published",
            Self::Finished => "finished",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.as_str() == text)
    }
}

impl fmt::Display for CommittedPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One committed arrow of the run.
#[derive(Debug, Clone, PartialEq)]
pub struct Commit {
    /// Which iteration.
    pub iteration: Iteration,
    /// Which phase is done.
    pub phase: CommittedPhase,
    /// Which epoch, where a phase has several.
    pub epoch: Option<Epoch>,
    /// When, in seconds since 1970.
    pub at: f64,
    /// What the phase leaves for those after it and for people: hashes, counts,
    /// seconds.
    pub detail: serde_json::Value,
}

/// The open journal.
#[derive(Debug)]
pub struct Journal {
    connection: Connection,
    path: PathBuf,
}

impl Journal {
    /// A new journal at `path`, holding `meta`. It appears there whole or not
    /// at all.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn create(path: &Path, meta: &RunMeta) -> Result<Self, StoreError> {
        schema::create(path, meta)?;
        Ok(Self::open(path)?.0)
    }

    /// The journal of a run that was begun before.
    ///
    /// # Errors
    /// [`StoreError::ForeignJournal`], [`StoreError::JournalTooNew`],
    /// [`StoreError::JournalDamaged`], or the operation that failed.
    pub fn open(path: &Path) -> Result<(Self, RunMeta), StoreError> {
        let connection = schema::open(path)?;
        let journal = Self { connection, path: path.to_owned() };
        let meta = journal.meta()?;
        Ok((journal, meta))
    }

    fn meta(&self) -> Result<RunMeta, StoreError> {
        let row = self.connection.query_row(
            "SELECT run_id, config_sha256, created_at, drift_version, sha256 FROM run",
            [],
            |row| {
                let meta = RunMeta {
                    run_id: row.get(0)?,
                    config_sha256: row.get(1)?,
                    created_at: row.get(2)?,
                    drift_version: row.get(3)?,
                };
                Ok((meta, row.get::<_, Vec<u8>>(4)?))
            },
        );
        let (meta, sum) = row.map_err(self.failed("read the run's identity"))?;
        self.check(schema::meta_sum(&meta), &sum, || "table run".to_owned())?;
        Ok(meta)
    }

    /// `count` numbers, one after the other, larger than any that this journal gave
    /// before, durably so. Those that are not used are left out.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn next_generations(&mut self, count: u32) -> Result<Range<u64>, StoreError> {
        let last: i64 = self
            .connection
            .query_row("UPDATE generation SET value = value + ?1 RETURNING value", [count], |row| {
                row.get(0)
            })
            .map_err(self.failed("raise the generation"))?;
        let end = last.cast_unsigned() + 1;
        Ok(end - u64::from(count)..end)
    }

    /// Records that a phase is done. Durable when this returns.
    ///
    /// # Errors
    /// [`StoreError::AlreadyCommitted`], or the operation that failed.
    pub fn commit(&mut self, commit: &Commit) -> Result<(), StoreError> {
        let detail = commit.detail.to_string();
        let epoch = commit.epoch.map(|epoch| epoch.0);
        let added = self
            .connection
            .execute(
                "INSERT INTO commits (seq, iteration, phase, epoch, at, detail, sha256)
                 VALUES ((SELECT count(*) + 1 FROM commits), ?1, ?2, ?3, ?4, ?5, ?6)
                 ON CONFLICT DO NOTHING",
                params![
                    commit.iteration.0,
                    commit.phase.as_str(),
                    epoch,
                    commit.at,
                    detail,
                    commit_sum(commit, &detail)
                ],
            )
            .map_err(self.failed("commit a phase"))?;
        if added == 0 {
            let phase = match epoch {
                Some(epoch) => format!("{} of epoch {epoch}", commit.phase),
                None => commit.phase.to_string(),
            };
            return Err(StoreError::AlreadyCommitted { iteration: commit.iteration, phase });
        }
        Ok(())
    }

    /// All commits, in the order they were made.
    ///
    /// # Errors
    /// [`StoreError::JournalDamaged`], or the operation that failed.
    pub fn commits(&self) -> Result<Vec<Commit>, StoreError> {
        let rows = self.rows(
            "read the commits",
            "SELECT seq, iteration, phase, epoch, at, detail, sha256 FROM commits ORDER BY seq",
            [],
            |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, u32>(1)?,
                    row.get::<_, String>(2)?,
                    row.get::<_, Option<u32>>(3)?,
                    row.get::<_, f64>(4)?,
                    row.get::<_, String>(5)?,
                    row.get::<_, Vec<u8>>(6)?,
                ))
            },
        )?;
        let mut commits = Vec::with_capacity(rows.len());
        for (expected, (seq, iteration, phase, epoch, at, text, sum)) in (1..).zip(rows) {
            let place = || format!("commit {expected}");
            let phase = CommittedPhase::parse(&phase).ok_or_else(|| self.damaged(place()))?;
            if seq != expected {
                return Err(self.damaged(place()));
            }
            let detail = self.json(&text, place)?;
            let (iteration, epoch) = (Iteration(iteration), epoch.map(Epoch));
            let commit = Commit { iteration, phase, epoch, at, detail };
            self.check(commit_sum(&commit, &text), &sum, place)?;
            commits.push(commit);
        }
        Ok(commits)
    }

    /// Records what a kind of thing came to ("corpus", "pairs of iteration 1",
    /// "start 3"), in place of an earlier record of that kind.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn record_counts(
        &mut self,
        kind: &str,
        json: &serde_json::Value,
    ) -> Result<(), StoreError> {
        put_counts(&self.connection, kind, json).map_err(self.failed("record counts"))
    }

    /// What was recorded, by kind.
    ///
    /// # Errors
    /// [`StoreError::JournalDamaged`], or the operation that failed.
    pub fn counts(&self) -> Result<Vec<(String, serde_json::Value)>, StoreError> {
        let rows = self.rows(
            "read counts",
            "SELECT kind, json, sha256 FROM counts ORDER BY kind",
            [],
            |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, Vec<u8>>(2)?))
            },
        )?;
        rows.into_iter()
            .map(|(kind, text, sum)| {
                let place = || format!("counts of {kind:?}");
                self.check(counts_sum(&kind, &text), &sum, place)?;
                let json = self.json(&text, place)?;
                Ok((kind, json))
            })
            .collect()
    }
}

fn put_counts(
    connection: &Connection,
    kind: &str,
    json: &serde_json::Value,
) -> rusqlite::Result<()> {
    let text = json.to_string();
    let mut insert = connection
        .prepare_cached("INSERT OR REPLACE INTO counts (kind, json, sha256) VALUES (?1, ?2, ?3)")?;
    insert.execute(params![kind, text, counts_sum(kind, &text)]).map(drop)
}

fn commit_sum(commit: &Commit, detail: &str) -> [u8; 32] {
    RowSum::of("commits")
        .integer(i64::from(commit.iteration.0))
        .bytes(commit.phase.as_str().as_bytes())
        .integer(commit.epoch.map_or(-1, |epoch| i64::from(epoch.0)))
        .real(commit.at)
        .bytes(detail.as_bytes())
        .finish()
}

fn counts_sum(kind: &str, json: &str) -> [u8; 32] {
    RowSum::of("counts").bytes(kind.as_bytes()).bytes(json.as_bytes()).finish()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
