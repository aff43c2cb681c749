//! Which state a damaged run goes back to: the last one whose grounds are all good.
//! Pure; whether something is good is asked.

use crate::domain::{Epoch, Iteration, ShardId, Step};
use crate::run::machine::{Extent, Position};
use crate::store::journal::{Discard, Torn};
use crate::store::{Commit, CommittedPhase};

/// Something durable that a run goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Ground {
    /// A published checkpoint.
    Checkpoint(Iteration),
    /// Training state at an epoch's end.
    Snapshot(Iteration, Epoch),
    /// The weights after an iteration's last epoch: its last snapshot, or the
    /// checkpoint that this was renamed into.
    Model(Iteration, Epoch),
    /// `pairs.parquet`, or all that it can be made again from.
    Pairs(Iteration),
    /// All samples of an iteration.
    Samples(Iteration),
    /// All that a reward model says of them.
    Ratings(Iteration),
    /// All its reference log-probabilities.
    References(Iteration),
    /// The steps of one epoch.
    Steps(Iteration, Epoch),
}

/// What a run at `position` goes on from.
pub(super) fn rests_on(extent: Extent, position: Position) -> Vec<Ground> {
    let mut grounds = Vec::new();
    let mut base = |k: Iteration| match k.0.checked_sub(1) {
        Some(0) if extent.warm_start_epochs == 0 => {}
        Some(before) => grounds.push(Ground::Checkpoint(Iteration(before))),
        None => {}
    };
    let (k, epochs) = match position {
        Position::Start => return grounds,
        Position::Finished => {
            grounds.push(Ground::Checkpoint(Iteration(extent.iterations)));
            return grounds;
        }
        Position::Sampling(k)
        | Position::Rating(k)
        | Position::Pairing(k)
        | Position::Scoring(k) => {
            base(k);
            (k, 0)
        }
        Position::Training(k, epoch) => {
            base(k);
            (k, epoch.0)
        }
        Position::Evaluating(k, epoch) if epoch < extent.last_epoch(k) => {
            base(k);
            (k, epoch.0 + 1)
        }
        // Its weights are those of the snapshot.
        Position::Evaluating(k, epoch) => (k, epoch.0 + 1),
        Position::Publishing(k) => (k, extent.epochs(k)),
    };
    if !matches!(position, Position::Sampling(_)) && k.0 > 0 {
        grounds.push(Ground::Samples(k));
        if !matches!(position, Position::Rating(_)) {
            grounds.push(Ground::Ratings(k));
        }
    }
    if !matches!(position, Position::Sampling(_) | Position::Rating(_) | Position::Pairing(_)) {
        grounds.push(Ground::Pairs(k));
        if matches!(position, Position::Training(..) | Position::Evaluating(..)) {
            grounds.push(Ground::References(k));
        }
    }
    grounds.extend((0..epochs).map(|epoch| Ground::Steps(k, Epoch(epoch))));
    if let Some(last) = epochs.checked_sub(1).map(Epoch) {
        let is_model = last == extent.last_epoch(k);
        grounds.push(if is_model { Ground::Model(k, last) } else { Ground::Snapshot(k, last) });
    }
    grounds
}

/// How many of the commits stand: as many as lead to a state whose grounds are all
/// good. With none of them the run starts anew, which rests on nothing here.
pub(super) fn standing(
    commits: &[Commit],
    extent: Extent,
    workers: u32,
    mut is_good: impl FnMut(Ground) -> bool,
) -> usize {
    let mut holds = |kept: usize| {
        let position = extent.position(kept.checked_sub(1).map(|last| &commits[last]), workers);
        // The journal's own first: files are read only where it is good.
        let mut grounds = rests_on(extent, position);
        grounds.sort_by_key(|ground| {
            !matches!(
                ground,
                Ground::Samples(_) | Ground::Ratings(_) | Ground::References(_) | Ground::Steps(..)
            )
        });
        grounds.into_iter().all(&mut is_good)
    };
    (1..=commits.len()).rev().find(|&kept| holds(kept)).unwrap_or(0)
}

