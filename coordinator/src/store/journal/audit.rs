//! The whole journal, row by row: which rows are not those that were written.
//!
//! SQLite's structure check, which every opening makes, vouches for keys, indexes
//! and types; the sums here for everything else in a row.

use std::collections::BTreeMap;
use std::fmt;

use rusqlite::Row;

use super::ratings::rating_sum;
use super::samples::ShardSum;
use super::training::{reference_sum, step_sum};
use super::{
    Commit, CommittedPhase, Epoch, Iteration, Journal, StoreError, commit_sum, counts_sum, schema,
};
use crate::domain::{PairId, PromptId, ShardId, Step};

/// A row, or a shard with its samples, whose bytes are not those that were written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Torn {
    /// The SQL that made a table or an index.
    Definition(String),
    /// The generation, which is lower than that of a start that was recorded.
    Generation,
    /// A commit, by its number; also one that is missing between others.
    Commit(i64),
    /// What a kind of thing came to.
    Counts(String),
    /// A shard or one of its samples.
    Shard(Iteration, ShardId),
    /// What the reward model says of a sample.
    Rating(Iteration, PromptId, u32),
    /// Reference log-probabilities of a pair.
    Reference(Iteration, PairId),
    /// A step. The epoch is that of the last intact step before it: it belongs to
    /// this one or to the next.
    Step(Iteration, Step, Epoch),
}

impl fmt::Display for Torn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Definition(name) => write!(f, "definition of {name}"),
            Self::Generation => f.write_str("table generation"),
            Self::Commit(number) => write!(f, "commit {number}"),
            Self::Counts(kind) => write!(f, "counts of {kind:?}"),
            Self::Shard(k, shard) => write!(f, "samples of shard {shard}, iteration {k}"),
            Self::Rating(k, prompt, index) => {
                write!(f, "rating of sample {index} of prompt {prompt}, iteration {k}")
            }
            Self::Reference(k, pair) => write!(f, "reference of pair {pair}, iteration {k}"),
            Self::Step(k, step, _) => write!(f, "step {step} of iteration {k}"),
        }
    }
}

/// How many rows there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rows {
    /// Committed phases.
    pub commits: u64,
    /// Samples of all iterations.
    pub samples: u64,
    /// Samples that a reward model rated.
    pub ratings: u64,
    /// Pairs with reference log-probabilities.
    pub references: u64,
    /// Training steps.
    pub steps: u64,
}

impl Journal {
    /// Reads every row and compares it with its sum. Returns what does not agree,
    /// and how much was read.
    ///
    /// # Errors
    /// A journal that cannot be read to its end.
    pub fn audit(&self) -> Result<(Vec<Torn>, Rows), StoreError> {
        let mut torn = Vec::new();
        let rows = Rows {
            commits: self.audit_commits(&mut torn)?,
            samples: self.audit_samples(&mut torn)?,
            ratings: self.audit_ratings(&mut torn)?,
            references: self.audit_references(&mut torn)?,
            steps: self.audit_steps(&mut torn)?,
        };
        self.audit_counts(&mut torn)?;
        self.audit_definitions(&mut torn)?;
        torn.sort();
        Ok((torn, rows))
    }

    /// The error that names a torn row.
    pub fn damaged_at(&self, torn: &Torn) -> StoreError {
        self.damaged(torn.to_string())
    }

    fn audit_commits(&self, torn: &mut Vec<Torn>) -> Result<u64, StoreError> {
        let rows = self.rows(
            "check the commits",
            "SELECT seq, iteration, phase, epoch, at, detail, sha256 FROM commits ORDER BY seq",
            [],
            |row| Ok((row.get::<_, i64>(0)?, intact_commit(row).unwrap_or(false))),
        )?;
        let mut next = 1;
        for &(seq, intact) in &rows {
            if seq != next {
                torn.push(Torn::Commit(next));
            }
            if !intact {
                torn.push(Torn::Commit(seq));
            }
            next = seq + 1;
        }
        torn.dedup();
        Ok(rows.len() as u64)
    }

    fn audit_counts(&self, torn: &mut Vec<Torn>) -> Result<(), StoreError> {
        let mut started = 0;
        self.rows("check the counts", "SELECT kind, json, sha256 FROM counts", [], |row| {
            let kind = String::from_utf8_lossy(row.get_ref(0)?.as_bytes()?).into_owned();
            let read = (|| Ok::<_, rusqlite::Error>((row.get(1)?, row.get(2)?)))();
            let intact = read.is_ok_and(|(text, sum): (String, Vec<u8>)| {
                counts_sum(&kind, &text)[..] == sum[..]
            });
            if let Some(generation) = kind.strip_prefix("start ").filter(|_| intact) {
                started = started.max(generation.parse().unwrap_or(0));
            }
            if !intact {
                torn.push(Torn::Counts(kind));
            }
            Ok(())
        })?;
        let generation: i64 = self
            .connection
            .query_row("SELECT value FROM generation", [], |row| row.get(0))
            .map_err(self.failed("check the generation"))?;
        if generation < started {
            torn.push(Torn::Generation);
        }
        Ok(())
    }

