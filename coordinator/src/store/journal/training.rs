//! Reference log-probabilities and the metrics of training steps.

use std::path::Path;

use rusqlite::{Transaction, params};

use super::checked::{RowSum, failed, integer};
use super::{CommittedPhase, Journal, StoreError};
use crate::domain::{Epoch, Iteration, PairId, ReferenceLogps, Step};

/// A recorded training step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRecord {
    /// Counts from 0 within the iteration, across its epochs.
    pub step: Step,
    /// Which epoch it belongs to.
    pub epoch: Epoch,
    /// What it measured, under TRL's names.
    pub metrics: serde_json::Value,
}

const RECORD_REFERENCE: &str = "record reference log-probabilities";

/// As [`Journal::record_reference`], as a part of a transaction.
pub(super) fn put_reference(
    transaction: &Transaction<'_>,
    path: &Path,
    iteration: Iteration,
    pairs: &[(PairId, ReferenceLogps)],
) -> Result<usize, StoreError> {
    let failed = failed(path, RECORD_REFERENCE);
    let mut insert = transaction
        .prepare_cached("INSERT INTO reference VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING")
        .map_err(&failed)?;
    let mut added = 0;
    for (pair, logps) in pairs {
        let pair = integer("pair", pair.0)?;
        let (chosen, rejected) = (logps.chosen.to_le_bytes(), logps.rejected.to_le_bytes());
        let sum = reference_sum(iteration, pair, &chosen, &rejected);
        added +=
            insert.execute(params![iteration.0, pair, chosen, rejected, sum]).map_err(&failed)?;
    }
    Ok(added)
}

impl Journal {
    /// Records reference log-probabilities, all or none; a pair that has its own
    /// already keeps them. Returns how many were added.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn record_reference(
        &mut self,
        iteration: Iteration,
        pairs: &[(PairId, ReferenceLogps)],
    ) -> Result<usize, StoreError> {
        let failed = self.failed(RECORD_REFERENCE);
        let path = self.path.clone();
        let transaction = self.connection.transaction().map_err(&failed)?;
        let added = put_reference(&transaction, &path, iteration, pairs)?;
        transaction.commit().map_err(&failed)?;
        Ok(added)
    }

    /// Reference log-probabilities of an iteration, by pair; every bit as recorded.
    ///
    /// # Errors
    /// [`StoreError::JournalDamaged`] naming the pair, or the operation that failed.
    pub fn reference(
        &self,
        iteration: Iteration,
    ) -> Result<Vec<(PairId, ReferenceLogps)>, StoreError> {
        let rows = self.rows(
            "read reference log-probabilities",
            "SELECT pair, chosen, rejected, sha256 FROM reference
             WHERE iteration = ?1 ORDER BY pair",
            [iteration.0],
            |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, [u8; 8]>(1)?,
                    row.get::<_, [u8; 8]>(2)?,
                    row.get::<_, Vec<u8>>(3)?,
                ))
            },
        )?;
        rows.into_iter()
            .map(|(pair, chosen, rejected, sum)| {
                self.check(reference_sum(iteration, pair, &chosen, &rejected), &sum, || {
                    format!("reference of pair {pair}, iteration {iteration}")
                })?;
                let logps = ReferenceLogps {
                    chosen: f64::from_le_bytes(chosen),
                    rejected: f64::from_le_bytes(rejected),
                };
                Ok((PairId(pair.cast_unsigned()), logps))
            })
            .collect()
    }

    /// Goes back to before an iteration was scored: removes its reference
    /// log-probabilities and, where it is the last commit, the one that says they
    /// are complete. For when they must be computed anew.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn discard_scores(&mut self, iteration: Iteration) -> Result<(), StoreError> {
        let failed = self.failed("discard reference log-probabilities");
        let transaction = self.connection.transaction().map_err(&failed)?;
        transaction
            .execute("DELETE FROM reference WHERE iteration = ?1", [iteration.0])
            .map_err(&failed)?;
        transaction
            .execute(
                "DELETE FROM commits WHERE iteration = ?1 AND phase = ?2
                 AND seq = (SELECT max(seq) FROM commits)",
                params![iteration.0, CommittedPhase::Scored.as_str()],
            )
            .map_err(&failed)?;
        transaction.commit().map_err(&failed)
    }

    /// Records a step's metrics, in place of those of an earlier attempt at it:
    /// a run that continues from a snapshot does the steps after it again.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn record_step(
        &mut self,
        iteration: Iteration,
        epoch: Epoch,
        step: Step,
        metrics: &serde_json::Value,
    ) -> Result<(), StoreError> {
        let failed = self.failed("record a step");
        let number = integer("step", step.0)?;
        let text = metrics.to_string();
        let sum = step_sum(iteration, number, epoch, &text);
        let mut insert = self
            .connection
            .prepare_cached("INSERT OR REPLACE INTO steps VALUES (?1, ?2, ?3, ?4, ?5)")
            .map_err(&failed)?;
        insert.execute(params![iteration.0, number, epoch.0, text, sum]).map_err(&failed)?;
        Ok(())
    }

    /// The steps of an iteration, in order.
    ///
    /// # Errors
    /// [`StoreError::JournalDamaged`] naming the step, or the operation that failed.
    pub fn steps(&self, iteration: Iteration) -> Result<Vec<StepRecord>, StoreError> {
        let rows = self.rows(
            "read steps",
            "SELECT step, epoch, metrics, sha256 FROM steps WHERE iteration = ?1 ORDER BY step",
            [iteration.0],
            |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, u32>(1)?,
                    row.get::<_, String>(2)?,
                    row.get::<_, Vec<u8>>(3)?,
                ))
            },
        )?;
        rows.into_iter()
            .map(|(step, epoch, text, sum)| {
                let place = || format!("step {step} of iteration {iteration}");
                let epoch = Epoch(epoch);
                self.check(step_sum(iteration, step, epoch, &text), &sum, place)?;
                let metrics = self.json(&text, place)?;
                Ok(StepRecord { step: Step(step.cast_unsigned()), epoch, metrics })
            })
            .collect()
    }

    /// Removes the steps from `first` on: the run goes back to the snapshot
    /// before them.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn discard_steps(&mut self, iteration: Iteration, first: Step) -> Result<(), StoreError> {
        let first = integer("step", first.0)?;
        self.connection
            .execute(
                "DELETE FROM steps WHERE iteration = ?1 AND step >= ?2",
                params![iteration.0, first],
            )
            .map_err(self.failed("discard steps"))?;
        Ok(())
    }
}

pub(super) fn reference_sum(
    iteration: Iteration,
    pair: i64,
    chosen: &[u8; 8],
    rejected: &[u8; 8],
) -> [u8; 32] {
    RowSum::of("reference")
        .integer(i64::from(iteration.0))
        .integer(pair)
        .bytes(chosen)
        .bytes(rejected)
        .finish()
}

pub(super) fn step_sum(iteration: Iteration, step: i64, epoch: Epoch, metrics: &str) -> [u8; 32] {
    RowSum::of("steps")
        .integer(i64::from(iteration.0))
        .integer(step)
        .integer(i64::from(epoch.0))
        .bytes(metrics.as_bytes())
        .finish()
}
