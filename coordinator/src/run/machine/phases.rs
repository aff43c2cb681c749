//! How each phase begins and ends.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::{
    Command, Effect, Epoch, EvaluationMetrics, Gathering, Iteration, Machine, ModelSource,
    Objective, Outcome, PairId, PairRef, PairSets, PairSize, Phase, PhaseName, Position, Progress,
    RatingPlan, ReductionSeconds, Reference, Saves, ScoredPair, Signs, SnapshotId, SnapshotKind,
    Stage, State, Step, StepMetrics, StepPair, StepPlan, Watch, WrittenFile, health, plan,
};
use crate::store::{CommittedPhase, TO_BE_RATED};

impl Machine {
    pub(super) fn begin_sampling(&mut self, k: Iteration, effects: &mut Vec<Effect>) {
        let shards = plan::plan_shards(&self.shape.prompts, self.shape.sharding);
        let done: BTreeSet<_> = std::mem::take(&mut self.resume.shards_done).into_iter().collect();
        self.tries.clear();
        let is_done = |shard: &plan::Shard| done.contains(&shard.id);
        let finished: usize = shards.iter().filter(|s| is_done(s)).map(|s| s.prompts.len()).sum();
        let commands = shards
            .iter()
            .filter(|shard| !is_done(shard))
            .map(|shard| Command::Sample { iteration: k, shard: shard.id })
            .collect();
        let replies = self.shape.replies;
        let total = self.shape.prompts.len() * replies;
        effects.push(Effect::Began(k, PhaseName::Sampling, None, total, finished * replies));
        self.enter(k, Phase::Sampling(Stage::shared(self.shape.world_size, commands)));
        self.advance(effects);
    }

    /// Every shard is recorded.
    pub(super) fn sampled(&mut self, k: Iteration, effects: &mut Vec<Effect>) {
        let (detail, next) = match self.shape.is_rated {
            true => (json!({ TO_BE_RATED: true }), Position::Rating(k)),
            false => (json!({}), Position::Pairing(k)),
        };
        self.commit(k, CommittedPhase::Sampled, None, detail, effects);
        self.go_on(next, effects);
    }

    /// Hands out batches, of so many samples each.
    pub(super) fn rating_planned(&mut self, batches: Vec<usize>, effects: &mut Vec<Effect>) {
        let State::Working { iteration, phase: Phase::Rating(plan @ None) } = &mut self.state
        else {
            return;
        };
        let total = batches.iter().sum();
        effects.push(Effect::Began(*iteration, PhaseName::Rating, None, total, 0));
        let commands = (0..batches.len() as u64).map(|batch| Command::Rate { batch }).collect();
        let stage = Stage::shared(self.shape.world_size, commands);
        *plan = Some(RatingPlan { stage, batches });
        self.advance(effects);
    }

    pub(super) fn pairs_built(&mut self, pairs: PairSets, effects: &mut Vec<Effect>) {
        let State::Working { iteration, phase: Phase::Pairing } = self.state else { return };
        if pairs.train.is_empty() {
            let why = format!(
                "iteration {iteration}: no pair is left to train on; the journal's counts give the reason of each drop"
            );
            self.end(Outcome::Failed(why), effects);
            return;
        }
        let detail = json!({ "train": pairs.train.len(), "held_out": pairs.held_out.len() });
        self.pairs = pairs;
        self.references.clear();
        self.commit(iteration, CommittedPhase::Paired, None, detail, effects);
        self.go_on(Position::Scoring(iteration), effects);
    }

    /// Scores the pairs in the passes of the first epoch, so that the first step
    /// computes the very same numbers, and the held-out ones after them.
    pub(super) fn begin_scoring(&mut self, k: Iteration, effects: &mut Vec<Effect>) {
        let world_size = self.shape.world_size;
        let mut commands: Vec<Vec<Command>> = vec![Vec::new(); world_size];
        let mut batch = 0;
        let mut add = |rank: usize, micro_batches: Vec<Vec<PairRef>>| {
            if !micro_batches.is_empty() {
                commands[rank].push(Command::Score { batch, micro_batches });
                batch += 1;
            }
        };
        let unscored = |pass: &[PairId]| -> Vec<PairRef> {
            pass.iter().map(|&id| PairRef { id, reference: None }).collect()
        };
        for plan in self.epoch_steps(k, Epoch(0)) {
            for (rank, passes) in plan.ranks.iter().enumerate() {
                add(rank, passes.iter().map(|pass| unscored(pass)).collect());
            }
        }
        for (rank, passes) in self.held_out_batches() {
            add(rank, passes.iter().map(|pass| unscored(pass)).collect());
        }
        let start = self.shape.extent.start_of(k);
        if self.shape.training.reference == Reference::Initial && start != ModelSource::Base {
            for rank in &mut commands {
                rank.insert(0, Command::LoadModel(ModelSource::Base));
                rank.push(Command::LoadModel(start));
            }
        }
        let total = self.pairs.train.len() + self.pairs.held_out.len();
        effects.push(Effect::Began(k, PhaseName::Scoring, None, total, 0));
        self.enter(k, Phase::Scoring(Stage::bound(commands)));
        self.advance(effects);
    }

