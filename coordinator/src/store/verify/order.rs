//! Whether the journal's commits make a run, and whether the files beside it say
//! that it once had more of them. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::{Epoch, Iteration};
use crate::store::journal::{Commit, CommittedPhase as Phase, TO_BE_RATED};

/// The first commit, by its index, that cannot follow the one before it.
pub(super) fn out_of_order(commits: &[Commit]) -> Option<usize> {
    (0..commits.len()).find(|&n| !follows(n.checked_sub(1).map(|n| &commits[n]), &commits[n]))
}

fn follows(before: Option<&Commit>, next: &Commit) -> bool {
    let Some(before) = before else { return next.phase == Phase::Prepared };
    let (k, epoch) = (next.iteration, next.epoch);
    let same = before.iteration == k;
    let after = |epoch: Option<Epoch>| epoch.map(|epoch| Epoch(epoch.0 + 1));
    let to_be_rated = before.detail[TO_BE_RATED] == true;
    match (before.phase, next.phase) {
        (Phase::Prepared, Phase::Paired) => k == Iteration(0),
        (Phase::Prepared, Phase::Sampled) => k == Iteration(1),
        (Phase::Published, Phase::Sampled) => k.0 == before.iteration.0 + 1,
        (Phase::Sampled, Phase::Rated) => same && to_be_rated,
        (Phase::Sampled, Phase::Paired) => same && !to_be_rated,
        (Phase::Rated, Phase::Paired)
        | (Phase::Paired, Phase::Scored)
        | (Phase::Evaluated, Phase::Published)
        | (Phase::Published, Phase::Finished) => same,
        (Phase::Scored, Phase::Trained) => same && epoch == Some(Epoch(0)),
        (Phase::Trained, Phase::Evaluated) => same && epoch == before.epoch,
        (Phase::Evaluated, Phase::Trained) => {
            same && epoch.is_some() && epoch == after(before.epoch)
        }
        _ => false,
    }
}

/// What the commits say of files.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct History {
    /// Iterations with a committed `pairs.parquet`, and how many rows it has.
    pub(super) paired: BTreeMap<Iteration, Option<u64>>,
    /// Iterations with a committed checkpoint.
    pub(super) published: BTreeSet<Iteration>,
    /// The last epoch that was trained in each.
    pub(super) trained: BTreeMap<Iteration, Epoch>,
    /// Whether the run is over.
    pub(super) finished: bool,
}

impl History {
    pub(super) fn of(commits: &[Commit]) -> Self {
        let mut history = Self::default();
        for commit in commits {
            let k = commit.iteration;
            match commit.phase {
                Phase::Paired => {
                    let count = |name: &str| commit.detail.get(name)?.as_u64();
                    let rows = count("train").zip(count("held_out"));
                    history.paired.insert(k, rows.map(|(train, held_out)| train + held_out));
                }
                Phase::Trained => {
                    history.trained.insert(k, commit.epoch.unwrap_or_default());
                }
                Phase::Published => {
                    history.published.insert(k);
                }
                Phase::Finished => history.finished = true,
                _ => {}
            }
        }
        history
    }

    /// The state that a run which is not over goes on from, if it is a snapshot.
    pub(super) fn needed_snapshot(&self) -> Option<(Iteration, Epoch)> {
        let (k, epoch) = self.trained.last_key_value()?;
        (!self.published.contains(k)).then_some((*k, *epoch))
    }
}

/// Something of a run that lies in its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Pairs(Iteration),
    Snapshot(Iteration, Epoch),
    Checkpoint(Iteration),
}

