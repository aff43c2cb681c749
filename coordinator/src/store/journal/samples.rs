//! Samples of the policy: recorded a shard at a time, once.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::{OptionalExtension, Transaction, params};

use super::checked::{RowSum, failed, integer};
use super::{Journal, StoreError};
use crate::domain::{FinishReason, Iteration, PromptId, Sample, ShardId};

fn finish_str(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

fn parse_finish(text: &str) -> Option<FinishReason> {
    [FinishReason::Stop, FinishReason::Length].into_iter().find(|f| finish_str(*f) == text)
}

fn to_blob(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|id| id.to_le_bytes()).collect()
}

fn from_blob(blob: &[u8]) -> Option<Vec<u32>> {
    let (ids, rest) = blob.as_chunks::<4>();
    rest.is_empty().then(|| ids.iter().map(|id| u32::from_le_bytes(*id)).collect())
}

/// Sum over a shard's samples, which come in order of (prompt, index).
pub(super) struct ShardSum {
    pub(super) sum: RowSum,
    pub(super) samples: i64,
}

impl ShardSum {
    pub(super) fn new(iteration: Iteration, shard: i64) -> Self {
        let sum = RowSum::of("samples").integer(i64::from(iteration.0)).integer(shard);
        Self { sum, samples: 0 }
    }

    pub(super) fn add(self, prompt: i64, index: u32, tokens: &[u8], finish: &str) -> Self {
        let sum = self
            .sum
            .integer(prompt)
            .integer(i64::from(index))
            .bytes(tokens)
            .bytes(finish.as_bytes());
        Self { sum, samples: self.samples + 1 }
    }
}

impl Journal {
    /// Records a shard's samples, all or none. `false`, and nothing is added,
    /// when that shard or one of its (prompt, index) is recorded already.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn record_shard(
        &mut self,
        iteration: Iteration,
        shard: ShardId,
        samples: &[Sample],
    ) -> Result<bool, StoreError> {
        let failed = self.failed(RECORD);
        let path = self.path.clone();
        let mut transaction = self.connection.transaction().map_err(&failed)?;
        let is_new = put_shard(&mut transaction, &path, iteration, shard, samples)?;
        transaction.commit().map_err(&failed)?;
        Ok(is_new)
    }

    /// All samples of an iteration, by (prompt, index).
    ///
    /// # Errors
    /// [`StoreError::JournalDamaged`] naming the shard, or the operation that failed.
    pub fn samples(&self, iteration: Iteration) -> Result<Vec<Sample>, StoreError> {
        let rows = self.rows(
            "read samples",
            "SELECT prompt, sample, shard, tokens, finish FROM samples
             WHERE iteration = ?1 ORDER BY prompt, sample",
            [iteration.0],
            |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, u32>(1)?,
                    row.get::<_, i64>(2)?,
                    row.get::<_, Vec<u8>>(3)?,
                    row.get::<_, String>(4)?,
                ))
            },
        )?;
        let place = |shard: i64| format!("samples of shard {shard}, iteration {iteration}");
        let mut sums: BTreeMap<i64, ShardSum> = BTreeMap::new();
        let mut samples = Vec::with_capacity(rows.len());
        for (prompt, index, shard, blob, finish) in rows {
            let sum = sums.remove(&shard).unwrap_or_else(|| ShardSum::new(iteration, shard));
            sums.insert(shard, sum.add(prompt, index, &blob, &finish));
            let (Some(tokens), Some(finish), Ok(prompt)) =
                (from_blob(&blob), parse_finish(&finish), u64::try_from(prompt))
            else {
                return Err(self.damaged(place(shard)));
            };
            samples.push(Sample { prompt: PromptId(prompt), index, tokens, finish });
        }
        for (shard, expected, written) in self.shards(iteration)? {
            let sum = sums.remove(&shard).unwrap_or_else(|| ShardSum::new(iteration, shard));
            if sum.samples != expected {
                return Err(self.damaged(place(shard)));
            }
            self.check(sum.sum.finish(), &written, || place(shard))?;
        }
        match sums.into_keys().next() {
            Some(unknown) => Err(self.damaged(place(unknown))),
            None => Ok(samples),
        }
    }

    /// Shards of an iteration that are recorded, in order.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn shards_done(&self, iteration: Iteration) -> Result<Vec<ShardId>, StoreError> {
        let shards = self.shards(iteration)?;
        Ok(shards.into_iter().map(|(shard, ..)| ShardId(shard.cast_unsigned())).collect())
    }

    fn shards(&self, iteration: Iteration) -> Result<Vec<(i64, i64, Vec<u8>)>, StoreError> {
        self.rows(
            "read the shards",
            "SELECT shard, samples, sha256 FROM shards WHERE iteration = ?1 ORDER BY shard",
            [iteration.0],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
    }
}

const RECORD: &str = "record a shard's samples";

/// As [`Journal::record_shard`], as a part of a transaction.
pub(super) fn put_shard(
    transaction: &mut Transaction<'_>,
    path: &Path,
    iteration: Iteration,
    shard: ShardId,
    samples: &[Sample],
) -> Result<bool, StoreError> {
    let failed = failed(path, RECORD);
    let id = integer("shard", shard.0)?;
    let mut rows = samples
        .iter()
        .map(|s| {
            let prompt = integer("prompt", s.prompt.0)?;
            Ok((prompt, s.index, to_blob(&s.tokens), finish_str(s.finish)))
        })
        .collect::<Result<Vec<_>, StoreError>>()?;
    rows.sort_by_key(|(prompt, index, ..)| (*prompt, *index));
    let sum = rows
        .iter()
        .fold(ShardSum::new(iteration, id), |sum, row| sum.add(row.0, row.1, &row.2, row.3));
    let sum = sum.sum.finish();

    // Dropped, it takes back what was added since.
    let part = transaction.savepoint().map_err(&failed)?;
    let recorded: Option<Vec<u8>> = part
        .prepare_cached("SELECT sha256 FROM shards WHERE iteration = ?1 AND shard = ?2")
        .and_then(|mut query| {
            query.query_row(params![iteration.0, id], |row| row.get(0)).optional()
        })
        .map_err(&failed)?;
    if let Some(recorded) = recorded {
        if recorded != sum {
            tracing::warn!(%iteration, %shard, "a shard ran twice with different samples; the first ones stay");
        }
        return Ok(false);
    }
    part.prepare_cached("INSERT INTO shards VALUES (?1, ?2, ?3, ?4)")
        .and_then(|mut insert| insert.execute(params![iteration.0, id, rows.len() as i64, sum]))
        .map_err(&failed)?;
    {
        let mut insert = part
            .prepare_cached(
                "INSERT INTO samples VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO NOTHING",
            )
            .map_err(&failed)?;
        for (prompt, index, tokens, finish) in &rows {
            let added = insert
                .execute(params![iteration.0, prompt, index, id, tokens, finish])
                .map_err(&failed)?;
            if added == 0 {
                tracing::warn!(
                    %iteration, %shard, prompt, index,
                    "a sample is recorded already, by another shard; this shard adds nothing"
                );
                return Ok(false);
            }
        }
    }
    part.commit().map_err(&failed)?;
    Ok(true)
}