    fn audit_samples(&self, torn: &mut Vec<Torn>) -> Result<u64, StoreError> {
        let mut sums: BTreeMap<(u32, i64), (ShardSum, bool)> = BTreeMap::new();
        let mut samples = 0;
        self.rows(
            "check the samples",
            "SELECT iteration, shard, prompt, sample, tokens, finish FROM samples
             ORDER BY iteration, prompt, sample",
            [],
            |row| {
                samples += 1;
                let key: (u32, i64) = (row.get(0)?, row.get(1)?);
                let (sum, intact) = sums
                    .remove(&key)
                    .unwrap_or_else(|| (ShardSum::new(Iteration(key.0), key.1), true));
                let (tokens, finish) = (row.get_ref(4)?.as_bytes()?, row.get::<_, String>(5));
                let intact = intact && finish.is_ok();
                let finish = finish.unwrap_or_default();
                sums.insert(key, (sum.add(row.get(2)?, row.get(3)?, tokens, &finish), intact));
                Ok(())
            },
        )?;
        let mut damaged = |(k, shard): (u32, i64)| {
            torn.push(Torn::Shard(Iteration(k), ShardId(shard.cast_unsigned())));
        };
        self.rows(
            "check the shards",
            "SELECT iteration, shard, samples, sha256 FROM shards",
            [],
            |row| {
                let key: (u32, i64) = (row.get(0)?, row.get(1)?);
                let (expected, written): (i64, Vec<u8>) = (row.get(2)?, row.get(3)?);
                let (sum, intact) = sums
                    .remove(&key)
                    .unwrap_or_else(|| (ShardSum::new(Iteration(key.0), key.1), true));
                if !intact || sum.samples != expected || sum.sum.finish()[..] != written[..] {
                    damaged(key);
                }
                Ok(())
            },
        )?;
        sums.into_keys().for_each(damaged);
        Ok(samples)
    }

    fn audit_ratings(&self, torn: &mut Vec<Torn>) -> Result<u64, StoreError> {
        let rows = self.rows(
            "check ratings",
            "SELECT iteration, prompt, sample, rating, sha256 FROM ratings",
            [],
            |row| {
                let (k, prompt, index) = (Iteration(row.get(0)?), row.get(1)?, row.get(2)?);
                let read = (|| Ok::<_, rusqlite::Error>((row.get(3)?, row.get(4)?)))();
                let intact = read.is_ok_and(|(rating, sum): (_, Vec<u8>)| {
                    rating_sum(k, prompt, index, &rating)[..] == sum[..]
                });
                if !intact {
                    torn.push(Torn::Rating(k, PromptId(prompt.cast_unsigned()), index));
                }
                Ok(())
            },
        )?;
        Ok(rows.len() as u64)
    }

    fn audit_references(&self, torn: &mut Vec<Torn>) -> Result<u64, StoreError> {
        let rows = self.rows(
            "check reference log-probabilities",
            "SELECT iteration, pair, chosen, rejected, sha256 FROM reference",
            [],
            |row| {
                let (k, pair) = (Iteration(row.get(0)?), row.get(1)?);
                let read = (|| Ok::<_, rusqlite::Error>((row.get(2)?, row.get(3)?, row.get(4)?)))();
                let intact = read.is_ok_and(|(chosen, rejected, sum): (_, _, Vec<u8>)| {
                    reference_sum(k, pair, &chosen, &rejected)[..] == sum[..]
                });
                if !intact {
                    torn.push(Torn::Reference(k, PairId(pair.cast_unsigned())));
                }
                Ok(())
            },
        )?;
        Ok(rows.len() as u64)
    }

    fn audit_steps(&self, torn: &mut Vec<Torn>) -> Result<u64, StoreError> {
        let mut before = (Iteration(0), Epoch(0));
        let rows = self.rows(
            "check the steps",
            "SELECT iteration, step, epoch, metrics, sha256 FROM steps ORDER BY iteration, step",
            [],
            |row| {
                let (k, step) = (Iteration(row.get(0)?), row.get(1)?);
                if before.0 != k {
                    before = (k, Epoch(0));
                }
                let read = (|| Ok::<_, rusqlite::Error>((row.get(2)?, row.get(3)?, row.get(4)?)))();
                let intact = read.ok().and_then(|(epoch, text, sum): (u32, String, Vec<u8>)| {
                    let epoch = Epoch(epoch);
                    (step_sum(k, step, epoch, &text)[..] == sum[..]).then_some(epoch)
                });
                match intact {
                    Some(epoch) => before.1 = epoch,
                    None => torn.push(Torn::Step(k, Step(step.cast_unsigned()), before.1)),
                }
                Ok(())
            },
        )?;
        Ok(rows.len() as u64)
    }