/// The commit without which `found` is never made, where the journal lacks it. A
/// run that dies may leave what its next commit would have told of, and no more.
pub(super) fn lost_commit(commits: &[Commit], found: Found) -> Option<String> {
    let has = |k: Iteration, phase, epoch: Option<Epoch>| {
        commits
            .iter()
            .any(|c| c.iteration == k && c.phase == phase && (epoch.is_none() || c.epoch == epoch))
    };
    let to_be_rated = |k| {
        let is_it = |c: &&Commit| c.iteration == k && c.phase == Phase::Sampled;
        commits.iter().find(is_it).is_some_and(|c| c.detail[TO_BE_RATED] == true)
    };
    let last_before_pairs = |k| if to_be_rated(k) { Phase::Rated } else { Phase::Sampled };
    let (k, phase, epoch) = match found {
        Found::Pairs(Iteration(0)) => (Iteration(0), Phase::Prepared, None),
        Found::Pairs(k) => (k, last_before_pairs(k), None),
        Found::Snapshot(k, Epoch(0)) => (k, Phase::Scored, None),
        Found::Snapshot(k, Epoch(n)) => (k, Phase::Evaluated, Some(Epoch(n - 1))),
        Found::Checkpoint(k) => (k, Phase::Evaluated, None),
    };
    (!has(k, phase, epoch)).then(|| match epoch {
        Some(epoch) => format!("{phase} of epoch {epoch}, iteration {k}"),
        None => format!("{phase} of iteration {k}"),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn commit(k: u32, phase: Phase, epoch: Option<u32>) -> Commit {
        let detail = json!({ "train": 5, "held_out": 2 });
        Commit { iteration: Iteration(k), phase, epoch: epoch.map(Epoch), at: 0.0, detail }
    }

    fn run() -> Vec<Commit> {
        [
            (0, Phase::Prepared, None),
            (0, Phase::Paired, None),
            (0, Phase::Scored, None),
            (0, Phase::Trained, Some(0)),
            (0, Phase::Evaluated, Some(0)),
            (0, Phase::Trained, Some(1)),
            (0, Phase::Evaluated, Some(1)),
            (0, Phase::Published, None),
            (1, Phase::Sampled, None),
            (1, Phase::Paired, None),
            (1, Phase::Scored, None),
            (1, Phase::Trained, Some(0)),
            (1, Phase::Evaluated, Some(0)),
            (1, Phase::Published, None),
            (1, Phase::Finished, None),
        ]
        .map(|(k, phase, epoch)| commit(k, phase, epoch))
        .into()
    }

    /// The same run, in which samples are rated.
    fn rated_run() -> Vec<Commit> {
        let mut commits = run();
        let sampled = commits.iter().position(|c| c.phase == Phase::Sampled).unwrap();
        commits[sampled].detail = json!({ TO_BE_RATED: true });
        commits.insert(sampled + 1, commit(1, Phase::Rated, None));
        commits
    }

    #[test]
    fn a_run_is_in_order_and_one_without_any_of_its_commits_is_not() {
        for run in [run(), rated_run()] {
            assert_eq!(out_of_order(&run), None);
            for lost in 0..run.len() - 1 {
                let mut commits = run.clone();
                commits.remove(lost);
                assert_eq!(out_of_order(&commits), Some(lost), "without commit {lost}");
            }
        }
        // A warm start may be skipped.
        let cold = [commit(0, Phase::Prepared, None), commit(1, Phase::Sampled, None)];
        assert_eq!(out_of_order(&cold), None);
    }

    #[test]
    fn what_a_run_goes_on_from_follows_from_its_commits() {
        let run = run();
        let history = History::of(&run);
        assert!(history.finished);
        assert_eq!(history.needed_snapshot(), None);
        assert_eq!(history.paired[&Iteration(1)], Some(7));
        let history = History::of(&run[..6]);
        assert_eq!(history.needed_snapshot(), Some((Iteration(0), Epoch(1))));
        assert_eq!(History::of(&run[..11]).needed_snapshot(), None, "training has not ended");
    }

    #[test]
    fn files_may_be_one_commit_ahead_of_the_journal_and_no_more() {
        let (run, k) = (run(), Iteration);
        for (found, made_after) in [
            (Found::Pairs(k(0)), 1),
            (Found::Snapshot(k(0), Epoch(0)), 3),
            (Found::Snapshot(k(0), Epoch(1)), 5),
            (Found::Checkpoint(k(0)), 7),
            (Found::Pairs(k(1)), 9),
            (Found::Snapshot(k(1), Epoch(0)), 11),
            (Found::Checkpoint(k(1)), 13),
        ] {
            assert_eq!(lost_commit(&run[..made_after], found), None, "{found:?}");
            // Of the two epochs of iteration 0, either evaluation vouches for a checkpoint.
            let early = if found == Found::Checkpoint(k(0)) { 4 } else { made_after - 1 };
            assert!(lost_commit(&run[..early], found).is_some(), "{found:?}");
        }
        let rated = rated_run();
        assert_eq!(lost_commit(&rated[..10], Found::Pairs(k(1))), None);
        let lost = lost_commit(&rated[..9], Found::Pairs(k(1)));
        assert_eq!(lost.unwrap(), "rated of iteration 1");
        assert_eq!(
            lost_commit(&[], Found::Snapshot(k(0), Epoch(1))).unwrap(),
            "evaluated of epoch 0, iteration 0"
        );
    }
}
