//! Effects, one by one.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use tracing::{info, warn};

use super::{
    Command, Driver, Effect, Event, Finished, Iteration, ModelSource, PairRef, Rank, Ratable,
    SnapshotId, fault, publish, unix_seconds,
};
use crate::domain::{Epoch, ShardId, Step};
use crate::run::machine::{ReductionSeconds, SnapshotKind};
use crate::run::metrics::StepMetrics;
use crate::server::{Outgoing, PairBatch};
use crate::store::metrics::{self, MetricsLog, MetricsRow};
use crate::store::pairs::write_pairs;
use crate::store::publish::{begin_staging, staging};
use crate::store::{Commit, CommittedPhase, Entry, Journal, RunDir, StepRecord};

impl Driver {
    /// Carries out one effect; gives back what the machine is to hear of it at once.
    pub(super) fn carry_out(&mut self, effect: Effect) -> Result<Option<Event>> {
        self.session.watch.effect(&effect);
        if effect == Effect::Rewind {
            return self.rewind().map(Some);
        }
        self.carry(effect).map(|()| None)
    }

    fn carry(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Send(rank, command) => self.send(rank, command),
            Effect::Commit { iteration, phase, epoch, detail } => {
                self.commit(iteration, phase, epoch, detail)
            }
            Effect::Lost(rank, why) => self.drop_worker(rank, &why),
            Effect::Failed(rank, why) => {
                warn!(%rank, why, "a worker's command failed; all go back to what is on disk");
                Ok(())
            }
            Effect::Start(rank) => Ok(self.launcher.start(rank)?),
            Effect::Call(ranks) => self.call(&ranks),
            Effect::Rewind => Ok(()),
            Effect::SetAside(k, shard, why) => self.set_aside(k, shard, &why),
            Effect::RecordShard(k, shard, samples) => {
                let entry = Entry::Shard(k, shard, samples);
                self.session.journal.record(entry).context("record a shard")
            }
            Effect::RecordRatings(k, batch, ratings) => {
                let rated = self.batch(batch)?.iter().zip(ratings);
                let rated = rated.map(|(one, rating)| ((one.prompt, one.index), rating)).collect();
                Ok(self.session.journal.record(Entry::Ratings(k, rated))?)
            }
            Effect::RecordReferences(k, logps) => {
                Ok(self.session.journal.record(Entry::References(k, logps))?)
            }
            Effect::RecordStep { iteration, epoch, step, pairs, metrics, reduction } => {
                self.record_step(iteration, epoch, step, pairs, &metrics, reduction)
            }
            Effect::Warn(k, concern) => {
                warn!(iteration = k.0, "{concern}");
                Ok(())
            }
            Effect::BeginSnapshot(id, kind) => {
                match (id, kind) {
                    (SnapshotId::EndOf(k, epoch), SnapshotKind::Model) => {
                        publish::begin_model(&self.session, k, epoch)?
                    }
                    _ => begin_staging(&self.snapshot(id))?,
                };
                Ok(())
            }
            Effect::KeepSnapshot(id, files) => {
                let subject = publish::subject(&self.session, id.iteration());
                publish::keep_snapshot(&self.snapshot(id), &files, subject)?;
                if let SnapshotId::After(k, step) = id {
                    let journal = self.session.journal.journal()?;
                    publish::seal_step(&self.session.run, journal, k, step)?;
                    self.session.run.prune_step_snapshots(k, Some(step))?;
                    fault::at("snapshot");
                }
                Ok(())
            }
            Effect::SnapshotKept(id, seconds) => {
                let (held, written) = (seconds.copy, seconds.write);
                info!(
                    ?id,
                    held, written, "snapshot: training was held up and went on beside it (s)"
                );
                Ok(())
            }
            Effect::SnapshotFailed(id, why) => {
                warn!(?id, why, "a snapshot inside an epoch could not be saved; training goes on");
                Ok(())
            }
            Effect::PlanRating(k) => self.plan_rating(k),
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
                self.dismiss();
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
            Command::OpenGroup { number, store } => {
                Outgoing::OpenGroup { number, store, timeout: settings.launch.collective_timeout }
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
                prompts: self.shards[&shard]
                    .prompts
                    .iter()
                    .flat_map(|&id| self.session.prepared.sampling_prompts(id))
                    .collect(),
            },
            Command::Score { batch, micro_batches } => {
                Outgoing::Score { batch, micro_batches: self.with_tokens(micro_batches)? }
            }
            Command::Rate { batch } => {
                let reward = self.session.prepared.reward.as_ref();
                let directory = reward.context("no reward model is loaded")?.directory();
                Outgoing::Rate {
                    batch,
                    directory: utf8(directory)?,
                    dtype: settings.reward.dtype,
                    sequences: self.batch(batch)?.iter().map(|one| one.tokens.clone()).collect(),
                }
            }
            Command::BeginTraining => Outgoing::BeginTraining(Box::new(settings.training.clone())),
            Command::TrainStep { step, learning_rate, global_pairs, micro_batches } => {
                let micro_batches = self.with_tokens(micro_batches)?;
                Outgoing::TrainStep { step, learning_rate, global_pairs, micro_batches }
            }
            Command::SaveState(id) => {
                let directory = utf8(&staging(&self.snapshot(id)))?;
                match id {
                    SnapshotId::EndOf(..) => Outgoing::SaveState(directory),
                    SnapshotId::After(_, step) => Outgoing::SaveStateBeside { directory, step },
                }
            }
            Command::SaveModel(k, epoch) => {
                Outgoing::SaveModel(utf8(&staging(&self.session.run.snapshot(k, epoch)))?)
            }
            Command::LoadState(id) => Outgoing::LoadState(utf8(&self.snapshot(id))?),
        };
        self.link(rank)?.send(outgoing);
        Ok(())
    }

    fn snapshot(&self, id: SnapshotId) -> PathBuf {
        match id {
            SnapshotId::EndOf(k, epoch) => self.session.run.snapshot(k, epoch),
            SnapshotId::After(k, step) => self.session.run.step_snapshot(k, step),
        }
    }

    /// What the reward model reads in one batch.
    fn batch(&self, batch: u64) -> Result<&[Ratable]> {
        let batches = usize::try_from(batch).ok().and_then(|at| self.rating.get(at));
        Ok(batches.with_context(|| format!("rating batch {batch} was never planned"))?)
    }

    /// Keeps a shard without samples, so that nobody takes it again.
    fn set_aside(&mut self, k: Iteration, shard: ShardId, why: &str) -> Result<()> {
        let prompts = self.shards.get(&shard).map_or(0, |shard| shard.prompts.len());
        warn!(iteration = k.0, %shard, prompts, why, "a shard is left out");
        let kind = format!("shard {shard} of iteration {k}, left out");
        let counts = Entry::Counts(kind, json!({ "prompts": prompts, "why": why }));
        self.session.journal.record(counts)?;
        self.session.journal.record(Entry::Shard(k, shard, Vec::new())).context("record a shard")
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
        if let (CommittedPhase::Trained, Some(epoch)) = (phase, epoch) {
            let journal = self.session.journal.journal()?;
            publish::seal(&self.session.run, journal, iteration, epoch)?;
        }
        let commit = Commit { iteration, phase, epoch, at: unix_seconds(), detail };
        self.view.ended();
        commit_to(self.session.journal.journal()?, &commit)?;
        match phase {
            CommittedPhase::Rated => self.rating = Vec::new(),
            CommittedPhase::Trained => {
                self.metrics = None;
                self.session.run.prune_step_snapshots(iteration, None)?;
            }
            CommittedPhase::Evaluated => {
                self.view.evaluated(iteration, &commit.detail);
                renew_metrics(self.session.journal.journal()?, &self.session.run)?;
            }
            CommittedPhase::Published => {
                self.session.run.prune_snapshots(iteration)?;
                // What workers that were lost or called left half-written.
                if let Err(error) = self.session.run.sweep() {
                    warn!(%error, "could not remove what an interrupted write left");
                }
            }
            _ => {}
        }
        Ok(())
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
            let rows = metrics::rows(self.session.journal.journal()?, k)?;
            self.metrics = Some(MetricsLog::begin(&self.session.run.metrics(k), &rows)?);
        }
        self.session.journal.journal()?.record_step(k, epoch, step, &record)?;
        self.view.stepped(k, step, pairs, &record);
        if let Some(log) = &mut self.metrics {
            log.append(&MetricsRow::step(k, &StepRecord { step, epoch, metrics: record }))?;
        }
        Ok(())
    }

    fn plan_rating(&mut self, k: Iteration) -> Result<()> {
        let samples = self.session.journal.journal()?.samples(k)?;
        let prepared = std::sync::Arc::clone(&self.session.prepared);
        let (size, finished) = (self.session.settings.reward.batch, self.finished.clone());
        tokio::task::spawn_blocking(move || {
            let _ = finished.send(Finished::Rating(prepared.rating_batches(samples, size)));
        });
        Ok(())
    }

    fn build_pairs(&mut self, k: Iteration) -> Result<()> {
        let samples = self.session.prepared.drawn(self.session.journal.journal()?, k)?;
        let prepared = std::sync::Arc::clone(&self.session.prepared);
        self.session.run.make_iteration(k)?;
        let path = self.session.run.pairs(k);
        let finished = self.finished.clone();
        tokio::task::spawn_blocking(move || {
            let built = (|| {
                let (rows, counts) = prepared.pairs(k, samples)?;
                info!(iteration = k.0, "{counts}");
                for concern in counts.concerns() {
                    warn!(iteration = k.0, "{concern}");
                }
                let file = write_pairs(&path, &rows)?;
                Ok((rows, counts, file))
            })();
            let _ = finished.send(Finished::Pairs(k, built));
        });
        Ok(())
    }
}

/// Commits, and tells people.
pub(super) fn commit_to(journal: &mut Journal, commit: &Commit) -> Result<()> {
    journal.commit(commit)?;
    let Commit { iteration, phase, epoch, .. } = commit;
    info!(iteration = iteration.0, phase = %phase, epoch = epoch.map(|e| e.0), "committed");
    fault::at("committed");
    Ok(())
}

/// Makes the `metrics.jsonl` of the last committed iteration anew from the
/// journal. Also when a run goes on: it may have died between a commit and this.
pub(super) fn renew_metrics(journal: &Journal, run: &RunDir) -> Result<()> {
    let commits = journal.commits()?;
    let Some(k) = commits.last().map(|commit| commit.iteration) else { return Ok(()) };
    let rows = metrics::rows(journal, k)?;
    if !rows.is_empty() {
        metrics::write(&run.metrics(k), &rows)?;
    }
    Ok(())
}

/// Folders travel to workers as text.
pub(super) fn utf8(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| {
        format!(
            "{} is not UTF-8; take a run directory and a model folder whose names are",
            path.display()
        )
    })
}
