//! `bench dpo`: ours beside TRL, in interleaved runs.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use drift_worker::model::ModelConfig;
use drift_worker::train::TokenPair;

use crate::floor::{Operations, Rate, RateJob};
use crate::job::{Ids, Job, Recipe, Run};
use crate::machine;
use crate::mix::{Mix, responses, tokens};
use crate::options::DpoOptions;
use crate::process::{start_ours, start_python};
use crate::report::{self, Report};

/// What was measured on one mix.
pub(crate) struct Measured {
    pub(crate) mix: Mix,
    pub(crate) pairs: Vec<TokenPair>,
    pub(crate) operations: Operations,
    pub(crate) rates: Vec<Rate>,
    pub(crate) ours: Vec<Run>,
    /// Absent where TRL was left out.
    pub(crate) trl: Vec<Run>,
    pub(crate) trl_checkpointing: Vec<Run>,
}

/// How far apart the sides' log-probabilities may be in the first step, relative to
/// their size: bf16 leaves them a few ten-thousandths.
const AGREEMENT: f64 = 0.003;

pub(crate) fn run(options: &DpoOptions) -> Result<()> {
    let config = ModelConfig::read(&options.model).context("run `make setup` first")?;
    let mixes = if options.mixes.is_empty() {
        // By the memory that TRL takes, so that the last is missing where it runs out.
        vec![Mix::Even, Mix::ResponseHeavy, Mix::PromptHeavy]
    } else {
        options.mixes.clone()
    };
    let mut report = Report::new(options, machine::describe()?);
    for mix in mixes {
        let measured = measure(options, &config, mix)?;
        report.add(&measured)?;
        // After each mix: a benchmark that is cut short has told what it knew.
        report::write(&options.output, &report.json())?;
    }
    println!("\n{}", report.table());
    println!("written to {}", options.output.display());
    Ok(())
}

fn measure(options: &DpoOptions, config: &ModelConfig, mix: Mix) -> Result<Measured> {
    let mut pairs = mix.pairs(options.warm_up * options.batch + options.pairs, config.vocab_size);
    let job = Job {
        model: options.model.clone(),
        threads: options.threads,
        dtype: options.dtype(),
        pairs: pairs.iter().map(Ids::from).collect(),
        batch: options.batch,
        warm_up: options.warm_up,
        recipe: Recipe::default(),
        gradient_checkpointing: false,
        engine: options.engine.clone(),
    };
    pairs.drain(..options.warm_up * options.batch);
    let checkpointing = Job { gradient_checkpointing: true, ..job.clone() };
    let rate = rate_job(options, &pairs);
    let mut measured = Measured {
        mix,
        operations: Operations::of(config, &pairs),
        pairs,
        rates: Vec::new(),
        ours: Vec::new(),
        trl: Vec::new(),
        trl_checkpointing: Vec::new(),
    };
    let trl =
        |job: &Job| start_python("trl_dpo.py", job, options.threads, options.tune_peer)?.answer();
    for round in 0..options.rounds {
        let say = |what: &str, run: &Run| {
            eprintln!("{} {}/{}: {what}: {}", mix.name(), round + 1, options.rounds, told(run));
        };
        measured.rates.push(start_ours("run-rate", &rate)?.answer()?);
        let ours = start_ours("run-ours", &job)?.answer()?;
        say("ours", &ours);
        measured.ours.push(ours);
        if options.skip_peer {
            continue;
        }
        let theirs = trl(&job)?;
        say("TRL", &theirs);
        check_same_work(&measured.ours[round], &theirs)?;
        measured.trl.push(theirs);
        if round < options.checkpointing_rounds {
            let theirs = trl(&checkpointing)?;
            say("TRL, gradient checkpointing", &theirs);
            check_same_work(&measured.ours[round], &theirs)?;
            measured.trl_checkpointing.push(theirs);
        }
    }
    Ok(measured)
}

/// Times are worth comparing only if both sides computed the same. They start from the
/// same weights; after a step TRL's are rounded to bf16 and ours have fp32 masters.
fn check_same_work(ours: &Run, theirs: &Run) -> Result<()> {
    let [our_steps, their_steps] = [ours, theirs].map(|run| run.step_seconds.len());
    ensure!(our_steps == their_steps, "ours made {our_steps} steps, and TRL {their_steps}");
    let [ours, theirs] = [ours, theirs].map(|run| run.logps_chosen.first().copied());
    let (ours, theirs) = ours.zip(theirs).context("a run without a step")?;
    ensure!(
        (ours - theirs).abs() <= AGREEMENT * theirs.abs(),
        "the chosen replies' log-probability is {ours} by ours and {theirs} by TRL: they did not \
         compute the same pairs, or not by the same weights"
    );
    Ok(())
}

/// The rate is measured on passes of the average size.
fn rate_job(options: &DpoOptions, pairs: &[TokenPair]) -> RateJob {
    let steps = pairs.len().div_ceil(options.batch);
    let all: usize = pairs.iter().map(tokens).sum();
    let rows: usize = pairs.iter().map(responses).sum();
    let passes = (all / steps).div_ceil(options.engine.max_tokens).max(1) * steps;
    RateJob {
        model: options.model.clone(),
        threads: options.threads,
        dtype: options.dtype(),
        tokens: all / passes,
        rows: rows / passes,
    }
}

/// A run, in one line.
fn told(run: &Run) -> String {
    let Run { seconds, scoring_seconds, user_seconds, system_seconds, .. } = run;
    let steps: Vec<String> = run.step_seconds.iter().map(|s| format!("{s:.2}")).collect();
    let losses: Vec<String> = run.losses.iter().map(|loss| format!("{loss:.4}")).collect();
    let scoring = match scoring_seconds {
        0.0 => String::new(),
        seconds => format!("scoring {seconds:.2} s, "),
    };
    format!(
        "{seconds:.1} s ({scoring}steps {} s), processor {user_seconds:.1} + {system_seconds:.1} s, \
         peak {:.0} MiB, losses {}",
        steps.join(" + "),
        run.peak_bytes as f64 / f64::from(1 << 20),
        losses.join(" ")
    )
}

/// Versions of all libraries that runs named.
pub(crate) fn versions<'a>(runs: impl Iterator<Item = &'a Run>) -> BTreeMap<String, String> {
    runs.flat_map(|run| run.versions.clone()).collect()
}
