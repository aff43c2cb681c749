//! Where a run stands, by what it has committed.

use std::collections::BTreeMap;

use crate::domain::{Epoch, Iteration, PairId, ReferenceLogps, ShardId, Step};
use crate::run::command::{ModelSource, SnapshotId};
use crate::run::plan::PairSize;
use crate::store::{Commit, CommittedPhase, TO_BE_RATED};

/// Pairs of the iteration in hand.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PairSets {
    /// Trained on, by rising id.
    pub train: Vec<PairSize>,
    /// Held out for evaluation.
    pub held_out: Vec<PairSize>,
}

impl PairSets {
    /// A pair that is trained on.
    pub(super) fn of_training(&self, id: PairId) -> Option<PairSize> {
        let at = self.train.binary_search_by_key(&id, |size| size.id).ok()?;
        Some(self.train[at])
    }
}

/// What a run that starts or resumes knows already.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Resume {
    /// Where it goes on.
    pub position: Position,
    /// Shards of the iteration in hand that are in the journal.
    pub shards_done: Vec<ShardId>,
    /// The iteration's pairs, from `Scoring` on.
    pub pairs: PairSets,
    /// Their reference log-probabilities, as far as they are in the journal.
    pub references: BTreeMap<PairId, ReferenceLogps>,
    /// Tokens that the iteration's finished steps trained on.
    pub tokens: u64,
    /// The step of the epoch in hand behind which there is a snapshot.
    pub after: Option<Step>,
}

impl Resume {
    /// Weights that workers must hold to go on, and the training state that goes on
    /// top of them, if any.
    pub fn needs(&self, extent: &Extent) -> (ModelSource, Option<SnapshotId>) {
        let (model, state) = extent.needs(self.position);
        match (self.position, self.after) {
            (Position::Training(k, _), Some(step)) => (model, Some(SnapshotId::After(k, step))),
            _ => (model, state),
        }
    }
}

/// The next thing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Position {
    /// Nothing is committed yet.
    #[default]
    Start,
    /// Draw fresh replies.
    Sampling(Iteration),
    /// Let a reward model rate them.
    Rating(Iteration),
    /// Build pairs.
    Pairing(Iteration),
    /// Compute reference log-probabilities.
    Scoring(Iteration),
    /// Train this epoch.
    Training(Iteration, Epoch),
    /// Evaluate after this epoch.
    Evaluating(Iteration, Epoch),
    /// Publish the checkpoint.
    Publishing(Iteration),
    /// All is done.
    Finished,
}

/// How many iterations and epochs a run has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// K: iterations after the warm start.
    pub iterations: u32,
    /// Epochs of the warm start; 0 where it is skipped.
    pub warm_start_epochs: u32,
    /// Epochs of each later iteration.
    pub epochs: u32,
}

impl Extent {
    /// Epochs of an iteration.
    pub fn epochs(&self, iteration: Iteration) -> u32 {
        if iteration.0 == 0 { self.warm_start_epochs } else { self.epochs }
    }

    /// The last epoch of an iteration.
    pub fn last_epoch(&self, iteration: Iteration) -> Epoch {
        Epoch(self.epochs(iteration).saturating_sub(1))
    }

    /// Where the run begins.
    pub fn first(&self) -> Position {
        if self.warm_start_epochs > 0 {
            Position::Pairing(Iteration(0))
        } else {
            Position::Sampling(Iteration(1))
        }
    }

    /// Where it goes after an iteration is published.
    pub fn after(&self, iteration: Iteration) -> Position {
        if iteration.0 < self.iterations {
            Position::Sampling(Iteration(iteration.0 + 1))
        } else {
            Position::Finished
        }
    }

    /// Where a run goes on after its last commit, with `workers` of them. Scores
    /// that another number of workers computed are not those that the first step
    /// will find, and its loss would not be ln 2: they are computed again.
    pub fn position(&self, last: Option<&Commit>, workers: u32) -> Position {
        let Some(last) = last else { return Position::Start };
        let k = last.iteration;
        let epoch = last.epoch.unwrap_or_default();
        match last.phase {
            CommittedPhase::Prepared => self.first(),
            CommittedPhase::Sampled if last.detail[TO_BE_RATED] == true => Position::Rating(k),
            CommittedPhase::Sampled | CommittedPhase::Rated => Position::Pairing(k),
            CommittedPhase::Paired => Position::Scoring(k),
            CommittedPhase::Scored if last.detail["workers"] != workers => Position::Scoring(k),
            CommittedPhase::Scored => Position::Training(k, Epoch(0)),
            CommittedPhase::Trained => Position::Evaluating(k, epoch),
            CommittedPhase::Evaluated if epoch < self.last_epoch(k) => {
                Position::Training(k, Epoch(epoch.0 + 1))
            }
            CommittedPhase::Evaluated => Position::Publishing(k),
            CommittedPhase::Published => self.after(k),
            CommittedPhase::Finished => Position::Finished,
        }
    }

    /// The policy at an iteration's start.
    pub fn start_of(&self, iteration: Iteration) -> ModelSource {
        match iteration.0.checked_sub(1) {
            Some(0) if self.warm_start_epochs == 0 => ModelSource::Base,
            Some(previous) => ModelSource::Checkpoint(Iteration(previous)),
            None => ModelSource::Base,
        }
    }

