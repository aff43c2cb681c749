//! What people see of a run while it goes on.

use std::collections::BTreeMap;

use serde_json::Value;
use tracing::info;

use super::Report;
use crate::domain::{Epoch, Iteration, ShardId, Step};
use crate::run::machine::PhaseName;
use crate::ui::step_line::{StepLine, step_line};
use crate::ui::{Activity, Bar, Progress};

/// Turns effects and reports into bars and lines.
pub(super) struct View {
    progress: Progress,
    log_steps: bool,
    phase: PhaseName,
    bar: Option<Bar>,
    /// Tokens and rows told by shards under way.
    shards: BTreeMap<ShardId, (u64, u32)>,
    steps: u64,
}

impl View {
    pub(super) fn new(progress: Progress, log_steps: bool) -> Self {
        Self {
            progress,
            log_steps,
            phase: PhaseName::Preparing,
            bar: None,
            shards: BTreeMap::new(),
            steps: 0,
        }
    }

    pub(super) fn began(
        &mut self,
        iteration: Iteration,
        phase: PhaseName,
        epoch: Option<Epoch>,
        total: usize,
        done: usize,
    ) {
        self.ended();
        self.phase = phase;
        self.shards.clear();
        let total = total as u64;
        let activity = match phase {
            PhaseName::Preparing | PhaseName::Pairing | PhaseName::Publishing => None,
            PhaseName::Sampling => Some(Activity::Sampling { iteration, replies: total }),
            PhaseName::Rating => Some(Activity::Rating { iteration, replies: total }),
            PhaseName::Scoring => Some(Activity::Scoring { iteration, pairs: total }),
            PhaseName::Training => {
                self.steps = total;
                Some(Activity::Training { iteration, steps: total })
            }
            PhaseName::Evaluating => Some(Activity::Evaluating { iteration, pairs: total }),
        };
        let epoch = epoch.map(|epoch| epoch.0);
        info!(iteration = iteration.0, phase = ?phase, epoch, total, done, "begin");
        self.bar = activity.map(|activity| self.progress.resume(activity, done as u64));
    }

    /// The phase's work is done.
    pub(super) fn ended(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }

    /// The run is over; a bar that is still open says that it stopped.
    pub(super) fn close(&mut self) {
        self.bar = None;
    }

    pub(super) fn report(&mut self, report: &Report) {
        let Some(bar) = &self.bar else { return };
        match report {
            Report::SampleProgress { shard, tokens, finished } => {
                let told = self.shards.entry(*shard).or_default();
                bar.work(tokens.saturating_sub(told.0));
                bar.advance(u64::from(finished.saturating_sub(told.1)));
                *told = (told.0.max(*tokens), told.1.max(*finished));
            }
            Report::ShardDone { shard, samples } => {
                let told = self.shards.remove(shard).unwrap_or_default();
                let tokens: u64 = samples.iter().map(|sample| sample.tokens.len() as u64).sum();
                bar.work(tokens.saturating_sub(told.0));
                bar.advance((samples.len() as u64).saturating_sub(u64::from(told.1)));
            }
            Report::Rated { ratings, .. } => bar.advance(ratings.len() as u64),
            Report::Scored { logps, .. } => bar.advance(logps.len() as u64),
            Report::Stepped(outcomes) => bar.work(outcomes.pairs.len() as u64),
            _ => {}
        }
    }

    /// A step is joined over all ranks.
    pub(super) fn stepped(
        &mut self,
        iteration: Iteration,
        step: Step,
        pairs: usize,
        record: &Value,
    ) {
        if let Some(bar) = &self.bar {
            bar.advance(1);
        }
        if self.log_steps {
            let seconds = record.get("seconds").and_then(Value::as_f64).unwrap_or(f64::NAN);
            let rate = pairs as f64 / seconds;
            let line = StepLine::from_metrics(iteration, step, self.steps, record, rate);
            info!("{}", step_line(&line));
        }
    }

    pub(super) fn evaluated(&self, iteration: Iteration, metrics: &Value) {
        let value = |name: &str| metrics.get(name).and_then(Value::as_f64);
        if let (Some(pairs), Some(accuracy), Some(margin)) =
            (value("eval_pairs"), value("eval_rewards/accuracies"), value("eval_rewards/margins"))
        {
            info!(iteration = iteration.0, pairs, accuracy, margin, "held-out pairs evaluated");
        }
    }
}
