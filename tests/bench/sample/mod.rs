//! `bench sample`: ours beside transformers and llama.cpp, in interleaved runs.

mod floor;
mod job;
mod report;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use clap::ValueEnum;
use drift_coordinator::config::{Base, Guidance, Layers};
use drift_coordinator::run::driver::prepare;
use drift_coordinator::text::DEFAULT_INSTRUCTION;
use drift_worker::model::ModelConfig;

use self::floor::Floor;
use self::job::{Params, SampleJob, SampleRun};
pub(crate) use self::job::{bandwidth, run_ours};
use self::report::Report;
use crate::floor::{Rate, RateJob};
use crate::options::{DType, SampleOptions};
use crate::process::{Running, root, start_ours, start_python};
use crate::report::write;

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

/// Whom ours is compared with.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Peer {
    /// transformers' `generate`, on padded batches.
    Generate,
    /// llama.cpp, with a sequence for each prompt.
    LlamaCpp,
}

/// Who samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Ours,
    WithoutDrafting,
    Generate,
    LlamaCpp,
}

impl Side {
    /// In the table.
    fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::WithoutDrafting => "ours, without drafting",
            Self::Generate => "generate",
            Self::LlamaCpp => "llama.cpp",
        }
    }

    /// In the JSON.
    fn key(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::WithoutDrafting => "ours_without_drafting",
            Self::Generate => "generate",
            Self::LlamaCpp => "llama_cpp",
        }
    }

    /// In the JSON, how many times its speed is ours.
    fn ratio(self) -> Option<&'static str> {
        match self {
            Self::Ours => None,
            Self::WithoutDrafting => Some("ratio_drafting"),
            Self::Generate => Some("ratio_generate"),
            Self::LlamaCpp => Some("ratio_llama_cpp"),
        }
    }

    fn start(self, job: &SampleJob) -> Result<Running> {
        let python = |script| start_python(script, job, job.threads, false);
        match self {
            Self::Ours => start_ours("run-sample", job),
            Self::WithoutDrafting => {
                start_ours("run-sample", &SampleJob { drafting: false, ..job.clone() })
            }
            Self::Generate => python("sample_generate.py"),
            Self::LlamaCpp => python("sample_llama_cpp.py"),
        }
    }
}

/// What was measured in one setting.
struct Measured {
    setting: Setting,
    job: SampleJob,
    runs: BTreeMap<Side, Vec<SampleRun>>,
    /// Operations per second on matrices, of each round.
    rates: Vec<f64>,
    /// Bytes per second, read, of each round.
    bandwidths: Vec<f64>,
}

pub(crate) fn run(options: &SampleOptions) -> Result<()> {
    let config = ModelConfig::read(&options.model).context("run `make setup` first")?;
    let settings = match &options.settings[..] {
        [] => Setting::value_variants(),
        some => some,
    };
    let mut report = Report::new(options, dtype(options))?;
    for &setting in settings {
        let measured = measure(options, setting)?;
        report.add(&measured, &measured.floors(&config))?;
        // After each: a benchmark that is cut short has told what it knew.
        write(&options.output, &report.json())?;
    }
    println!("\n{}\nwritten to {}", report.table(), options.output.display());
    Ok(())
}

fn measure(options: &SampleOptions, setting: Setting) -> Result<Measured> {
    let job = job(options, setting)?;
    let rate = RateJob {
        model: job.model.clone(),
        threads: job.threads,
        dtype: job.dtype,
        tokens: 512,
        rows: 64,
    };
    let (mut runs, mut rates, mut bandwidths) = (BTreeMap::new(), Vec::new(), Vec::new());
    for round in 0..options.rounds {
        rates.push(start_ours("run-rate", &rate)?.answer::<Rate>()?.model_shapes);
        bandwidths.push(start_ours("run-bandwidth", &job)?.answer::<f64>()?);
        // Other replies in each round: how long they are says much of what they cost.
        let job = SampleJob { seed: job.seed + round as u64, ..job.clone() };
        for side in sides(options, round) {
            let run: SampleRun = side.start(&job)?.answer()?;
            let round = format!("{} {}/{}", setting.name(), round + 1, options.rounds);
            eprintln!("{round}: {}: {}", side.name(), told(&run));
            runs.entry(side).or_insert_with(Vec::new).push(run);
        }
    }
    Ok(Measured { setting, job, runs, rates, bandwidths })
}