    /// Weights that workers must hold at a position, and the training state of an
    /// epoch's end that goes on top of them, if any.
    pub fn needs(&self, position: Position) -> (ModelSource, Option<SnapshotId>) {
        match position {
            Position::Start => (ModelSource::Base, None),
            Position::Sampling(k)
            | Position::Rating(k)
            | Position::Pairing(k)
            | Position::Scoring(k) => (self.start_of(k), None),
            Position::Training(k, epoch) => (
                self.start_of(k),
                epoch.0.checked_sub(1).map(|done| SnapshotId::EndOf(k, Epoch(done))),
            ),
            Position::Evaluating(k, epoch) if epoch < self.last_epoch(k) => {
                (self.start_of(k), Some(SnapshotId::EndOf(k, epoch)))
            }
            Position::Evaluating(k, epoch) => (ModelSource::Snapshot(k, epoch), None),
            Position::Publishing(k) => (ModelSource::Snapshot(k, self.last_epoch(k)), None),
            Position::Finished => (ModelSource::Base, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: Extent = Extent { iterations: 2, warm_start_epochs: 3, epochs: 1 };

    const WORKERS: u32 = 2;

    fn after(iteration: u32, phase: CommittedPhase, epoch: Option<u32>) -> Position {
        after_with(WORKERS, iteration, phase, epoch)
    }

    fn after_with(
        workers: u32,
        iteration: u32,
        phase: CommittedPhase,
        epoch: Option<u32>,
    ) -> Position {
        let commit = Some(Commit {
            iteration: Iteration(iteration),
            phase,
            epoch: epoch.map(Epoch),
            at: 0.0,
            detail: serde_json::json!({ "workers": WORKERS }),
        });
        EXTENT.position(commit.as_ref(), workers)
    }

    #[test]
    fn each_commit_leads_to_the_next_phase() {
        use CommittedPhase as C;
        let k = Iteration;
        assert_eq!(EXTENT.position(None, WORKERS), Position::Start);
        assert_eq!(after(0, C::Prepared, None), Position::Pairing(k(0)));
        assert_eq!(after(1, C::Sampled, None), Position::Pairing(k(1)));
        assert_eq!(after(1, C::Paired, None), Position::Scoring(k(1)));
        assert_eq!(after(0, C::Scored, None), Position::Training(k(0), Epoch(0)));
        assert_eq!(after(0, C::Trained, Some(1)), Position::Evaluating(k(0), Epoch(1)));
        assert_eq!(after(0, C::Evaluated, Some(1)), Position::Training(k(0), Epoch(2)));
        assert_eq!(after(0, C::Evaluated, Some(2)), Position::Publishing(k(0)));
        assert_eq!(after(1, C::Published, None), Position::Sampling(k(2)));
        assert_eq!(after(2, C::Published, None), Position::Finished);
    }

    #[test]
    fn what_is_to_be_rated_is_rated_before_it_makes_pairs() {
        let commit = |phase| Commit {
            iteration: Iteration(1),
            phase,
            epoch: None,
            at: 0.0,
            detail: serde_json::json!({ TO_BE_RATED: true }),
        };
        let position = |phase| EXTENT.position(Some(&commit(phase)), WORKERS);
        let k = Iteration(1);
        assert_eq!(position(CommittedPhase::Sampled), Position::Rating(k));
        assert_eq!(position(CommittedPhase::Rated), Position::Pairing(k));
        let start = (ModelSource::Checkpoint(Iteration(0)), None);
        assert_eq!(EXTENT.needs(Position::Rating(k)), start, "scoring needs them next");
    }

    #[test]
    fn what_another_number_of_workers_scored_is_scored_again() {
        use CommittedPhase as C;
        let k = Iteration(1);
        assert_eq!(after_with(3, 1, C::Scored, None), Position::Scoring(k));
        // What was trained rests on the scores it was trained with.
        assert_eq!(after_with(3, 1, C::Trained, Some(0)), Position::Evaluating(k, Epoch(0)));
        assert_eq!(after_with(3, 1, C::Paired, None), Position::Scoring(k));
        assert_eq!(after_with(3, 1, C::Sampled, None), Position::Pairing(k));
    }

    #[test]
    fn workers_get_the_weights_that_the_phase_began_with() {
        let k = Iteration;
        let checkpoint = |n| ModelSource::Checkpoint(k(n));
        assert_eq!(EXTENT.needs(Position::Pairing(k(0))), (ModelSource::Base, None));
        assert_eq!(EXTENT.needs(Position::Sampling(k(1))), (checkpoint(0), None));
        assert_eq!(
            EXTENT.needs(Position::Training(k(0), Epoch(2))),
            (ModelSource::Base, Some(SnapshotId::EndOf(k(0), Epoch(1))))
        );
        assert_eq!(
            EXTENT.needs(Position::Evaluating(k(0), Epoch(2))),
            (ModelSource::Snapshot(k(0), Epoch(2)), None)
        );
        let cold = Extent { warm_start_epochs: 0, ..EXTENT };
        assert_eq!(cold.first(), Position::Sampling(k(1)));
        assert_eq!(cold.needs(Position::Sampling(k(1))), (ModelSource::Base, None));
    }
}
