//! Where a run stands, read from its directory.

use anyhow::{Context, Result};
use tracing::warn;

use crate::domain::{Epoch, Iteration, PairRow, Step};
use crate::run::machine::{Extent, PairSets, Position, Resume};
use crate::run::plan::PairSize;
use crate::store::journal::manifest_behind;
use crate::store::manifest::MANIFEST;
use crate::store::pairs::read_pairs;
use crate::store::{CommittedPhase, Journal, Manifest, RunDir, StepRecord};

/// What the journal and the files beside it say to a run of so many workers; and
/// the rows of the iteration in hand, where its pairs are built.
pub(super) fn resume(
    run: &RunDir,
    journal: &mut Journal,
    extent: Extent,
    workers: u32,
) -> Result<(Resume, Vec<PairRow>)> {
    let commits = journal.commits().context("read the journal's commits")?;
    let mut position = extent.position(commits.last(), workers);
    let mut after = None;
    if let Some(last) = commits.last() {
        let k = last.iteration;
        // What is trained behind its scores rests on them, however many computed them.
        let training = match position {
            Position::Training(_, epoch) => Some(epoch),
            _ if last.phase == CommittedPhase::Scored => Some(Epoch(0)),
            _ => None,
        };
        if let Some(epoch) = training {
            after = whole_snapshot(run, journal, k, epoch)?;
            position = after.map_or(position, |_| Position::Training(k, epoch));
        } else if let Position::Sampling(k)
        | Position::Rating(k)
        | Position::Pairing(k)
        | Position::Scoring(k) = position
        {
            run.prune_step_snapshots(k, None)?;
        }
    }
    let mut resume = Resume { position, after, ..Resume::default() };
    let mut rows = Vec::new();
    let with_pairs = match position {
        Position::Sampling(k) => {
            resume.shards_done = journal.shards_done(k)?;
            None
        }
        // Rated anew as a whole.
        Position::Rating(k) => {
            journal.discard_ratings(k)?;
            None
        }
        // Scored anew as a whole, in the passes that training will use.
        Position::Scoring(k) => {
            journal.discard_scores(k)?;
            Some((k, None))
        }
        Position::Training(k, epoch) => Some((k, Some(epoch))),
        Position::Evaluating(k, epoch) => Some((k, Some(Epoch(epoch.0 + 1)))),
        Position::Publishing(k) => Some((k, Some(Epoch(extent.last_epoch(k).0 + 1)))),
        Position::Start | Position::Pairing(_) | Position::Finished => None,
    };
    if let Some((k, epoch)) = with_pairs {
        rows = read_pairs(&run.pairs(k))?;
        resume.pairs = sizes(&rows);
        resume.references = journal.reference(k)?.into_iter().collect();
        if let Some(next) = epoch {
            forget_steps(journal, k, next, &mut resume)?;
        }
    }
    Ok((resume, rows))
}

/// The last step of the epoch behind which there is a whole snapshot. One that is
/// damaged is told of and left where it is.
fn whole_snapshot(
    run: &RunDir,
    journal: &Journal,
    k: Iteration,
    epoch: Epoch,
) -> Result<Option<Step>> {
    let snapshots = run.step_snapshots(k)?;
    if snapshots.is_empty() {
        return Ok(None);
    }
    let steps = journal.steps(k)?;
    // Every step before it must be in the journal: their metrics are published.
    let follows = |step: Step| {
        let behind = steps.iter().take_while(|s| s.step <= step);
        behind.clone().zip(0..).all(|(s, n)| s.step.0 == n)
            && behind.last().is_some_and(|s| s.step == step && s.epoch == epoch)
    };
    let files = journal.files()?;
    for step in snapshots.into_iter().filter(|&step| follows(step)) {
        let folder = run.step_snapshot(k, step);
        let Some(manifest) = files.get(&manifest_behind(k, step)) else { continue };
        let whole = manifest
            .verify(&folder.join(MANIFEST))
            .and_then(|()| Manifest::load(&folder))
            .and_then(|manifest| manifest.verify(&folder));
        match whole {
            Ok(()) => return Ok(Some(step)),
            Err(error) => warn!(%error, "leave a damaged snapshot alone; go on from before it"),
        }
    }
    Ok(None)
}

/// Drops the steps of `next`, the first epoch that is not trained to its end, behind
/// its snapshot, and counts the tokens of those that stand.
fn forget_steps(
    journal: &mut Journal,
    k: Iteration,
    next: Epoch,
    resume: &mut Resume,
) -> Result<()> {
    let steps = journal.steps(k)?;
    let after = resume.after;
    let stands = |step: &StepRecord| step.epoch < next || after.is_some_and(|s| step.step <= s);
    if let Some(first) = steps.iter().find(|step| !stands(step)) {
        journal.discard_steps(k, first.step)?;
    }
    resume.tokens = steps
        .iter()
        .rfind(|step| stands(step))
        .and_then(|step| step.metrics.get("num_tokens")?.as_u64())
        .unwrap_or(0);
    Ok(())
}

