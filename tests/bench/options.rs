//! What can be typed.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use drift_worker::model::product_kind;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::mix::Mix;
use crate::process::root;
use crate::sample::{Peer, Setting};

/// Measures DRIFT's training engine on this machine.
///
/// Timings mean something on a quiet machine only: close what computes beside.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) benchmark: Benchmark,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Benchmark {
    /// DPO training: ours beside TRL's DPOTrainer, in interleaved runs.
    ///
    /// Both sides get the same weights, the same token ids, the same batches and as
    /// many threads, and do all of an iteration's training work on the pairs:
    /// reference log-probabilities and optimiser steps. Starting a process, loading
    /// a model and the first step are not timed. Figures are medians over rounds; they are printed, and
    /// written to target/bench/dpo.json with every single run.
    Dpo(DpoOptions),
    /// Two workers with one thread each beside one worker with one thread.
    ///
    /// Both compute the same global batches. The figures are medians over rounds: the
    /// speed-up, and the share of the time that gradients take to be summed which is
    /// hidden behind computation. Written to target/bench/scaling.json.
    Scaling(ScalingOptions),
    /// Sampling: ours beside transformers' `generate` and llama.cpp, in interleaved runs.
    ///
    /// All sides get the same weights and prompts, the recipe's distribution, replies
    /// that end where the model ends them, and as many threads. Figures are medians over
    /// rounds; they are printed, and written to target/bench/sample.json.
    Sample(SampleOptions),
    /// One measured run of ours: what `dpo` starts.
    #[command(hide = true)]
    RunOurs { job: PathBuf },
    /// One measurement of the matrix rate: what `dpo` starts.
    #[command(hide = true)]
    RunRate { job: PathBuf },
    /// One measured run of ours: what `sample` starts.
    #[command(hide = true)]
    RunSample { job: PathBuf },
    /// One measurement of the memory's rate: what `sample` starts.
    #[command(hide = true)]
    RunBandwidth { job: PathBuf },
    /// One rank of a measured run: what `scaling` starts.
    #[command(hide = true)]
    RunRank { job: PathBuf },
}

#[derive(Debug, Args)]
pub(crate) struct DpoOptions {
    /// Lengths of prompt, chosen and rejected; may be given several times [default: all].
    #[arg(long = "mix", value_enum, value_name = "MIX")]
    pub(crate) mixes: Vec<Mix>,

    /// Runs of each side on each mix; medians are over these.
    #[arg(long, default_value_t = 3, value_parser = positive)]
    pub(crate) rounds: usize,

    /// Pairs of one run that are timed.
    #[arg(long, default_value_t = 8, value_parser = positive)]
    pub(crate) pairs: usize,

    /// Pairs of one optimiser step.
    #[arg(long, default_value_t = 4, value_parser = positive)]
    pub(crate) batch: usize,

    /// Steps ahead of these that are not timed, on either side: memory that a process has
    /// never touched is given to it slowly, on a virtual machine most of all.
    #[arg(long, default_value_t = 1, value_name = "STEPS")]
    pub(crate) warm_up: usize,

    /// Threads of each side.
    #[arg(long, default_value_t = 2, value_parser = positive)]
    pub(crate) threads: usize,

    /// In what both sides keep and compute [default: bf16 where the processor
    /// multiplies it, else f32, which is then TRL's best].
    #[arg(long, value_enum)]
    dtype: Option<DType>,

    /// Leave TRL out: only ours, and the fraction of the floor.
    #[arg(long)]
    pub(crate) skip_peer: bool,

    /// Runs of TRL with gradient checkpointing on each mix.
    #[arg(long, default_value_t = 1, value_name = "ROUNDS")]
    pub(crate) checkpointing_rounds: usize,

    /// Have TRL's allocator keep freed memory, in huge pages, as our workers' does;
    /// TRL's users do not have that.
    #[arg(long)]
    pub(crate) tune_peer: bool,

    #[command(flatten)]
    pub(crate) engine: EngineOptions,

    /// The model, a folder in Hugging Face format.
    #[arg(long, default_value_os_t = demo_model(), value_name = "DIR", hide_default_value = true)]
    pub(crate) model: PathBuf,

    /// Where the figures go.
    #[arg(long, default_value_os_t = output("dpo"), value_name = "FILE", hide_default_value = true)]
    pub(crate) output: PathBuf,
}

impl DpoOptions {
    pub(crate) fn dtype(&self) -> DType {
        self.dtype.unwrap_or_else(DType::fastest)
    }
}

#[derive(Debug, Args)]
pub(crate) struct ScalingOptions {
    /// Lengths of prompt, chosen and rejected.
    #[arg(long, value_enum, default_value_t = Mix::Even)]
    pub(crate) mix: Mix,

    /// Runs of one worker, and of two with each sharding; medians are over these.
    #[arg(long, default_value_t = 3, value_parser = positive)]
    pub(crate) rounds: usize,

    /// Pairs of one optimiser step over all workers.
    #[arg(long, default_value_t = 8, value_parser = positive)]
    pub(crate) pairs: usize,

    /// Pairs that a worker computes together.
    #[arg(long, default_value_t = 4, value_parser = positive)]
    pub(crate) micro_batch: usize,

    /// Steps that are timed in each run, after one that is not.
    #[arg(long, default_value_t = 2, value_parser = positive)]
    pub(crate) steps: usize,

    /// What each of two workers holds of gradients, masters and optimiser state; may be
    /// given several times [default: each].
    #[arg(long = "sharding", value_enum, value_name = "SHARDING")]
    shardings: Vec<Sharding>,