/// What is to be forgotten, so that the run goes on at `position` after its first
/// `keep` of `had` commits; `None` where all that is there belongs to that state.
pub(super) fn forget(
    position: Position,
    keep: usize,
    had: usize,
    torn: &[Torn],
) -> Option<Discard> {
    let (k, steps_from, references) = match position {
        Position::Start => (Iteration(0), 0, true),
        // What is torn then is of iterations that are published.
        Position::Finished => return None,
        Position::Sampling(k)
        | Position::Rating(k)
        | Position::Pairing(k)
        | Position::Scoring(k) => (k, 0, true),
        Position::Training(k, epoch) => (k, epoch.0, false),
        Position::Evaluating(k, epoch) => (k, epoch.0 + 1, false),
        Position::Publishing(k) => (k, u32::MAX, false),
    };
    let ratings = matches!(position, Position::Start | Position::Sampling(_) | Position::Rating(_));
    let mut shards: Vec<ShardId> = Vec::new();
    let mut steps: Vec<Step> = Vec::new();
    let mut behind = keep < had;
    for torn in torn {
        match torn {
            Torn::Shard(of, shard) if *of == k => shards.push(*shard),
            Torn::Step(of, step, _) if *of == k => steps.push(*step),
            Torn::Rating(of, ..) if *of == k => behind |= ratings,
            Torn::Reference(of, _) if *of == k => behind |= references,
            Torn::Shard(of, _)
            | Torn::Rating(of, ..)
            | Torn::Step(of, ..)
            | Torn::Reference(of, _) => behind |= *of > k,
            Torn::Definition(_) | Torn::Generation | Torn::Commit(_) | Torn::Counts(_) => {}
        }
    }
    (behind || !shards.is_empty() || !steps.is_empty()).then_some(Discard {
        keep,
        iteration: k,
        shards,
        ratings,
        references,
        steps_from: Epoch(steps_from),
        steps,
    })
}

