//! One measured run: what it is told, what it measures, and our side of it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::hint::black_box;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use drift_worker::LIBTORCH_VERSION;
use drift_worker::model::Decoder;
use drift_worker::sample::{Prompt, SampleError, Sampler, SamplingEngine, SamplingParams, Shard};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::machine::peak_bytes;
use crate::options::DType;

/// One run of any side. The peers' scripts read the same file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SampleJob {
    pub(super) model: PathBuf,
    pub(super) threads: usize,
    pub(super) dtype: DType,
    pub(super) prompts: Vec<Vec<u32>>,
    pub(super) params: Params,
    /// Prompts of a batch of `generate`.
    pub(super) batch: usize,
    pub(super) seed: u64,
    pub(super) drafting: bool,
    /// Where llama.cpp finds the model in its own format, or leaves it.
    pub(super) gguf: PathBuf,
}

/// The recipe's distribution.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Params {
    pub(super) temperature: f64,
    pub(super) top_p: f64,
    pub(super) max_new_tokens: u32,
    pub(super) stop_ids: Vec<u32>,
}

/// What a run of any side measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SampleRun {
    /// From the first prompt to the last token.
    pub(super) seconds: f64,
    /// Tokens of each reply.
    pub(super) lengths: Vec<usize>,
    pub(super) peak_bytes: u64,
    /// What it took; of ours alone.
    pub(super) work: Option<Value>,
    /// What all replies' ids hash to; of ours alone.
    pub(super) replies: Option<u64>,
    pub(super) versions: BTreeMap<String, String>,
}

impl SampleRun {
    pub(super) fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    pub(super) fn tokens_per_s(&self) -> f64 {
        self.tokens() as f64 / self.seconds
    }
}

/// Our side: one run, in a process of its own.
pub(crate) fn run_ours(job: &SampleJob) -> Result<SampleRun> {
    tch::set_num_threads(job.threads as i32);
    let model = Decoder::load(&job.model, job.dtype.kind(), Device::Cpu)?;
    let Params { temperature, top_p, max_new_tokens, ref stop_ids } = job.params;
    let prompt = |(at, tokens): (usize, &Vec<u32>)| Prompt {
        prompt: at as u64,
        index: 0,
        tokens: tokens.clone(),
    };
    let shard = Shard {
        seed: job.seed,
        iteration: 1,
        params: SamplingParams {
            temperature,
            top_p,
            max_new_tokens,
            stop_ids: stop_ids.clone(),
            ..SamplingParams::default()
        },
        engine: SamplingEngine { drafting: job.drafting, ..SamplingEngine::default() },
        prompts: job.prompts.iter().enumerate().map(prompt).collect(),
    };
    // Not timed: a first step, in which a process gets its memory.
    let stopped = Sampler::new(&model)?.sample(&shard, &mut |_| ControlFlow::Break(()));
    ensure!(matches!(stopped, Err(SampleError::Stopped)), "{stopped:?}");
    let begun = Instant::now();
    let sampled = Sampler::new(&model)?.sample(&shard, &mut |_| ControlFlow::Continue(()))?;
    let seconds = begun.elapsed().as_secs_f64();
    let work = sampled.work;
    let mut replies = DefaultHasher::new();
    sampled.samples.iter().for_each(|sample| sample.tokens.hash(&mut replies));
    Ok(SampleRun {
        seconds,
        lengths: sampled.samples.iter().map(|sample| sample.tokens.len()).collect(),
        peak_bytes: peak_bytes(Path::new("/proc/self"))?,
        work: Some(json!({
            "steps": work.steps,
            "prefilled": work.prefilled,
            "guessed": work.guessed,
            "guessed_right": work.guessed_right,
        })),
        replies: Some(replies.finish()),
        versions: [("libtorch".to_owned(), LIBTORCH_VERSION.to_owned())].into(),
    })
}

/// Bytes per second that this machine reads from memory, in a process of its own.
pub(crate) fn bandwidth(job: &SampleJob) -> f64 {
    tch::set_num_threads(job.threads as i32);
    // Larger than any cache.
    let elements = 128 << 20;
    let memory = Tensor::ones([elements], (Kind::Float, Device::Cpu));
    let once = |_| {
        let start = Instant::now();
        drop(black_box(memory.sum(Kind::Float)));
        start.elapsed().as_secs_f64()
    };
    let fastest = (0..5).map(once).fold(f64::INFINITY, f64::min);
    4.0 * elements as f64 / fastest
}