    /// Trains an epoch, or what is left of it behind a snapshot.
    pub(super) fn begin_training(&mut self, k: Iteration, epoch: Epoch, effects: &mut Vec<Effect>) {
        if self.shape.world_size > 1 && !self.is_grouped {
            self.group(Some(Position::Training(k, epoch)), effects);
            return;
        }
        let steps = self.epoch_steps(k, epoch);
        let after = self.resume.after.take();
        let is_left = |plan: &&StepPlan| after.is_none_or(|after| plan.step > after);
        let total = steps.len() as u64 * u64::from(self.shape.extent.epochs(k));
        let mut commands: Vec<Vec<Command>> = vec![Vec::new(); self.shape.world_size];
        if epoch == Epoch(0) && after.is_none() {
            self.tokens = 0;
            self.watch = Watch::default();
            for rank in &mut commands {
                rank.push(Command::BeginTraining);
            }
        }
        for plan in steps.iter().filter(is_left) {
            for (rank, passes) in plan.ranks.iter().enumerate() {
                commands[rank].push(Command::TrainStep {
                    step: plan.step,
                    learning_rate: plan::learning_rate(&self.shape.training, plan.step.0, total),
                    global_pairs: plan.global_pairs,
                    micro_batches: passes
                        .iter()
                        .map(|pass| pass.iter().map(|&id| self.with_reference(id)).collect())
                        .collect(),
                });
            }
        }
        let left = steps.iter().filter(is_left).count();
        let before = steps.len() * (epoch.0 as usize + 1) - left;
        effects.push(Effect::Began(k, PhaseName::Training, Some(epoch), total as usize, before));
        let (stage, saves) = (Stage::bound(commands), Saves::begin(self.now));
        let gathering = Gathering::new();
        self.enter(k, Phase::Training { epoch, stage, steps, gathering, saves });
        self.advance(effects);
    }

    /// Joins a step once every rank has told its part.
    pub(super) fn join_step(&mut self, step: Step, effects: &mut Vec<Effect>) {
        let world_size = self.shape.world_size;
        let State::Working { iteration, phase: Phase::Training { epoch, steps, gathering, .. } } =
            &mut self.state
        else {
            return;
        };
        if gathering.get(&step).is_none_or(|ranks| ranks.len() < world_size) {
            return;
        }
        let (Some(ranks), Some(first)) = (gathering.remove(&step), steps.first()) else { return };
        let per_epoch = steps.len() as u64;
        let done = step.0 - first.step.0 + 1;
        let total = per_epoch * u64::from(self.shape.extent.epochs(*iteration));
        self.tokens += ranks.values().map(|part| part.tokens).sum::<u64>();
        let grad_norm = ranks.values().next().map_or(0.0, |part| part.grad_norm);
        let reduction = ReductionSeconds::mean(ranks.values());
        let size = |id| self.pairs.of_training(id);
        let pairs: Vec<_> = ranks
            .into_values()
            .flat_map(|part| part.pairs)
            .filter_map(|outcome| {
                let reference = *self.references.get(&outcome.id)?;
                Some(StepPair { outcome, size: size(outcome.id)?, reference })
            })
            .collect();
        let asked = steps.get(done as usize - 1).map_or(0, |plan| plan.global_pairs);
        if pairs.len() != asked as usize {
            let told = pairs.len();
            let why = format!("step {step}: workers told of {told} pairs, and {asked} were asked");
            self.end(Outcome::Failed(why), effects);
            return;
        }
        let training = &self.shape.training;
        let progress = Progress {
            learning_rate: plan::learning_rate(training, step.0, total),
            epoch: f64::from(epoch.0) + done as f64 / per_epoch as f64,
            num_tokens: self.tokens,
        };
        let (iteration, epoch, count) = (*iteration, *epoch, pairs.len());
        let metrics = StepMetrics::join(
            pairs,
            grad_norm,
            progress,
            &Objective::from(training),
            training.signal_threshold,
        );
        self.watch.steps.push(Signs::from(&metrics));
        effects.push(Effect::RecordStep {
            iteration,
            epoch,
            step,
            pairs: count,
            metrics,
            reduction,
        });
        for concern in health::concerns(&self.watch.steps) {
            if self.watch.told.insert(concern.name()) {
                effects.push(Effect::Warn(iteration, concern));
            }
        }
        if self.furthest < Some((iteration, step)) {
            self.furthest = Some((iteration, step));
            self.members.progressed();
        }
        self.step_joined(effects);
    }

