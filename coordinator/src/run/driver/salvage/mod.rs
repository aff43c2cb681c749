//! Before a run goes on: what it will rest on is still what was written, or is made
//! again.
//!
//! | damaged or missing | what is done |
//! |---|---|
//! | `metrics.jsonl` | made anew from the journal |
//! | `pairs.parquet` | made again from the journal's samples, if that gives the recorded bytes |
//! | a snapshot, the last published checkpoint, rows of the iteration in hand | the run goes back to the last state whose grounds are good ([`grounds`]), and does again what came after it |
//! | an earlier checkpoint, rows of a published iteration | refused by name: nothing can make it again without undoing what is good |
//! | an earlier checkpoint's whole folder | told: somebody made room |
//! | commits, settings, counts | refused by name: nothing is guessed |
//!
//! What is damaged is set aside under another name, never removed. Everything is
//! looked at before anything is changed, and each change can be cut short: the next
//! resume finds the same and decides the same.

mod grounds;
mod look;

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Result, bail};
use serde_json::json;
use tracing::warn;

use self::grounds::{Ground, forget, published, standing};
use self::look::Look;
use super::{Prepared, unix_seconds};
use crate::config::Settings;
use crate::domain::Iteration;
use crate::run::machine::Extent;
use crate::store::journal::Torn;
use crate::store::pairs::write_pairs;
use crate::store::publish::set_aside;
use crate::store::verify::{Fault, Problem};
use crate::store::{Commit, CommittedPhase, Journal, RunDir, metrics, names};
use crate::ui::Progress;

/// Verifies what a run that goes on rests on; makes again what can be made from the
/// journal, and takes the run back to its last good state where that does not help.
///
/// # Errors
/// What is damaged and cannot be made again, by name; or the operation that failed.
pub fn salvage(
    run: &RunDir,
    journal: &mut Journal,
    run_id: &str,
    prepared: &Prepared,
    settings: &Settings,
    workers: u32,
    progress: &Progress,
) -> Result<()> {
    let (torn, _) = journal.audit()?;
    for torn in &torn {
        match torn {
            Torn::Commit(_) | Torn::Counts(_) => return Err(journal.damaged_at(torn).into()),
            Torn::Definition(_) | Torn::Generation => {
                warn!(file = names::JOURNAL, "is damaged at {torn}; the run does not rest on that");
            }
            Torn::Shard(..) | Torn::Rating(..) | Torn::Reference(..) | Torn::Step(..) => {}
        }
    }
    let commits = journal.commits()?;
    let training = &settings.training;
    let extent = Extent {
        iterations: training.iterations,
        warm_start_epochs: training.warm_start_epochs,
        epochs: training.epochs,
    };
    let mut look = Look::new(run, journal, run_id, &torn, prepared, extent, progress)?;
    let keep = standing(&commits, extent, workers, |ground| look.is_good(ground));
    let (kept, undone) = commits.split_at(keep);
    let position = extent.position(kept.last(), workers);
    refuse_what_is_lost(&mut look, kept)?;

    let is_published = |k| published(kept).any(|published| published == k);
    for row in torn.iter().filter(|row| matches!(row, Torn::Reference(k, _) if is_published(*k))) {
        warn!(file = names::JOURNAL, "is damaged at {row}; nothing rests on it any more");
    }
    let seen = look.end();
    for problem in seen.problems.iter().filter(|problem| !was_pruned(run, problem, &commits)) {
        warn!(file = %problem.path.display(), "{}", problem.what);
    }
    let change = forget(position, keep, commits.len(), &torn);
    if let Some(last) = undone.last() {
        warn!(
            "go back from {} to {}: what came after that is done again",
            told(Some(last)),
            told(kept.last())
        );
    } else if change.is_some() {
        warn!("what is damaged in the journal is dropped, and done again");
    }
    for folder in folders(run, &seen.problems) {
        let aside = set_aside(&folder)?;
        warn!(from = %folder.display(), to = %aside.display(), "set aside");
    }
    for (k, (rows, entry)) in seen.remade {
        if !kept.iter().any(|c| c.iteration == k && c.phase == CommittedPhase::Paired) {
            continue;
        }
        let path = run.pairs(k);
        run.make_iteration(k)?;
        if path.exists() {
            set_aside(&path)?;
        }
        write_pairs(&path, &rows)?;
        journal.record_file(&names::pairs(k), &entry)?;
        warn!(file = %path.display(), "made again from the journal's samples");
    }
    if let Some(change) = change {
        let before = journal.counts()?;
        let before = before.iter().filter(|(kind, _)| kind.starts_with(names::WENT_BACK)).count();
        let kind = format!("{}{}", names::WENT_BACK, before + 1);
        let why: Vec<_> = seen.problems.iter().map(ToString::to_string).collect();
        let record = json!({
            "from": commits.len(), "to": keep, "at": unix_seconds(), "because": why
        });
        journal.discard(&change, &kind, &record)?;
    }
    for k in published(kept) {
        renew_metrics(run, journal, k)?;
    }
    Ok(())
}