/// Iterations whose checkpoint is committed.
pub(super) fn published(commits: &[Commit]) -> impl DoubleEndedIterator<Item = Iteration> {
    let published = commits.iter().filter(|commit| commit.phase == CommittedPhase::Published);
    published.map(|commit| commit.iteration)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::{PairId, PromptId};
    use crate::store::TO_BE_RATED;

    const EXTENT: Extent = Extent { iterations: 2, warm_start_epochs: 2, epochs: 1 };
    const WORKERS: u32 = 2;
    const ZERO: Iteration = Iteration(0);
    const ONE: Iteration = Iteration(1);
    const TWO: Iteration = Iteration(2);

    fn run() -> Vec<Commit> {
        use CommittedPhase as C;
        let mut phases = vec![
            (0, C::Prepared, None),
            (0, C::Paired, None),
            (0, C::Scored, None),
            (0, C::Trained, Some(0)),
            (0, C::Evaluated, Some(0)),
            (0, C::Trained, Some(1)),
            (0, C::Evaluated, Some(1)),
            (0, C::Published, None),
        ];
        for k in [1, 2] {
            phases.extend([
                (k, C::Sampled, None),
                (k, C::Paired, None),
                (k, C::Scored, None),
                (k, C::Trained, Some(0)),
                (k, C::Evaluated, Some(0)),
                (k, C::Published, None),
            ]);
        }
        phases.push((2, C::Finished, None));
        let commit = |(k, phase, epoch): (u32, _, Option<u32>)| Commit {
            iteration: Iteration(k),
            phase,
            epoch: epoch.map(Epoch),
            at: 0.0,
            detail: json!({ "workers": WORKERS }),
        };
        phases.into_iter().map(commit).collect()
    }

    /// The state that the first `had` commits go back to without what is `bad`.
    fn back(had: usize, bad: &[Ground]) -> Position {
        let commits = &run()[..had];
        let kept = standing(commits, EXTENT, WORKERS, |ground| !bad.contains(&ground));
        EXTENT.position(kept.checked_sub(1).map(|last| &commits[last]), WORKERS)
    }

    #[test]
    fn a_run_with_nothing_damaged_stays_where_it_is() {
        for had in 0..=run().len() {
            assert_eq!(standing(&run()[..had], EXTENT, WORKERS, |_| true), had);
        }
    }

    #[test]
    fn a_lost_snapshot_costs_its_epoch() {
        let state = Ground::Snapshot(ZERO, Epoch(0));
        for had in [4, 5] {
            assert_eq!(back(had, &[state]), Position::Training(ZERO, Epoch(0)), "{had} commits");
        }
        // Behind its last epoch only the model counts.
        assert_eq!(back(6, &[state]), Position::Evaluating(ZERO, Epoch(1)));
        let model = Ground::Model(ZERO, Epoch(1));
        for had in [6, 7] {
            assert_eq!(back(had, &[model]), Position::Training(ZERO, Epoch(1)), "{had} commits");
        }
        assert_eq!(back(7, &[model, state]), Position::Training(ZERO, Epoch(0)));
    }

    #[test]
    fn a_lost_checkpoint_is_trained_again_from_the_one_before() {
        // Published, so its snapshots are gone.
        let lost = [Ground::Checkpoint(ONE), Ground::Model(ONE, Epoch(0))];
        for had in 14..=17 {
            assert_eq!(back(had, &lost), Position::Training(ONE, Epoch(0)), "{had} commits");
        }
        // The weights of iteration 2 are in a snapshot that is good: what the run goes
        // on from does not need the checkpoint before.
        assert_eq!(back(18, &lost), Position::Evaluating(TWO, Epoch(0)));
        let both = [lost[0], lost[1], Ground::Checkpoint(ZERO), Ground::Model(ZERO, Epoch(1))];
        assert_eq!(back(15, &both), Position::Training(ZERO, Epoch(1)));
        let all = [both[0], both[1], both[2], both[3], Ground::Snapshot(ZERO, Epoch(0))];
        assert_eq!(back(15, &all), Position::Training(ZERO, Epoch(0)));
    }

    #[test]
    fn rows_that_can_be_made_again_cost_the_phase_that_made_them() {
        assert_eq!(back(13, &[Ground::Samples(ONE)]), Position::Sampling(ONE));
        assert_eq!(back(12, &[Ground::Pairs(ONE)]), Position::Pairing(ONE));
        assert_eq!(back(12, &[Ground::References(ONE)]), Position::Scoring(ONE));
        assert_eq!(back(7, &[Ground::Steps(ZERO, Epoch(1))]), Position::Training(ZERO, Epoch(1)));
        assert_eq!(back(7, &[Ground::Steps(ZERO, Epoch(0))]), Position::Training(ZERO, Epoch(0)));
        // Nothing rests on these any more.
        assert_eq!(back(8, &[Ground::References(ZERO)]), Position::Sampling(ONE));
    }

    #[test]
    fn damaged_ratings_are_made_again_from_the_samples() {
        let commit = |phase| Commit {
            iteration: ONE,
            phase,
            epoch: None,
            at: 0.0,
            detail: json!({ TO_BE_RATED: true, "workers": WORKERS }),
        };
        use CommittedPhase::{Paired, Rated, Sampled, Scored};
        let commits = [Sampled, Rated, Paired, Scored].map(commit);
        for had in 2..=4 {
            let is_good = |ground| ground != Ground::Ratings(ONE);
            assert_eq!(standing(&commits[..had], EXTENT, WORKERS, is_good), 1, "{had} commits");
        }
        let position = EXTENT.position(Some(&commits[0]), WORKERS);
        assert_eq!(position, Position::Rating(ONE));
        let torn = [Torn::Rating(ONE, PromptId(3), 1)];
        let back = forget(position, 1, 3, &torn).unwrap();
        assert!(back.ratings && back.references && back.shards.is_empty());
        // Behind them, they stay.
        let position = Position::Pairing(ONE);
        assert!(!forget(position, 2, 3, &[]).unwrap().ratings);
        // Samples that are drawn again are rated again.
        assert!(forget(Position::Sampling(ONE), 0, 2, &[]).unwrap().ratings);
    }

    #[test]
    fn with_nothing_good_it_starts_anew() {
        let none = standing(&run(), EXTENT, WORKERS, |_| false);
        // The first phase after `prepared` rests on the model that the run began with.
        assert_eq!(none, 1);
        let cold = Extent { warm_start_epochs: 0, ..EXTENT };
        assert_eq!(rests_on(cold, Position::Sampling(ONE)), []);
    }

    #[test]
    fn files_are_asked_for_only_where_the_journal_is_good() {
        let mut asked = Vec::new();
        standing(&run()[..13], EXTENT, WORKERS, |ground| {
            asked.push(ground);
            ground != Ground::Steps(ONE, Epoch(0))
        });
        assert!(!asked.contains(&Ground::Model(ONE, Epoch(0))), "{asked:?}");
        assert_eq!(asked.last(), Some(&Ground::Pairs(ONE)));
    }

    #[test]
    fn what_is_forgotten_is_all_behind_the_state_and_what_is_torn() {
        let at = Position::Training(ONE, Epoch(0));
        assert_eq!(forget(at, 11, 11, &[]), None);
        assert_eq!(forget(at, 11, 11, &[Torn::Reference(ZERO, PairId(3))]), None);
        let back = forget(at, 11, 13, &[]).unwrap();
        assert_eq!((back.keep, back.iteration, back.steps_from), (11, ONE, Epoch(0)));
        assert!(!back.references && back.shards.is_empty());
        let torn = [
            Torn::Shard(ONE, ShardId(3)),
            Torn::Shard(TWO, ShardId(4)),
            Torn::Step(ONE, Step(2), Epoch(0)),
        ];
        let back = forget(Position::Sampling(ONE), 8, 8, &torn).unwrap();
        assert_eq!((back.shards, back.steps), (vec![ShardId(3)], vec![Step(2)]));
        assert!(back.references);
        let later = [Torn::Reference(TWO, PairId(0))];
        assert!(forget(Position::Sampling(ONE), 8, 8, &later).is_some());
        assert_eq!(forget(Position::Finished, 21, 21, &torn), None);
    }
}
