//! `bench sample`: ours beside transformers' `generate`, in interleaved runs.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::ValueEnum;
use drift_coordinator::config::{Base, Guidance, Layers};
use drift_coordinator::run::driver::prepare;
use drift_worker::LIBTORCH_VERSION;
use drift_worker::model::{Decoder, ModelConfig, product_kind};
use drift_worker::sample::{Prompt, Sampler, SamplingEngine, SamplingParams, Shard};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::floor::{Rate, RateJob};
use crate::machine::{self, peak_bytes};
use crate::options::{DType, SampleOptions};
use crate::process::{start_ours, start_python};
use crate::report::{self, median};

/// What is sampled.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Setting {
    /// 16 prompts: one batch of `generate`.
    #[value(name = "prompts-16")]
    Prompts16,
    /// 64 prompts of mixed length: guided and unguided ones of 32 conversations.
    #[value(name = "prompts-64-mixed")]
    Prompts64Mixed,
}

impl Setting {
    fn name(self) -> &'static str {
        match self {
            Self::Prompts16 => "prompts-16",
            Self::Prompts64Mixed => "prompts-64-mixed",
        }
    }
}

/// One run of either side. `sample_generate.py` reads the same file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SampleJob {
    model: PathBuf,
    threads: usize,
    dtype: DType,
    prompts: Vec<Vec<u32>>,
    params: Params,
    /// Prompts of a batch of `generate`.
    batch: usize,
    seed: u64,
    drafting: bool,
}

/// The recipe's distribution.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Params {
    temperature: f64,
    top_p: f64,
    max_new_tokens: u32,
    stop_ids: Vec<u32>,
}

/// What a run of either side measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SampleRun {
    /// From the first prompt to the last token.
    seconds: f64,
    /// Tokens of each reply.
    lengths: Vec<usize>,
    peak_bytes: u64,
    /// What it took; of ours alone.
    work: Option<Value>,
    versions: BTreeMap<String, String>,
}

