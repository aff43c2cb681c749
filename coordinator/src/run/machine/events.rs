//! What a run is made of, what happens to it, and what it asks to be done.

use std::time::Duration;

use super::{Extent, PairSets, Resume, SnapshotRule};
use crate::config::{PoisonShard, Settings, TrainingSettings};
use crate::domain::{Epoch, Iteration, PairId, PromptId, ReferenceLogps, Sample, ShardId, Step};
use crate::method;
use crate::run::command::{
    Command, Rank, Report, SaveSeconds, SnapshotId, StepOutcomes, WrittenFile,
};
use crate::run::health::Concern;
use crate::run::metrics::StepMetrics;
use crate::run::plan::{CostModel, Dealing, ShardRule};
use crate::store::CommittedPhase;

/// Seconds since the run's driver started. Handed in, never read.
pub type Now = Duration;

/// What a run is made of.
#[derive(Debug, Clone)]
pub struct RunShape {
    /// Worker processes, as the run goes on now.
    pub world_size: usize,
    /// Pairs of an optimiser step over all of them; the run began with it.
    pub global_batch: usize,
    /// What a pair costs.
    pub cost: CostModel,
    /// Seed of every plan.
    pub seed: u64,
    /// Iterations and epochs.
    pub extent: Extent,
    /// The recipe.
    pub training: TrainingSettings,
    /// Prompts of the iterations, with the lengths of their sampling prompts.
    pub prompts: Vec<(PromptId, usize)>,
    /// Replies that are drawn for each of them.
    pub replies: usize,
    /// Whether a reward model rates them before they make pairs.
    pub is_rated: bool,
    /// How prompts are divided into shards.
    pub sharding: ShardRule,
    /// Time that workers have to attach.
    pub start_timeout: Duration,
    /// Silence after which a worker counts as lost.
    pub heartbeat_deadline: Duration,
    /// Losses without progress in between that the run bears.
    pub max_losses: u32,
    /// Workers that may be lost over one shard before it is set aside.
    pub shard_tries: u32,
    /// Whether the run goes on without such a shard.
    pub skip_poison: bool,
    /// When training state is saved inside an epoch.
    pub snapshots: SnapshotRule,
}

impl RunShape {
    /// The shape that settings and prompts give, for as many workers as there
    /// are now; the settings name those that the run began with.
    pub fn new(
        settings: &Settings,
        workers: u32,
        cost: CostModel,
        prompts: Vec<(PromptId, usize)>,
        is_rated: bool,
    ) -> Self {
        Self {
            world_size: workers as usize,
            global_batch: settings.training.pairs_per_worker * settings.workers as usize,
            cost,
            seed: settings.seed,
            extent: Extent {
                iterations: settings.training.iterations,
                warm_start_epochs: settings.training.warm_start_epochs,
                epochs: settings.training.epochs,
            },
            training: settings.training.clone(),
            prompts,
            replies: method::of(settings.method).prompts(settings.sampling.guidance).len(),
            is_rated,
            sharding: ShardRule {
                prompts: settings.sampling.shard_prompts,
                workers: settings.workers as usize,
                new_tokens: settings.sampling.max_new_tokens as usize,
            },
            start_timeout: Duration::from_secs_f64(settings.launch.start_timeout),
            heartbeat_deadline: Duration::from_secs_f64(settings.launch.heartbeat_deadline),
            max_losses: settings.launch.max_losses,
            shard_tries: settings.launch.shard_tries,
            skip_poison: settings.launch.poison_shard == PoisonShard::Skip,
            snapshots: SnapshotRule {
                steps: settings.run.snapshot_steps,
                period: Duration::from_secs_f64(settings.run.snapshot_minutes * 60.0),
            },
        }
    }

    /// How batches are cut and dealt out.
    pub fn dealing(&self) -> Dealing {
        Dealing {
            global_batch: self.global_batch,
            world_size: self.world_size,
            max_tokens: self.training.max_tokens,
            cost: self.cost,
        }
    }
}

/// What summing gradients over ranks took in one step, as means over the ranks.
/// It depends on the clock: no metric, and no decision rests on it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ReductionSeconds {
    /// While a reduction was under way.
    pub busy: f64,
    /// Of these, while a rank did nothing but wait for it.
    pub exposed: f64,
}