/// Published things that the run does not go on from, and that nothing makes again.
fn refuse_what_is_lost(look: &mut Look<'_>, kept: &[Commit]) -> Result<()> {
    let mut lost = Vec::new();
    for k in published(kept) {
        if !look.is_good(Ground::Checkpoint(k)) {
            let folder = look.run.checkpoint(k);
            let problems = look.problems(Ground::Checkpoint(k));
            // Every file of it is gone: that was meant.
            if problems.iter().any(|p| p.path == folder && p.fault == Fault::Missing) {
                continue;
            }
            lost.extend(problems.iter().map(|problem| {
                format!(
                    "{problem}; restore it from a backup, or move {} away: the run goes on without it",
                    folder.display()
                )
            }));
        }
        for torn in look.torn.iter().filter(|torn| match torn {
            Torn::Shard(of, _) | Torn::Rating(of, ..) | Torn::Step(of, ..) => *of == k,
            _ => false,
        }) {
            lost.push(look.journal.damaged_at(torn).to_string());
        }
        if !look.is_good(Ground::Pairs(k)) {
            lost.extend(look.problems(Ground::Pairs(k)).iter().map(|problem| {
                format!("{problem}, and it cannot be made again; restore it from a backup")
            }));
        }
    }
    if !lost.is_empty() {
        bail!("{}", lost.join("\n"));
    }
    Ok(())
}

/// A snapshot that publishing its iteration removed: no damage, and nothing to go
/// back to.
fn was_pruned(run: &RunDir, problem: &Problem, commits: &[Commit]) -> bool {
    let of = problem.path.file_name().and_then(|name| names::parse_snapshot(name.to_str()?));
    of.is_some_and(|(k, epoch)| {
        problem.fault == Fault::Missing
            && problem.path == run.snapshot(k, epoch)
            && published(commits).any(|published| published == k)
    })
}

/// Checkpoints and snapshots that are there and not to be used.
fn folders(run: &RunDir, problems: &[Problem]) -> BTreeSet<PathBuf> {
    let is_one = |folder: &&std::path::Path| {
        let parent = folder.parent();
        parent == Some(&run.root().join(names::SNAPSHOTS))
            || (folder.file_name().is_some_and(|name| name == "checkpoint")
                && parent.and_then(|parent| parent.parent())
                    == Some(&run.root().join(names::ITERATIONS)))
    };
    let of = |problem: &Problem| problem.path.ancestors().find(is_one).map(PathBuf::from);
    problems.iter().filter_map(of).filter(|folder| folder.exists()).collect()
}

/// The lines of a published iteration, where the file has other ones. The driver
/// makes those of the iteration in hand.
fn renew_metrics(run: &RunDir, journal: &Journal, k: Iteration) -> Result<()> {
    let path = run.metrics(k);
    let rows = metrics::rows(journal, k)?;
    let text = metrics::text(&path, &rows)?;
    if std::fs::read(&path).is_ok_and(|found| found == text.as_bytes()) {
        return Ok(());
    }
    warn!(file = %path.display(), "is not what the journal's steps make; made anew");
    run.make_iteration(k)?;
    Ok(metrics::write(&path, &rows)?)
}

/// A state by the commit it came after.
fn told(last: Option<&Commit>) -> String {
    match last {
        None => "the beginning".to_owned(),
        Some(Commit { phase, iteration, epoch: Some(epoch), .. }) => {
            format!("{phase} of iteration {iteration}, epoch {epoch}")
        }
        Some(Commit { phase, iteration, .. }) => format!("{phase} of iteration {iteration}"),
    }
}