impl SampleRun {
    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn tokens_per_s(&self) -> f64 {
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
    let begun = Instant::now();
    let sampled = Sampler::new(&model)?.sample(&shard, &mut |_| ControlFlow::Continue(()))?;
    let seconds = begun.elapsed().as_secs_f64();
    let work = sampled.work;
    Ok(SampleRun {
        seconds,
        lengths: sampled.samples.iter().map(|sample| sample.tokens.len()).collect(),
        peak_bytes: peak_bytes()?,
        work: Some(json!({
            "steps": work.steps,
            "prefilled": work.prefilled,
            "guessed": work.guessed,
            "guessed_right": work.guessed_right,
        })),
        versions: [("libtorch".to_owned(), LIBTORCH_VERSION.to_owned())].into(),
    })
}

pub(crate) fn run(options: &SampleOptions) -> Result<()> {
    let config = ModelConfig::read(&options.model).context("run `make setup` first")?;
    let dtype = options.dtype.unwrap_or_else(DType::fastest);
    let (guided, stop_ids) = prompts(options, Guidance::On)?;
    let (unguided, _) = prompts(options, Guidance::Off)?;
    let settings = if options.settings.is_empty() {
        Setting::value_variants().to_vec()
    } else {
        options.settings.clone()
    };
    let mut figures = json!({
        "benchmark": "sample",
        "date": jiff::Timestamp::now().to_string(),
        "machine": machine::describe()?,
        "threads": options.threads,
        "rounds": options.rounds,
        "dtype": dtype,
        "model": options.model.file_name().map(|name| name.to_string_lossy()),
    });
    let mut mixes = Map::new();
    let mut rows = Vec::new();
    for setting in settings {
        let prompts: Vec<Vec<u32>> = match setting {
            Setting::Prompts16 => guided.iter().take(16).cloned().collect(),
            Setting::Prompts64Mixed => {
                guided.iter().take(32).chain(unguided.iter().take(32)).cloned().collect()
            }
        };
        let job = SampleJob {
            model: options.model.clone(),
            threads: options.threads,
            dtype,
            prompts,
            params: Params {
                temperature: 0.7,
                top_p: 0.9,
                max_new_tokens: options.max_new_tokens,
                stop_ids: stop_ids.clone(),
            },
            batch: options.batch,
            seed: 42,
            drafting: true,
        };
        let plain = SampleJob { drafting: false, ..job.clone() };
        let rate_job = RateJob {
            model: job.model.clone(),
            threads: job.threads,
            dtype,
            tokens: 512,
            rows: 64,
        };
        let (mut ours, mut undrafted, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        let (mut rates, mut bandwidths) = (Vec::new(), Vec::new());
        for round in 0..options.rounds {
            let say = |what: &str, run: &SampleRun| {
                eprintln!(
                    "{} {}/{}: {what}: {} tokens in {:.1} s, {:.0} tokens/s, peak {} MiB{}",
                    setting.name(),
                    round + 1,
                    options.rounds,
                    run.tokens(),
                    run.seconds,
                    run.tokens_per_s(),
                    run.peak_bytes >> 20,
                    run.work.as_ref().map_or_else(String::new, |work| format!(", {work}")),
                );
            };
            rates.push(start_ours("run-rate", &rate_job)?.answer::<Rate>()?.model_shapes);
            bandwidths.push(start_ours("run-bandwidth", &job)?.answer::<f64>()?);
            let run = start_ours("run-sample", &job)?.answer()?;
            say("ours", &run);
            ours.push(run);
            let run = start_ours("run-sample", &plain)?.answer()?;
            say("ours, without drafting", &run);
            undrafted.push(run);
            if !options.skip_peer {
                let run = start_python("sample_generate.py", &job, job.threads, false)?.answer()?;
                say("generate", &run);
                theirs.push(run);
            }
        }
        let best = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        let floor = Floor::of(&config, &job, &ours[0].lengths, best(&rates), best(&bandwidths));
        let speed = |runs: &[SampleRun]| median(runs.iter().map(SampleRun::tokens_per_s));
        let seconds = median(ours.iter().map(|run| run.seconds)).context("no run")?;
        let our_speed = speed(&ours).context("no run")?;
        let side = |runs: &[SampleRun]| {
            json!({
                "tokens_per_s": speed(runs),
                "seconds": median(runs.iter().map(|run| run.seconds)),
                "peak_bytes": median(runs.iter().map(|run| run.peak_bytes as f64)),
                "runs": runs,
            })
        };
        mixes.insert(
            setting.name().to_owned(),
            json!({
                "ratio_generate": speed(&theirs).map(|theirs| our_speed / theirs),
                "ratio_drafting": speed(&undrafted).map(|plain| our_speed / plain),
                "fraction_of_floor": floor.seconds / seconds,
                "floor": floor,
                "prompt_tokens": job.prompts.iter().map(Vec::len).sum::<usize>(),
                "ours": side(&ours),
                "ours_without_drafting": side(&undrafted),
                "generate": (!theirs.is_empty()).then(|| side(&theirs)),
            }),
        );
        for (name, runs) in
            [("ours", &ours), ("ours, without drafting", &undrafted), ("generate", &theirs)]
        {
            let Some(tokens_per_s) = speed(runs) else { continue };
            let peak = median(runs.iter().map(|run| run.peak_bytes as f64)).unwrap_or(0.0);
            let runs_seconds = median(runs.iter().map(|run| run.seconds)).unwrap_or(0.0);
            rows.push([
                if name == "ours" { setting.name().to_owned() } else { String::new() },
                name.to_owned(),
                format!("{tokens_per_s:.0}"),
                format!("{runs_seconds:.1}"),
                format!("{:.0}", peak / f64::from(1 << 20)),
                if name == "ours" {
                    format!("{:.0} %", 100.0 * floor.seconds / seconds)
                } else {
                    String::new()
                },
                format!("{:.2} ×", our_speed / tokens_per_s),
            ]);
        }
        // After each: a benchmark that is cut short has told what it knew.
        figures["settings"] = json!(mixes);
        report::write(&options.output, &figures)?;
    }
    let header = ["setting", "side", "tokens/s", "seconds", "peak MiB", "of floor", "ours is at"];
    println!("\n{}", report::table(&header, &rows));
    println!(
        "\ncomputed in {}. of floor: the time that the operations of the prompts and of each \
         decoding step take at the measured matrix rate, or its bytes at the measured bandwidth, \
         whichever is longer, over the time taken.\nwritten to {}",
        dtype.name(),
        options.output.display()
    );
    Ok(())
}

/// Token ids of the demo's sampling prompts, and what ends a reply.
fn prompts(options: &SampleOptions, guidance: Guidance) -> Result<(Vec<Vec<u32>>, Vec<u32>)> {
    let mut settings =
        Layers { base: Base::Demo, overrides: Vec::new(), ignore_environment: true }.load()?;
    settings.sampling.guidance = guidance;
    // The date is in no prompt of the demo's, but must be one.
    settings.text.today = "2026-01-01".to_owned();
    let prepared = prepare(&settings, &options.model, &mut |_, _, _| {})?;
    let stop_ids = prepared.text.stop_ids().to_vec();
    Ok((prepared.prompts, stop_ids))
}

/// The least time that the replies of a run can take on this machine.
#[derive(Debug, Serialize)]
struct Floor {
    seconds: f64,
    prompts_seconds: f64,
    decoding_seconds: f64,
    /// Operations per second on matrices.
    matrix_rate: f64,
    /// Bytes per second, read.
    bandwidth: f64,
}

impl Floor {
    /// All rows decode together from the first token on; every step reads all weights
    /// once, and every live row's keys and values.
    fn of(
        config: &ModelConfig,
        job: &SampleJob,
        replies: &[usize],
        matrix_rate: f64,
        bandwidth: f64,
    ) -> Self {
        let kind = product_kind(job.dtype.kind(), Device::Cpu);
        let bytes = kind.elt_size_in_bytes() as f64;
        let query_width = (config.num_attention_heads * config.head_dim) as f64;
        let kv_width = (config.num_key_value_heads * config.head_dim) as f64;
        let (hidden, layers) = (config.hidden_size as f64, config.num_hidden_layers as f64);
        let block = hidden * (2.0 * query_width + 2.0 * kv_width)
            + 3.0 * hidden * config.intermediate_size as f64;
        let head = hidden * config.vocab_size as f64;
        let attended = 4.0 * query_width * layers;
        let prompt = |tokens: &Vec<u32>| {
            let n = tokens.len() as f64;
            2.0 * block * layers * n + attended * n * (n + 1.0) / 2.0 + 2.0 * head
        };
        let prompts_seconds = job.prompts.iter().map(prompt).sum::<f64>() / matrix_rate;
        let longest = replies.iter().copied().max().unwrap_or(0);
        // The first token of each reply comes with its prompt.
        let step = |at: usize| {
            let live = job.prompts.iter().zip(replies).filter(|(_, reply)| **reply > at);
            let contexts: Vec<f64> = live.map(|(prompt, _)| (prompt.len() + at) as f64).collect();
            let held: f64 = contexts.iter().sum();
            let operations =
                2.0 * (block * layers + head) * contexts.len() as f64 + attended * held;
            let read = bytes * (block * layers + head + 2.0 * kv_width * layers * held);
            (operations / matrix_rate).max(read / bandwidth)
        };
        let decoding_seconds = (1..longest).map(step).sum();
        let seconds = prompts_seconds + decoding_seconds;
        Self { seconds, prompts_seconds, decoding_seconds, matrix_rate, bandwidth }
    }
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
