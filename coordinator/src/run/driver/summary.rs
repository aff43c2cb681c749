//! What a run did, from its journal.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Session;
use crate::domain::Iteration;
use crate::run::health::{self, Signs};
use crate::store::{Commit, CommittedPhase, Journal, StepRecord};
use crate::ui::RunSummary;
use crate::ui::summary::{HeldOut, IterationSummary, StartEnd};

/// Joins the journal's commits, steps and samples.
///
/// # Errors
/// A journal that cannot be read, or a run without a published iteration.
pub fn summarise(session: &mut Session) -> Result<RunSummary> {
    let journal = session.journal.journal()?;
    let commits = journal.commits()?;
    let began = commits.first().map_or(0.0, |commit| commit.at);
    let ended = commits.last().map_or(began, |commit| commit.at);
    let published: Vec<Iteration> = commits
        .iter()
        .filter(|commit| commit.phase == CommittedPhase::Published)
        .map(|commit| commit.iteration)
        .collect();
    let last = *published.last().context("no iteration was published")?;
    let iterations =
        published.iter().map(|&k| iteration(journal, &commits, k)).collect::<Result<Vec<_>>>()?;
    let settings = &session.settings;
    Ok(RunSummary {
        run_id: session.run_id.clone(),
        drift_version: env!("CARGO_PKG_VERSION").to_owned(),
        base_model: settings.model.clone(),
        method: settings.method.to_string(),
        workers: session.workers,
        seed: settings.seed,
        seconds: ended - began,
        iterations,
        checkpoint: session.run.checkpoint(last).display().to_string(),
    })
}

fn iteration(journal: &Journal, commits: &[Commit], k: Iteration) -> Result<IterationSummary> {
    let seconds = seconds_by_phase(commits, k);
    let steps = journal.steps(k)?;
    let find = |phase| commits.iter().rfind(|c| c.iteration == k && c.phase == phase);
    let count = |name: &str| {
        find(CommittedPhase::Paired).and_then(|c| c.detail.get(name)?.as_u64()).unwrap_or(0)
    };
    let evaluated = find(CommittedPhase::Evaluated).map(|commit| &commit.detail);
    let held_out = evaluated.and_then(|metrics| {
        let value = |name: &str| metrics.get(name).and_then(Value::as_f64);
        Some(HeldOut {
            loss: value("eval_loss")?,
            accuracy: value("eval_rewards/accuracies")?,
            margin: value("eval_rewards/margins")?,
        })
    });
    let sampled_tokens = journal.samples(k)?.iter().map(|sample| sample.tokens.len() as u64).sum();
    let per_second = |amount: u64, phase: &str| {
        seconds.get(phase).filter(|&&s| amount > 0 && s > 0.0).map(|s| amount as f64 / s)
    };
    let pairs_trained = count("train");
    let epochs = steps.last().map_or(0, |step| u64::from(step.epoch.0) + 1);
    Ok(IterationSummary {
        iteration: k,
        pairs_trained,
        pairs_held_out: count("held_out"),
        steps: steps.len() as u64,
        first_loss: start_end(&steps, "loss").start,
        last_loss: start_end(&steps, "loss").end,
        held_out,
        logps_chosen: held_out_logps(evaluated, "chosen")
            .unwrap_or_else(|| start_end(&steps, "logps/chosen")),
        logps_rejected: held_out_logps(evaluated, "rejected")
            .unwrap_or_else(|| start_end(&steps, "logps/rejected")),
        sampled_tokens,
        sampled_tokens_per_second: per_second(sampled_tokens, "sampled"),
        trained_pairs_per_second: per_second(pairs_trained * epochs, "trained").unwrap_or(0.0),
        reduce_seconds: total(&steps, "reduce_seconds"),
        exposed_seconds: total(&steps, "exposed_seconds"),
        warnings: warnings(&steps),
        seconds,
        checkpoint: format!("iterations/{:02}/checkpoint", k.0),
    })
}

/// Log-probabilities of the same held-out replies before and after training; a
/// step's are those of its own pairs, and two steps do not compare.
fn held_out_logps(evaluated: Option<&Value>, side: &str) -> Option<StartEnd> {
    let value = |name: String| evaluated?.get(name)?.as_f64();
    Some(StartEnd {
        start: value(format!("eval_ref_logps/{side}"))?,
        end: value(format!("eval_logps/{side}"))?,
    })
}

fn start_end(steps: &[StepRecord], name: &str) -> StartEnd {
    let value = |step: Option<&StepRecord>| {
        step.and_then(|step| step.metrics.get(name)?.as_f64()).unwrap_or(f64::NAN)
    };
    StartEnd { start: value(steps.first()), end: value(steps.last()) }
}

/// Sum of a value over the steps that have it.
fn total(steps: &[StepRecord], name: &str) -> f64 {
    steps.iter().filter_map(|step| step.metrics.get(name)?.as_f64()).sum()
}

/// How many steps, with those before them, gave rise to each concern.
fn warnings(steps: &[StepRecord]) -> BTreeMap<String, u64> {
    let signs: Vec<_> = steps.iter().filter_map(|s| Signs::from_record(&s.metrics)).collect();
    let mut warnings = BTreeMap::new();
    for concern in (1..=signs.len()).flat_map(|steps| health::concerns(&signs[..steps])) {
        *warnings.entry(concern.name().as_str().to_owned()).or_insert(0) += 1;
    }
    warnings
}

/// Seconds from each commit to the one before it, summed over epochs.
fn seconds_by_phase(commits: &[Commit], k: Iteration) -> BTreeMap<String, f64> {
    let mut seconds = BTreeMap::new();
    for (before, commit) in commits.iter().zip(commits.iter().skip(1)) {
        if commit.iteration == k {
            *seconds.entry(commit.phase.as_str().to_owned()).or_insert(0.0) +=
                commit.at - before.at;
        }
    }
    seconds
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::{Epoch, Step};

    #[test]
    fn warnings_count_the_steps_at_which_they_held() {
        let step = |n: u64| {
            let chosen = if n < 6 { 0.0 } else { -20.0 };
            let metrics = json!({
                "signal/p0": 1.0, "logps/chosen_drift": chosen, "logps/rejected_drift": -30.0,
                "reduce_seconds": 0.5
            });
            StepRecord { step: Step(n), epoch: Epoch(0), metrics }
        };
        let steps: Vec<_> = (0..12).map(step).collect();
        // The first window of eight that is full ends with step 7.
        assert_eq!(warnings(&steps), BTreeMap::from([("both_logps_fall".to_owned(), 5)]));
        assert!(warnings(&steps[..7]).is_empty());
        assert_eq!(total(&steps, "reduce_seconds"), 6.0);
        assert_eq!(total(&steps, "exposed_seconds"), 0.0);
    }
}
