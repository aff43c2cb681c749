//! Effects, one by one.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use tracing::{info, warn};

use super::{
    Command, Driver, Effect, Finished, Iteration, ModelSource, PairRef, Rank, fault, publish,
    unix_seconds,
};
use crate::domain::{Epoch, PairRow, PromptId, Step};
use crate::run::machine::{ReductionSeconds, SnapshotKind};
use crate::run::metrics::StepMetrics;
use crate::server::{Outgoing, PairBatch};
use crate::store::metrics::{MetricsLog, MetricsRow};
use crate::store::pairs::write_pairs;
use crate::store::publish::{begin_staging, staging};
use crate::store::{Commit, CommittedPhase, StepRecord};
use crate::text;

impl Driver {
    pub(super) fn carry_out(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Send(rank, command) => self.send(rank, command),
            Effect::Commit { iteration, phase, epoch, detail } => {
                self.commit(iteration, phase, epoch, detail)
            }
            Effect::RecordShard(k, shard, samples) => {
                self.session.journal.record_shard(k, shard, &samples).context("record a shard")?;
                Ok(())
            }
            Effect::RecordReferences(k, logps) => {
                self.session.journal.record_reference(k, &logps)?;
                Ok(())
            }
            Effect::RecordStep { iteration, epoch, step, pairs, metrics, reduction } => {
                self.record_step(iteration, epoch, step, pairs, &metrics, reduction)
            }
            Effect::Warn(k, concern) => {
                warn!(iteration = k.0, "{concern}");
                Ok(())
            }
            Effect::BeginSnapshot(k, epoch, kind) => {
                match kind {
                    SnapshotKind::State => begin_staging(&self.session.run.snapshot(k, epoch))?,
                    SnapshotKind::Model => publish::begin_model(&self.session, k, epoch)?,
                };
                Ok(())
            }
            Effect::KeepSnapshot(k, epoch, files) => {
                let subject = publish::subject(&self.session, k);
                publish::keep_snapshot(&self.session.run, k, epoch, &files, subject)
            }
            Effect::BuildPairs(k) => self.build_pairs(k),
            Effect::Publish(k, epoch) => {
                let (from, to) =
                    (self.session.run.snapshot(k, epoch), self.session.run.checkpoint(k));
                let finished = self.finished.clone();
                tokio::task::spawn_blocking(move || {
                    let _ = finished.send(Finished::Checkpoint(publish::publish(&from, &to)));
                });
                Ok(())
            }
            Effect::Began(k, phase, epoch, total, done) => {
                self.view.began(k, phase, epoch, total, done);
                self.last_step = std::time::Instant::now();
                Ok(())
            }
            Effect::Dismiss => {
                for link in self.links.values() {
                    link.send(Outgoing::Abort);
                    link.send(Outgoing::Shutdown);
                }
                Ok(())
            }
            Effect::End(outcome) => {
                self.outcome = Some(outcome);
                Ok(())
            }
        }
    }

    fn send(&mut self, rank: Rank, command: Command) -> Result<()> {
        let settings = &self.session.settings;
        let outgoing = match command {
            Command::OpenGroup { store } => {
                Outgoing::OpenGroup { store, timeout: settings.launch.collective_timeout }
            }
            Command::LoadModel(source) => Outgoing::LoadModel {
                directory: self.folder(source)?,
                dtype: settings.training.dtype,
            },
            Command::Sample { iteration, shard } => Outgoing::Sample {
                shard,
                seed: settings.seed,
                iteration: iteration.0,
                sampling: settings.sampling.clone(),
                stop_ids: self.session.prepared.text.stop_ids().to_vec(),
                prompts: self.shards[&shard].prompts.iter().map(|&id| self.prompt(id)).collect(),
            },
            Command::Score { batch, micro_batches } => {
                Outgoing::Score { batch, micro_batches: self.with_tokens(micro_batches)? }
            }
            Command::BeginTraining => Outgoing::BeginTraining(Box::new(settings.training.clone())),
            Command::TrainStep { step, learning_rate, global_pairs, micro_batches } => {
                let micro_batches = self.with_tokens(micro_batches)?;
                Outgoing::TrainStep { step, learning_rate, global_pairs, micro_batches }
            }
            Command::SaveState(k, epoch) => {
                Outgoing::SaveState(utf8(&staging(&self.session.run.snapshot(k, epoch)))?)
            }
            Command::SaveModel(k, epoch) => {
                Outgoing::SaveModel(utf8(&staging(&self.session.run.snapshot(k, epoch)))?)
            }
            Command::LoadState(k, epoch) => {
                Outgoing::LoadState(utf8(&self.session.run.snapshot(k, epoch))?)
            }
        };
        self.link(rank)?.send(outgoing);
        Ok(())
    }

    /// Where weights lie.
    fn folder(&self, source: ModelSource) -> Result<String> {
        let run = &self.session.run;
        utf8(&match source {
            ModelSource::Base => self.session.model_dir.clone(),
            ModelSource::Checkpoint(k) => run.checkpoint(k),
            ModelSource::Snapshot(k, epoch) => {
                let snapshot = run.snapshot(k, epoch);
                // A run killed between the rename and its commit left it published.
                if snapshot.exists() { snapshot } else { run.checkpoint(k) }
            }
        })
    }

    fn prompt(&self, id: PromptId) -> (PromptId, Vec<u32>) {
        (id, self.session.prepared.prompts[id.0 as usize].clone())
    }

    fn with_tokens(&self, micro_batches: Vec<Vec<PairRef>>) -> Result<Vec<PairBatch>> {
        let find = |pair: PairRef| {
            let tokens = self.pairs.get(&pair.id);
            let tokens =
                tokens.with_context(|| format!("pair {} is not in pairs.parquet", pair.id))?;
            Ok((tokens.clone(), pair.reference))
        };
        micro_batches.into_iter().map(|pass| pass.into_iter().map(find).collect()).collect()
    }

    pub(super) fn commit(
        &mut self,
        iteration: Iteration,
        phase: CommittedPhase,
        epoch: Option<Epoch>,
        detail: serde_json::Value,
    ) -> Result<()> {
        let commit = Commit { iteration, phase, epoch, at: unix_seconds(), detail };
        self.session.journal.commit(&commit)?;
        self.view.ended();
        info!(iteration = iteration.0, phase = %phase, epoch = epoch.map(|e| e.0), "committed");
        fault::at("committed");
        match phase {
            CommittedPhase::Trained => self.metrics = None,
            CommittedPhase::Evaluated => {
                self.view.evaluated(iteration, &commit.detail);
                self.renew_metrics()?;
            }
            CommittedPhase::Published => self.session.run.prune_snapshots(iteration)?,
            _ => {}
        }
        Ok(())
    }

    /// Makes the `metrics.jsonl` of the last committed iteration anew from the
    /// journal. Also when a run goes on: it may have died between a commit and this.
    pub(super) fn renew_metrics(&self) -> Result<()> {
        let commits = self.session.journal.commits()?;
        let Some(k) = commits.last().map(|commit| commit.iteration) else { return Ok(()) };
        let rows = self.metric_rows(k)?;
        if !rows.is_empty() {
            crate::store::metrics::write(&self.session.run.metrics(k), &rows)?;
        }
        Ok(())
    }

    /// Lines of `metrics.jsonl` as the journal has them.
    fn metric_rows(&self, k: Iteration) -> Result<Vec<MetricsRow>> {
        let steps = self.session.journal.steps(k)?;
        let commits = self.session.journal.commits()?;
        let evaluation = |epoch: Epoch| {
            commits.iter().find(|c| {
                c.iteration == k && c.phase == CommittedPhase::Evaluated && c.epoch == Some(epoch)
            })
        };
        let mut rows = Vec::new();
        for (n, step) in steps.iter().enumerate() {
            rows.push(MetricsRow::step(k, step));
            let ends_epoch = steps.get(n + 1).is_none_or(|next| next.epoch != step.epoch);
            if ends_epoch && let Some(evaluated) = evaluation(step.epoch) {
                rows.push(MetricsRow::evaluation(k, step.step, &evaluated.detail));
            }
        }
        Ok(rows)
    }

    fn record_step(
        &mut self,
        k: Iteration,
        epoch: Epoch,
        step: Step,
        pairs: usize,
        metrics: &StepMetrics,
        reduction: ReductionSeconds,
    ) -> Result<()> {
        let seconds = self.last_step.elapsed().as_secs_f64();
        self.last_step = std::time::Instant::now();
        let mut record = json!(metrics);
        // Left out of metrics.jsonl, by their names: they depend on the clock.
        record["seconds"] = json!(seconds);
        record["reduce_seconds"] = json!(reduction.busy);
        record["exposed_seconds"] = json!(reduction.exposed);
        if self.metrics.is_none() {
            let rows = self.metric_rows(k)?;
            self.metrics = Some(MetricsLog::begin(&self.session.run.metrics(k), &rows)?);
        }
        self.session.journal.record_step(k, epoch, step, &record)?;
        self.view.stepped(k, step, pairs, &record);
        if let Some(log) = &mut self.metrics {
            log.append(&MetricsRow::step(k, &StepRecord { step, epoch, metrics: record }))?;
        }
        Ok(())
    }

    fn build_pairs(&mut self, k: Iteration) -> Result<()> {
        let samples = self.session.journal.samples(k)?;
        let prepared = std::sync::Arc::clone(&self.session.prepared);
        let stop_strings = self.session.settings.sampling.stop_strings.clone();
        self.session.run.make_iteration(k)?;
        let path = self.session.run.pairs(k);
        let finished = self.finished.clone();
        tokio::task::spawn_blocking(move || {
            let built = (|| {
                let (rows, counts) = if k.0 == 0 {
                    text::seed_pairs(
                        &prepared.text,
                        &prepared.seeds,
                        prepared.lengths,
                        &prepared.held_out,
                    )?
                } else {
                    let samples = text::cut_at_stops(&prepared.text, samples, &stop_strings)?;
                    let held_out = &prepared.held_out;
                    text::drift_pairs(
                        &prepared.text,
                        &prepared.dsat,
                        &samples,
                        prepared.lengths,
                        held_out,
                    )?
                };
                info!(iteration = k.0, "{counts}");
                write_pairs(&path, &rows)?;
                Ok::<(Vec<PairRow>, text::PairCounts), anyhow::Error>((rows, counts))
            })();
            let _ = finished.send(Finished::Pairs(k, built));
        });
        Ok(())
    }
}

/// Folders travel to workers as text.
fn utf8(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| {
        format!(
            "{} is not UTF-8; take a run directory and a model folder whose names are",
            path.display()
        )
    })
}