/// In the order of their runs. Ours with drafting and without take turns at being first:
/// what has just run changes a processor's speed and how memory is laid out.
fn sides(options: &SampleOptions, round: usize) -> Vec<Side> {
    let peers = match &options.peers[..] {
        _ if options.skip_peer => &[],
        [] => Peer::value_variants(),
        some => some,
    };
    let peer = |peer: &Peer| match peer {
        Peer::Generate => Side::Generate,
        Peer::LlamaCpp => Side::LlamaCpp,
    };
    let mut ours = [Side::Ours, Side::WithoutDrafting];
    ours.rotate_left(round % 2);
    ours.into_iter().chain(peers.iter().map(peer)).collect()
}

fn dtype(options: &SampleOptions) -> DType {
    options.dtype.unwrap_or_else(DType::fastest)
}

fn job(options: &SampleOptions, setting: Setting) -> Result<SampleJob> {
    let (guided, stop_ids) = prompts(options, Guidance::On)?;
    let prompts = match setting {
        Setting::Prompts16 => guided.into_iter().take(16).collect(),
        Setting::Prompts64Mixed => {
            let (unguided, _) = prompts(options, Guidance::Off)?;
            guided.into_iter().take(32).chain(unguided.into_iter().take(32)).collect()
        }
    };
    let dtype = dtype(options);
    let name = options.model.file_name().unwrap_or_default().to_string_lossy();
    Ok(SampleJob {
        model: options.model.clone(),
        threads: options.threads,
        dtype,
        prompts,
        params: Params {
            temperature: 0.7,
            top_p: 0.9,
            max_new_tokens: options.max_new_tokens,
            stop_ids,
        },
        batch: options.batch,
        seed: 42,
        drafting: true,
        gguf: root().join(format!("target/bench/{name}-{}.gguf", dtype.name())),
    })
}

/// Token ids of the demo's sampling prompts, and what ends a reply.
fn prompts(options: &SampleOptions, guidance: Guidance) -> Result<(Vec<Vec<u32>>, Vec<u32>)> {
    let mut settings =
        Layers { base: Base::Demo, overrides: Vec::new(), ignore_environment: true }.load()?;
    settings.sampling.guidance = guidance;
    // The recipe's, which the demo does without.
    DEFAULT_INSTRUCTION.clone_into(&mut settings.text.instruction);
    // The date is in no prompt of the demo's, but must be one.
    settings.text.today = "2026-01-01".to_owned();
    let prepared = prepare(&settings, &options.model, None, &mut |_, _, _| {})?;
    let stop_ids = prepared.text.stop_ids().to_vec();
    Ok((prepared.prompts.iter().collect(), stop_ids))
}

/// A run, in one line.
fn told(run: &SampleRun) -> String {
    format!(
        "{} tokens in {:.1} s, {:.0} tokens/s, peak {} MiB{}",
        run.tokens(),
        run.seconds,
        run.tokens_per_s(),
        run.peak_bytes >> 20,
        run.work.as_ref().map_or_else(String::new, |work| format!(", {work}"))
    )
}

impl Measured {
    /// Of each run of ours, by the machine at its best, as far as it was seen:
    /// conservative floors.
    fn floors(&self, config: &ModelConfig) -> Vec<Floor> {
        let best = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        let (rate, bandwidth) = (best(&self.rates), best(&self.bandwidths));
        let of = |run: &SampleRun| Floor::of(config, &self.job, &run.lengths, rate, bandwidth);
        self.runs[&Side::Ours].iter().map(of).collect()
    }
}