    pub(super) fn begin_saving(&mut self, k: Iteration, epoch: Epoch, effects: &mut Vec<Effect>) {
        let world_size = self.shape.world_size;
        let id = SnapshotId::EndOf(k, epoch);
        let (kind, stage) = if epoch < self.shape.extent.last_epoch(k) {
            let save = vec![Command::SaveState(id)];
            (SnapshotKind::State, Stage::bound(vec![save; world_size]))
        } else {
            let save = Command::SaveModel(k, epoch);
            (SnapshotKind::Model, Stage::first(world_size, save))
        };
        effects.push(Effect::BeginSnapshot(id, kind));
        self.enter(k, Phase::Saving { epoch, stage, files: Vec::new() });
        self.advance(effects);
    }

    /// Every rank that was asked has written its part.
    pub(super) fn saved(
        &mut self,
        k: Iteration,
        epoch: Epoch,
        mut files: Vec<WrittenFile>,
        effects: &mut Vec<Effect>,
    ) {
        // Which rank answers first is chance.
        files.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(twice) = files.windows(2).find(|pair| pair[0].name == pair[1].name) {
            let why = format!("two workers wrote {}: one overwrote the other", twice[0].name);
            self.end(Outcome::Failed(why), effects);
            return;
        }
        effects.push(Effect::KeepSnapshot(SnapshotId::EndOf(k, epoch), files));
        self.commit(k, CommittedPhase::Trained, Some(epoch), json!({}), effects);
        self.go_on(Position::Evaluating(k, epoch), effects);
    }

    pub(super) fn begin_evaluating(
        &mut self,
        k: Iteration,
        epoch: Epoch,
        effects: &mut Vec<Effect>,
    ) {
        let mut commands: Vec<Vec<Command>> = vec![Vec::new(); self.shape.world_size];
        for (batch, (rank, passes)) in self.held_out_batches().into_iter().enumerate() {
            commands[rank].push(Command::Score {
                batch: batch as u64,
                micro_batches: passes
                    .iter()
                    .map(|pass| pass.iter().map(|&id| PairRef { id, reference: None }).collect())
                    .collect(),
            });
        }
        let total = self.pairs.held_out.len();
        effects.push(Effect::Began(k, PhaseName::Evaluating, Some(epoch), total, 0));
        let stage = Stage::bound(commands);
        self.enter(k, Phase::Evaluating { epoch, stage, policy: BTreeMap::new() });
        self.advance(effects);
    }

    pub(super) fn evaluated(&mut self, effects: &mut Vec<Effect>) {
        let State::Working { iteration, phase: Phase::Evaluating { epoch, policy, .. } } =
            &self.state
        else {
            return;
        };
        let (k, epoch) = (*iteration, *epoch);
        let scored: Vec<_> = self
            .pairs
            .held_out
            .iter()
            .filter_map(|&size: &PairSize| {
                let (policy, reference) = (policy.get(&size.id)?, self.references.get(&size.id)?);
                Some(ScoredPair { policy: *policy, reference: *reference, size })
            })
            .collect();
        let metrics = EvaluationMetrics::of(&scored, &Objective::from(&self.shape.training));
        let detail = metrics.map_or_else(|| json!({}), |metrics| json!(metrics));
        self.commit(k, CommittedPhase::Evaluated, Some(epoch), detail, effects);
        if epoch < self.shape.extent.last_epoch(k) {
            self.go_on(Position::Training(k, Epoch(epoch.0 + 1)), effects);
        } else {
            self.go_on(Position::Publishing(k), effects);
        }
    }

    pub(super) fn published(&mut self, effects: &mut Vec<Effect>) {
        let State::Working { iteration, phase: Phase::Publishing } = self.state else { return };
        self.commit(iteration, CommittedPhase::Published, None, json!({}), effects);
        self.go_on(self.shape.extent.after(iteration), effects);
    }

    pub(super) fn epoch_steps(&self, k: Iteration, epoch: Epoch) -> Vec<StepPlan> {
        self.shape.dealing().epoch_steps(&self.pairs.train, self.shape.seed, k, epoch)
    }

    pub(super) fn held_out_batches(&self) -> Vec<(usize, Vec<Vec<PairId>>)> {
        self.shape.dealing().evaluation_batches(&self.pairs.held_out)
    }

    pub(super) fn with_reference(&self, id: PairId) -> PairRef {
        PairRef { id, reference: self.references.get(&id).copied() }
    }
}