/// What planning needs of the rows.
pub(super) fn sizes(rows: &[PairRow]) -> PairSets {
    let size = |row: &PairRow| PairSize {
        id: row.tokens.id,
        tokens: row.tokens.packed_len(),
        chosen: row.tokens.chosen.len(),
        rejected: row.tokens.rejected.len(),
    };
    let of = |held_out| rows.iter().filter(|r| r.held_out == held_out).map(size).collect();
    PairSets { train: of(false), held_out: of(true) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::{FinishReason, PairId, PromptId, ReferenceLogps, Side, TokenPair};
    use crate::store::pairs::write_pairs;
    use crate::store::{Commit, CommittedPhase, RunMeta};

    const EXTENT: Extent = Extent { iterations: 1, warm_start_epochs: 0, epochs: 1 };
    const K: Iteration = Iteration(1);

    fn row(n: u64, held_out: bool) -> PairRow {
        let finish = FinishReason::Stop;
        let side = Side::Sample { iteration: K, prompt: PromptId(n), index: 0, finish };
        PairRow {
            context: Vec::new(),
            chosen: "a".into(),
            rejected: "b".into(),
            tokens: TokenPair {
                id: PairId(n),
                prompt: vec![1, 2],
                chosen: vec![3],
                rejected: vec![4, 5],
            },
            chosen_from: side.clone(),
            rejected_from: side,
            held_out,
        }
    }

    fn begun(dir: &tempfile::TempDir) -> (RunDir, Journal) {
        let run = RunDir::create(&dir.path().join("run")).unwrap();
        let meta = RunMeta {
            run_id: "r".into(),
            config_sha256: "00".repeat(32),
            created_at: 0.0,
            drift_version: "0".into(),
        };
        let journal = Journal::create(&run.journal_path(), &meta).unwrap();
        (run, journal)
    }

    #[test]
    fn ratings_that_are_not_all_there_go_and_those_that_are_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (run, mut journal) = begun(&dir);
        let ratings = [((PromptId(0), 0), 0.5)].into();
        let commit = |journal: &mut Journal, phase| {
            let detail = json!({ "to_be_rated": true });
            journal.commit(&Commit { iteration: K, phase, epoch: None, at: 0.0, detail }).unwrap();
        };
        commit(&mut journal, CommittedPhase::Sampled);
        journal.record_ratings(K, &ratings).unwrap();
        let (again, _) = resume(&run, &mut journal, EXTENT, 2).unwrap();
        assert_eq!(again.position, Position::Rating(K));
        assert!(journal.ratings(K).unwrap().is_empty());

        journal.record_ratings(K, &ratings).unwrap();
        commit(&mut journal, CommittedPhase::Rated);
        let (again, _) = resume(&run, &mut journal, EXTENT, 2).unwrap();
        assert_eq!(again.position, Position::Pairing(K));
        assert_eq!(journal.ratings(K).unwrap(), ratings);
    }

    #[test]
    fn scores_stay_for_as_many_workers_as_computed_them_and_go_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let (run, mut journal) = begun(&dir);
        run.make_iteration(K).unwrap();
        write_pairs(&run.pairs(K), &[row(0, false), row(1, true)]).unwrap();
        let logps = ReferenceLogps { chosen: -1.0, rejected: -2.0 };
        journal.record_reference(K, &[(PairId(0), logps), (PairId(1), logps)]).unwrap();
        for (phase, detail) in
            [(CommittedPhase::Paired, json!({})), (CommittedPhase::Scored, json!({ "workers": 2 }))]
        {
            journal.commit(&Commit { iteration: K, phase, epoch: None, at: 0.0, detail }).unwrap();
        }

        let (again, rows) = resume(&run, &mut journal, EXTENT, 2).unwrap();
        assert_eq!(again.position, Position::Training(K, Epoch(0)));
        assert_eq!((again.references.len(), rows.len()), (2, 2));
        let size = again.pairs.train[0];
        assert_eq!((size.tokens, size.chosen, size.rejected), (5, 1, 2));

        let (other, _) = resume(&run, &mut journal, EXTENT, 3).unwrap();
        assert_eq!(other.position, Position::Scoring(K));
        assert!(other.references.is_empty());
        assert_eq!(other.pairs.held_out.len(), 1);
        // For good: were it killed now, and gone on with by two, they would score too.
        let (back, _) = resume(&run, &mut journal, EXTENT, 2).unwrap();
        assert_eq!(back.position, Position::Scoring(K));
    }
}