impl ReductionSeconds {
    /// Over the ranks' parts of a step.
    pub fn mean<'a>(parts: impl ExactSizeIterator<Item = &'a StepOutcomes>) -> Self {
        let ranks = parts.len().max(1) as f64;
        parts.fold(Self::default(), |mean, part| Self {
            busy: mean.busy + part.reduce_seconds / ranks,
            exposed: mean.exposed + part.exposed_seconds / ranks,
        })
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A worker proved itself and took its place, or did what [`Effect::Call`] asks.
    Attached(Rank),
    /// A worker is gone: its stream closed or its process was killed.
    Lost(Rank, String),
    /// A worker's process ended by itself before it attached.
    StartFailed(Rank, String),
    /// A heartbeat.
    Heard(Rank),
    /// A worker tells something.
    Told(Rank, Report),
    /// What [`Effect::Rewind`] found.
    Rewound(Box<Resume>),
    /// What is to be rated is batched: of so many samples each.
    RatingPlanned(Vec<usize>),
    /// The iteration's pairs are built and in `pairs.parquet`.
    PairsBuilt(PairSets),
    /// The iteration's checkpoint is in its place.
    CheckpointPublished,
    /// An effect could not be carried out.
    EffectFailed(String),
    /// Ctrl-C or SIGTERM.
    StopRequested,
    /// SIGUSR1: it is to stop soon, and what is under way to be kept.
    LeaveRequested,
    /// Time passed.
    Tick,
}

/// Something to be done. Carried out in order; a commit is on disk before the
/// next effect begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Give a worker a command.
    Send(Rank, Command),
    /// Record that a phase is complete.
    Commit {
        /// Of this iteration.
        iteration: Iteration,
        /// Which phase.
        phase: CommittedPhase,
        /// Which epoch, where the phase has them.
        epoch: Option<Epoch>,
        /// What it amounted to.
        detail: serde_json::Value,
    },
    /// Keep a shard's samples.
    RecordShard(Iteration, ShardId, Vec<Sample>),
    /// Keep what the reward model says of a batch's samples, in its order.
    RecordRatings(Iteration, u64, Vec<f64>),
    /// Keep reference log-probabilities.
    RecordReferences(Iteration, Vec<(PairId, ReferenceLogps)>),
    /// Keep a step's metrics.
    RecordStep {
        /// Of this iteration.
        iteration: Iteration,
        /// Of this epoch.
        epoch: Epoch,
        /// Which step.
        step: Step,
        /// Pairs it trained on.
        pairs: usize,
        /// What it measured.
        metrics: StepMetrics,
        /// What its reductions took.
        reduction: ReductionSeconds,
    },
    /// Tell people that training may be going wrong; once for each concern in an
    /// iteration.
    Warn(Iteration, Concern),
    /// Make the empty folder that workers write training state, or the model, into.
    BeginSnapshot(SnapshotId, SnapshotKind),
    /// Give what workers wrote its name among the snapshots.
    KeepSnapshot(SnapshotId, Vec<WrittenFile>),
    /// Tell people what a snapshot inside an epoch took.
    SnapshotKept(SnapshotId, SaveSeconds),
    /// Tell people that training state inside an epoch could not be saved.
    SnapshotFailed(SnapshotId, String),
    /// Tell people that a worker is lost; end its process if there is one, and
    /// listen to it no more.
    Lost(Rank, String),
    /// Tell people that a command failed.
    Failed(Rank, String),
    /// Start a worker, once the one before it is gone.
    Start(Rank),
    /// Begin a new generation with these workers: they drop what they hold and say
    /// that they did.
    Call(Vec<Rank>),
    /// Read where the run stands from its directory; `Rewound` follows.
    Rewind,
    /// Keep that a shard is left out, and tell people why.
    SetAside(Iteration, ShardId, String),
    /// Batch what the reward model is to read of the iteration's samples;
    /// `RatingPlanned` follows.
    PlanRating(Iteration),
    /// Build the iteration's pairs; `PairsBuilt` follows.
    BuildPairs(Iteration),
    /// Complete and publish the checkpoint; `CheckpointPublished` follows.
    Publish(Iteration, Epoch),
    /// Tell people that a phase began, with what it has to do and what of it is done.
    Began(Iteration, PhaseName, Option<Epoch>, usize, usize),
    /// Tell workers to drop their work and leave.
    Dismiss,
    /// The run is over.
    End(Outcome),
}

/// What is written at an epoch's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotKind {
    /// Training state, from every rank: another epoch follows.
    State,
    /// The model, from rank 0, to be published.
    Model,
}

/// Phases as people see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PhaseName {
    /// Workers start, form their group and load the model. Counts workers.
    Preparing,
    /// Counts prompts.
    Sampling,
    /// Counts replies.
    Rating,
    /// Counts nothing.
    Pairing,
    /// Counts pairs.
    Scoring,
    /// Counts steps.
    Training,
    /// Counts pairs.
    Evaluating,
    /// Counts nothing.
    Publishing,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All iterations are published.
    Finished,
    /// It was asked to stop; what is committed stands.
    Stopped,
    /// It cannot go on; what is committed stands.
    Failed(String),
}
