//! What the engine is told, and what it tells.

use std::path::PathBuf;
use std::time::Duration;

use tch::Kind;

use crate::model::SavedFile;
use crate::sample::{self, Sample};
use crate::train::{MicroBatch, PairLogps, StepReport, TrainStep, TrainingSettings};

/// What the engine is told.
#[derive(Debug)]
pub(in crate::agent) enum Command {
    Stop,
    OpenGroup {
        number: u64,
        store: Option<String>,
        timeout: Duration,
    },
    LoadModel {
        directory: PathBuf,
        kind: Kind,
    },
    Sample {
        number: u64,
        shard: sample::Shard,
    },
    Score {
        batch: u64,
        micro_batches: Vec<MicroBatch>,
    },
    Embed {
        batch: u64,
        sequences: Vec<Vec<u32>>,
    },
    Rate {
        batch: u64,
        /// The reward model's.
        directory: PathBuf,
        kind: Kind,
        sequences: Vec<Vec<u32>>,
    },
    BeginTraining(TrainingSettings),
    TrainStep(TrainStep),
    SaveState(PathBuf),
    /// Copy now, write beside the next commands.
    SaveStateBeside {
        directory: PathBuf,
        step: u64,
    },
    LoadState(PathBuf),
    SaveModel(PathBuf),
}

impl Command {
    /// As metrics name it.
    pub(in crate::agent) fn name(&self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::OpenGroup { .. } => "open_group",
            Self::LoadModel { .. } => "load_model",
            Self::Sample { .. } => "sample",
            Self::Score { .. } => "score",
            Self::Embed { .. } => "embed",
            Self::Rate { .. } => "rate",
            Self::BeginTraining(_) => "begin_training",
            Self::TrainStep(_) => "train_step",
            Self::SaveState(_) | Self::SaveStateBeside { .. } => "save_state",
            Self::LoadState(_) => "load_state",
            Self::SaveModel(_) => "save_model",
        }
    }
}

/// What it tells.
#[derive(Debug)]
pub(in crate::agent) enum Reply {
    StoreListening(String),
    Done,
    ModelReady {
        parameters: u64,
    },
    SampleProgress {
        shard: u64,
        tokens: u64,
        finished: u32,
    },
    Sampled {
        shard: u64,
        samples: Vec<Sample>,
        seconds: f64,
    },
    Scored {
        batch: u64,
        logps: Vec<PairLogps>,
    },
    Embedded {
        batch: u64,
        embeddings: Vec<Vec<f32>>,
    },
    Rated {
        batch: u64,
        ratings: Vec<f64>,
    },
    Stepped {
        step: u64,
        report: StepReport,
        seconds: f64,
    },
    StateSaved(Vec<SavedFile>),
    SnapshotWritten {
        step: u64,
        /// `Err` carries why not.
        saved: Result<Vec<SavedFile>, String>,
        copy_seconds: f64,
        write_seconds: f64,
    },
    ModelSaved(Vec<SavedFile>),
    Failed(String),
}

impl Reply {
    /// Whether it answers a command, rather than telling of one under way.
    pub(in crate::agent) fn is_final(&self) -> bool {
        !matches!(
            self,
            Self::StoreListening(_) | Self::SampleProgress { .. } | Self::SnapshotWritten { .. }
        )
    }
}
