//! What workers are told, and what they tell: ids and numbers, never text.

use serde::{Deserialize, Serialize};

use super::metrics::PairOutcome;
use crate::domain::{Epoch, Iteration, PairId, ReferenceLogps, Sample, ShardId, Step};

/// A worker's place in the process group, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rank(pub u32);

impl std::fmt::Display for Rank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Rank {
    /// The rank as an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where weights are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelSource {
    /// The model that the run began with.
    Base,
    /// A published checkpoint.
    Checkpoint(Iteration),
    /// The weights at an epoch's end, not yet published.
    Snapshot(Iteration, Epoch),
}

/// Training state on disk: when it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SnapshotId {
    /// At an epoch's end.
    EndOf(Iteration, Epoch),
    /// Inside an epoch, behind a step of the iteration.
    After(Iteration, Step),
}

impl SnapshotId {
    /// The iteration that it belongs to.
    pub fn iteration(self) -> Iteration {
        match self {
            Self::EndOf(iteration, _) | Self::After(iteration, _) => iteration,
        }
    }
}

/// A pair by its id, with its reference log-probabilities once they are known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairRef {
    /// Which pair.
    pub id: PairId,
    /// log π_ref of both sides.
    pub reference: Option<ReferenceLogps>,
}

/// A command to one worker. Each gets exactly one final [`Report`].
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Form the process group; rank 0 gets no address and opens the store.
    OpenGroup {
        /// Counts the groups that this coordinator formed: keeps their keys apart.
        number: u64,
        /// Where rank 0's store listens.
        store: Option<String>,
    },
    /// Load weights.
    LoadModel(ModelSource),
    /// Sample the prompts of one shard.
    Sample {
        /// Part of the key of every random number.
        iteration: Iteration,
        /// Which shard.
        shard: ShardId,
    },
    /// Log-probabilities of both sides under the current weights.
    Score {
        /// Number that the answer repeats.
        batch: u64,
        /// Pairs computed together.
        micro_batches: Vec<Vec<PairRef>>,
    },
    /// What the reward model says of samples.
    Rate {
        /// Which of the planned batches.
        batch: u64,
    },
    /// Fresh masters and optimiser state.
    BeginTraining,
    /// One optimiser step.
    TrainStep {
        /// Which, within the iteration.
        step: Step,
        /// At this rate.
        learning_rate: f64,
        /// Over this many pairs on all ranks.
        global_pairs: u32,
        /// This rank's share.
        micro_batches: Vec<Vec<PairRef>>,
    },
    /// Write this rank's part of masters and optimiser state. At an epoch's end the
    /// answer is [`Report::StateSaved`]; inside one the part is copied, which is
    /// answered by [`Report::Done`], and written beside the next steps.
    SaveState(SnapshotId),
    /// Read back what of all parts the rank needs.
    LoadState(SnapshotId),
    /// Write the weights as a checkpoint's files.
    SaveModel(Iteration, Epoch),
}

/// A file that a worker wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenFile {
    /// Name within its folder.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// SHA-256.
    pub sha256: [u8; 32],
}

/// What a snapshot inside an epoch took. It depends on the clock: people are told,
/// and nothing rests on it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SaveSeconds {
    /// Training stood still for the copy.
    pub copy: f64,
    /// Writing it, beside training.
    pub write: f64,
}

/// One rank's part of an optimiser step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutcomes {
    /// Which step.
    pub step: Step,
    /// Norm of the mean gradient over all ranks, before clipping.
    pub grad_norm: f64,
    /// The rank's pairs.
    pub pairs: Vec<PairOutcome>,
    /// Tokens the rank computed.
    pub tokens: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// Seconds during which a reduction over ranks was under way.
    pub reduce_seconds: f64,
    /// Seconds of these in which the rank did nothing but wait for it.
    pub exposed_seconds: f64,
}

/// What a worker tells.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// Rank 0's store listens here. Not final: `Done` follows.
    StoreListening(String),
    /// A command with nothing else to tell is done.
    Done,
    /// Weights are loaded.
    ModelReady {
        /// Number of parameters.
        parameters: u64,
    },
    /// Tokens drawn in a shard so far. Not final.
    SampleProgress {
        /// Which shard.
        shard: ShardId,
        /// Tokens drawn.
        tokens: u64,
        /// Rows finished.
        finished: u32,
    },
    /// A shard is sampled.
    ShardDone {
        /// Which.
        shard: ShardId,
        /// All of its samples.
        samples: Vec<Sample>,
    },
    /// A batch is scored.
    Scored {
        /// Which.
        batch: u64,
        /// Sums over response tokens.
        logps: Vec<(PairId, ReferenceLogps)>,
    },
    /// A batch is rated.
    Rated {
        /// Which.
        batch: u64,
        /// Of each of its samples, in order; higher is better.
        ratings: Vec<f64>,
    },
    /// A step is made.
    Stepped(StepOutcomes),
    /// The rank's part of masters and optimiser state is written; maybe no file at all.
    StateSaved(Vec<WrittenFile>),
    /// The rank's part of a snapshot inside an epoch is written. Not final.
    SnapshotWritten {
        /// The step that it was taken behind.
        step: Step,
        /// What was written; maybe no file at all.
        files: Vec<WrittenFile>,
        /// What it took.
        seconds: SaveSeconds,
    },
    /// The rank's part of a snapshot inside an epoch could not be written. Not final.
    SnapshotFailed {
        /// The step that it was taken behind.
        step: Step,
        /// Why.
        why: String,
    },
    /// Weights are written.
    ModelSaved(Vec<WrittenFile>),
    /// The command in hand failed.
    Failed(String),
}

impl Report {
    /// Whether it answers a command, rather than telling of one under way.
    pub fn is_final(&self) -> bool {
        !matches!(
            self,
            Self::StoreListening(_)
                | Self::SampleProgress { .. }
                | Self::SnapshotWritten { .. }
                | Self::SnapshotFailed { .. }
        )
    }
}