    fn audit_definitions(&self, torn: &mut Vec<Torn>) -> Result<(), StoreError> {
        let failed = self.failed("check the tables' definitions");
        let found = schema::definitions(&self.connection).map_err(&failed)?;
        let expected = schema::expected_definitions().map_err(&failed)?;
        let names =
            expected.keys().chain(found.keys().filter(|name| !expected.contains_key(*name)));
        for name in names.filter(|name| found.get(*name) != expected.get(*name)) {
            torn.push(Torn::Definition(name.clone()));
        }
        Ok(())
    }
}

fn intact_commit(row: &Row<'_>) -> rusqlite::Result<bool> {
    let Some(phase) = CommittedPhase::parse(&row.get::<_, String>(2)?) else { return Ok(false) };
    let commit = Commit {
        iteration: Iteration(row.get(1)?),
        phase,
        epoch: row.get::<_, Option<u32>>(3)?.map(Epoch),
        at: row.get(4)?,
        detail: serde_json::Value::Null,
    };
    let (detail, sum): (String, Vec<u8>) = (row.get(5)?, row.get(6)?);
    Ok(commit_sum(&commit, &detail)[..] == sum[..])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::super::tests::{commit, flip, journal, sample};
    use super::*;
    use crate::domain::ReferenceLogps;

    #[test]
    fn every_table_is_read_and_each_torn_row_is_named() {
        let (dir, mut journal) = journal();
        let k = Iteration(1);
        let (first, second) = ([sample(0, 0, &[11, 303])], [sample(1, 0, &[404])]);
        journal.record_shard(k, ShardId(3), &first).unwrap();
        journal.record_shard(k, ShardId(4), &second).unwrap();
        let ratings =
            [(0, 1.25), (1, -7.125)].map(|(index, rating)| ((PromptId(9), index), rating));
        journal.record_ratings(k, &ratings.into()).unwrap();
        let logps = ReferenceLogps { chosen: -123.456, rejected: -654.321 };
        journal.record_reference(k, &[(PairId(7), logps)]).unwrap();
        for step in 0..4 {
            let metrics = json!({ "loss": format!("of-{step}") });
            journal.record_step(k, Epoch(u32::from(step > 1)), Step(step), &metrics).unwrap();
        }
        journal.record_counts("start 3", &json!({})).unwrap();
        journal.record_counts("inputs", &json!("fingerprint")).unwrap();
        for _ in 0..3 {
            journal.next_generations(1).unwrap();
        }
        journal.commit(&commit(0, CommittedPhase::Prepared, None)).unwrap();
        journal.commit(&commit(1, CommittedPhase::Sampled, None)).unwrap();
        let (torn, rows) = journal.audit().unwrap();
        assert_eq!(torn, []);
        assert_eq!(rows, Rows { commits: 2, samples: 2, ratings: 2, references: 1, steps: 4 });

        drop(journal);
        let path = dir.path().join("journal.sqlite");
        flip(&path, &303u32.to_le_bytes());
        flip(&path, &(-7.125f64).to_le_bytes());
        flip(&path, &(-654.321f64).to_le_bytes());
        flip(&path, b"of-0");
        flip(&path, b"of-2");
        flip(&path, b"fingerprint");
        flip(&path, b"\"pairs\":12");
        flip(&path, b"index among");
        let (journal, _) = Journal::open(&path).unwrap();
        let (torn, _) = journal.audit().unwrap();
        let told: Vec<_> = torn.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "definition of samples",
                "commit 2",
                "counts of \"inputs\"",
                "samples of shard 3, iteration 1",
                "rating of sample 1 of prompt 9, iteration 1",
                "reference of pair 7, iteration 1",
                "step 0 of iteration 1",
                "step 2 of iteration 1",
            ]
        );
        // The step after the last intact one of epoch 0 may belong to it.
        assert_eq!(torn[7], Torn::Step(k, Step(2), Epoch(0)));
    }

    #[test]
    fn a_missing_commit_and_a_generation_that_fell_are_told() {
        let (_dir, mut journal) = journal();
        for phase in [CommittedPhase::Prepared, CommittedPhase::Sampled, CommittedPhase::Paired] {
            journal.commit(&commit(1, phase, None)).unwrap();
        }
        journal.record_counts("start 2", &json!({})).unwrap();
        journal.connection.execute("DELETE FROM commits WHERE seq = 2", []).unwrap();
        assert_eq!(journal.audit().unwrap().0, [Torn::Generation, Torn::Commit(2)]);
    }

    #[test]
    fn a_sample_that_moved_to_another_shard_tears_both() {
        let (_dir, mut journal) = journal();
        let k = Iteration(1);
        journal.record_shard(k, ShardId(3), &[sample(0, 0, &[1])]).unwrap();
        journal.record_shard(k, ShardId(4), &[sample(1, 0, &[2])]).unwrap();
        journal.connection.execute("UPDATE samples SET shard = 4", []).unwrap();
        let torn = [Torn::Shard(k, ShardId(3)), Torn::Shard(k, ShardId(4))];
        assert_eq!(journal.audit().unwrap().0, torn);
    }
}