    /// In what kind the workers sum gradients.
    #[arg(long, value_enum, default_value_t = Reduce::F32)]
    pub(crate) reduce: Reduce,

    #[command(flatten)]
    pub(crate) engine: EngineOptions,

    /// The model, a folder in Hugging Face format.
    #[arg(long, default_value_os_t = demo_model(), value_name = "DIR", hide_default_value = true)]
    pub(crate) model: PathBuf,

    /// Where the figures go.
    #[arg(
        long, default_value_os_t = output("scaling"), value_name = "FILE", hide_default_value = true
    )]
    pub(crate) output: PathBuf,
}

impl ScalingOptions {
    pub(crate) fn shardings(&self) -> &[Sharding] {
        if self.shardings.is_empty() { Sharding::value_variants() } else { &self.shardings }
    }
}

#[derive(Debug, Args)]
pub(crate) struct SampleOptions {
    /// What is sampled; may be given several times [default: all].
    #[arg(long = "setting", value_enum, value_name = "SETTING")]
    pub(crate) settings: Vec<Setting>,

    /// Runs of each side on each setting; medians are over these.
    #[arg(long, default_value_t = 3, value_parser = positive)]
    pub(crate) rounds: usize,

    /// Tokens of a reply at most.
    #[arg(long, default_value_t = 256, value_name = "TOKENS")]
    pub(crate) max_new_tokens: u32,

    /// Prompts of a batch of `generate`.
    #[arg(long, default_value_t = 16, value_parser = positive)]
    pub(crate) batch: usize,

    /// Threads of each side.
    #[arg(long, default_value_t = 2, value_parser = positive)]
    pub(crate) threads: usize,

    /// In what both sides keep and compute [default: bf16 where the processor
    /// multiplies it, else f32, which is then the peers' best].
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<DType>,

    /// Whom ours is compared with; may be given several times [default: all].
    #[arg(long = "peer", value_enum, value_name = "PEER")]
    pub(crate) peers: Vec<Peer>,

    /// Leave the peers out: only ours, and the fraction of the floor.
    #[arg(long)]
    pub(crate) skip_peer: bool,

    /// The model, a folder in Hugging Face format.
    #[arg(long, default_value_os_t = demo_model(), value_name = "DIR", hide_default_value = true)]
    pub(crate) model: PathBuf,

    /// Where the figures go.
    #[arg(
        long, default_value_os_t = output("sample"), value_name = "FILE", hide_default_value = true
    )]
    pub(crate) output: PathBuf,
}

/// In what weights are kept, and computed.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DType {
    Bf16,
    F32,
}

impl DType {
    /// What this machine's processor multiplies fastest.
    pub(crate) fn fastest() -> Self {
        match product_kind(Kind::BFloat16, Device::Cpu) {
            Kind::BFloat16 => Self::Bf16,
            _ => Self::F32,
        }
    }

    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Bf16 => Kind::BFloat16,
            Self::F32 => Kind::Float,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

/// How our engine goes about it.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub(crate) struct EngineOptions {
    /// Packed tokens that our engine computes in one pass at most; a heavier batch
    /// is split into several.
    #[arg(long, default_value_t = 16384, value_name = "TOKENS", value_parser = positive)]
    pub(crate) max_tokens: usize,

    /// What a block of ours keeps for backward: `none` recomputes nothing, `all`
    /// everything but its input, and a number of MiB as much as needed to stay within.
    #[arg(long, default_value = "none", value_name = "none|all|MIB")]
    pub(crate) recompute: Recompute,
}

/// As [`drift_worker::train::Sharding`].
#[derive(Debug, Clone, Copy, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Sharding {
    None,
    Zero2,
}

impl Sharding {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zero2 => "zero2",
        }
    }
}

/// As [`drift_worker::train::ReduceKind`].
#[derive(Debug, Clone, Copy, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reduce {
    F32,
    Bf16,
}

/// As [`drift_worker::train::Recompute`], as it is typed and written.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Recompute {
    None,
    All,
    BudgetMib(u64),
}

impl FromStr for Recompute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "all" => Ok(Self::All),
            _ => text
                .parse()
                .map(Self::BudgetMib)
                .map_err(|_| "expected none, all, or a number of MiB such as 512".to_owned()),
        }
    }
}

impl From<Recompute> for drift_worker::train::Recompute {
    fn from(recompute: Recompute) -> Self {
        match recompute {
            Recompute::None => Self::None,
            Recompute::All => Self::All,
            Recompute::BudgetMib(mib) => Self::Auto { budget_bytes: mib << 20 },
        }
    }
}

impl From<Sharding> for drift_worker::train::Sharding {
    fn from(sharding: Sharding) -> Self {
        match sharding {
            Sharding::None => Self::None,
            Sharding::Zero2 => Self::Zero2,
        }
    }
}

impl From<Reduce> for drift_worker::train::ReduceKind {
    fn from(reduce: Reduce) -> Self {
        match reduce {
            Reduce::F32 => Self::Float,
            Reduce::Bf16 => Self::BFloat16,
        }
    }
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..) => Ok(number),
        _ => Err("expected a whole number from 1".to_owned()),
    }
}

fn demo_model() -> PathBuf {
    root().join(".cache/models/SmolLM2-135M-Instruct")
}

fn output(name: &str) -> PathBuf {
    root().join(format!("target/bench/{name}.json"))
}
