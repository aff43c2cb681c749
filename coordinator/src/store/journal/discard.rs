//! Going back: what was recorded after a state is forgotten, so that it is done again.

use rusqlite::params;
use serde_json::Value;

use super::checked::integer;
use super::{Journal, StoreError, counts_sum};
use crate::domain::{Epoch, Iteration, ShardId, Step};

/// What is forgotten. Of later iterations than the one in hand everything is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discard {
    /// So many commits stay: the first ones.
    pub keep: usize,
    /// The iteration in hand after them.
    pub iteration: Iteration,
    /// Shards of it whose samples go.
    pub shards: Vec<ShardId>,
    /// Whether its ratings go.
    pub ratings: bool,
    /// Whether its reference log-probabilities go.
    pub references: bool,
    /// Its steps go from this epoch on.
    pub steps_from: Epoch,
    /// Steps of it that go by their number, since their epoch cannot be believed.
    pub steps: Vec<Step>,
}

impl Journal {
    /// Forgets, all or nothing, and records `why` under `kind`.
    ///
    /// # Errors
    /// The operation that failed; the journal is then what it was.
    pub fn discard(&mut self, what: &Discard, kind: &str, why: &Value) -> Result<(), StoreError> {
        let failed = self.failed("go back to an earlier state");
        let k = what.iteration.0;
        let text = why.to_string();
        let numbers = |name, list: Vec<u64>| -> Result<Vec<i64>, StoreError> {
            list.into_iter().map(|number| integer(name, number)).collect()
        };
        let shards = numbers("shard", what.shards.iter().map(|shard| shard.0).collect())?;
        let steps = numbers("step", what.steps.iter().map(|step| step.0).collect())?;
        let keep = integer("number of commits", what.keep as u64)?;
        let transaction = self.connection.transaction().map_err(&failed)?;
        (|| {
            transaction.execute("DELETE FROM commits WHERE seq > ?1", [keep])?;
            for table in ["samples", "shards", "ratings", "reference", "steps"] {
                transaction.execute(&format!("DELETE FROM {table} WHERE iteration > ?1"), [k])?;
            }
            for shard in shards {
                for table in ["samples", "shards"] {
                    let sql = format!("DELETE FROM {table} WHERE iteration = ?1 AND shard = ?2");
                    transaction.execute(&sql, params![k, shard])?;
                }
            }
            if what.ratings {
                transaction.execute("DELETE FROM ratings WHERE iteration = ?1", [k])?;
            }
            if what.references {
                transaction.execute("DELETE FROM reference WHERE iteration = ?1", [k])?;
            }
            transaction.execute(
                "DELETE FROM steps WHERE iteration = ?1 AND epoch >= ?2",
                params![k, what.steps_from.0],
            )?;
            for step in steps {
                transaction.execute(
                    "DELETE FROM steps WHERE iteration = ?1 AND step = ?2",
                    params![k, step],
                )?;
            }
            transaction.execute(
                "INSERT OR REPLACE INTO counts (kind, json, sha256) VALUES (?1, ?2, ?3)",
                params![kind, text, counts_sum(kind, &text)],
            )
        })()
        .map_err(&failed)?;
        transaction.commit().map_err(&failed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::super::tests::{commit, journal, sample};
    use super::super::{CommittedPhase, Torn};
    use super::*;
    use crate::domain::{PairId, PromptId, ReferenceLogps};

    #[test]
    fn what_came_after_a_state_is_forgotten_and_what_it_rests_on_stays() {
        use CommittedPhase::{Evaluated, Paired, Published, Sampled, Scored, Trained};
        let (_dir, mut journal) = journal();
        for k in [0, 1, 2] {
            for (phase, epoch) in [
                (Sampled, None),
                (Paired, None),
                (Scored, None),
                (Trained, Some(0)),
                (Evaluated, Some(0)),
                (Trained, Some(1)),
                (Published, None),
            ] {
                journal.commit(&commit(k, phase, epoch)).unwrap();
            }
            let k = Iteration(k);
            for shard in [3, 4] {
                let samples = [sample(shard, 0, &[1])];
                journal.record_shard(k, ShardId(shard), &samples).unwrap();
            }
            journal.record_ratings(k, &[((PromptId(0), 0), 0.5)].into()).unwrap();
            let logps = ReferenceLogps { chosen: -1.0, rejected: -2.0 };
            journal.record_reference(k, &[(PairId(0), logps)]).unwrap();
            for step in 0..4 {
                let epoch = Epoch(u32::from(step > 1));
                journal.record_step(k, epoch, Step(step), &json!({})).unwrap();
            }
        }
        let one = Iteration(1);
        // After the first epoch of iteration 1.
        let back = Discard {
            keep: 12,
            iteration: one,
            shards: Vec::new(),
            ratings: false,
            references: false,
            steps_from: Epoch(1),
            steps: Vec::new(),
        };
        journal.discard(&back, "went back 1", &json!({ "to": 12 })).unwrap();
        let left = |journal: &Journal, k| {
            (
                journal.samples(Iteration(k)).unwrap().len(),
                journal.ratings(Iteration(k)).unwrap().len(),
                journal.reference(Iteration(k)).unwrap().len(),
                journal.steps(Iteration(k)).unwrap().len(),
            )
        };
        assert_eq!(journal.commits().unwrap().last().unwrap().phase, Evaluated);
        assert_eq!(
            [0, 1, 2].map(|k| left(&journal, k)),
            [(2, 1, 1, 4), (2, 1, 1, 2), (0, 0, 0, 0)]
        );
        assert_eq!(journal.counts().unwrap(), [("went back 1".into(), json!({ "to": 12 }))]);

        // While iteration 1 was sampled, and one shard of it is torn.
        let back = Discard {
            keep: 7,
            shards: vec![ShardId(3)],
            ratings: true,
            references: true,
            steps_from: Epoch(0),
            ..back
        };
        journal.discard(&back, "went back 2", &json!({ "to": 7 })).unwrap();
        assert_eq!([0, 1].map(|k| left(&journal, k)), [(2, 1, 1, 4), (1, 0, 0, 0)]);
        assert_eq!(journal.shards_done(one).unwrap(), [ShardId(4)]);
        assert_eq!(journal.audit().unwrap().0, []);
        journal.commit(&commit(1, Sampled, None)).unwrap();
    }

    #[test]
    fn a_step_whose_epoch_cannot_be_believed_goes_by_its_number() {
        let (_dir, mut journal) = journal();
        let k = Iteration(0);
        for step in 0..4 {
            let epoch = Epoch(u32::from(step > 1));
            journal.record_step(k, epoch, Step(step), &json!({})).unwrap();
        }
        journal.connection.execute("UPDATE steps SET epoch = 0 WHERE step = 3", []).unwrap();
        assert_eq!(journal.audit().unwrap().0, [Torn::Step(k, Step(3), Epoch(1))]);
        let back = Discard {
            keep: 0,
            iteration: k,
            shards: Vec::new(),
            ratings: false,
            references: false,
            steps_from: Epoch(1),
            steps: vec![Step(3)],
        };
        journal.discard(&back, "went back 1", &json!({})).unwrap();
        let left: Vec<_> = journal.steps(k).unwrap().iter().map(|step| step.step.0).collect();
        assert_eq!(left, [0, 1]);
    }
}
