//! `study`: the three methods side by side on a task whose answers a program can check.
//!
//! The paper claims an ordering: what is learnt from dissatisfaction lasts longer than
//! what is learnt from one's own replies against given ones (SPIN, whose signal vanishes)
//! and from pairs of one's own (IterDPO). This says what comes out on a small model, with
//! the real programs, in minutes. The conversations are the model's own: it is asked
//! before any training, and a program is content with a reply, or complains.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod evaluate;
mod report;
mod runs;
mod task;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use self::evaluate::Success;
use self::report::Study;

/// Runs DRIFT, IterDPO and SPIN on one task, with several seeds, and compares them.
///
/// The task: answer a question in one short sentence. The model itself replies several
/// times before any training: what satisfies and what disappoints there is the corpus.
/// After each iteration the model answers questions that no run trains on.
#[derive(Debug, Parser)]
#[command(name = "study", version)]
struct Arguments {
    /// Methods to compare, in the words of `coordinator`.
    #[arg(long, value_delimiter = ',', default_value = "drift,iter-dpo,spin")]
    methods: Vec<String>,
    /// Runs of each method: seeds 1, 2, … draw questions, replies and order.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Iterations of each run.
    #[arg(long, default_value_t = 4)]
    iterations: u32,
    /// Questions of seed pairs, which the warm start trains on.
    #[arg(long, default_value_t = 16)]
    seed_pairs: usize,
    /// Epochs of the warm start.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    warm_start_epochs: u32,
    /// Questions that a run trains on, in each iteration.
    #[arg(long, default_value_t = 32)]
    questions: usize,
    /// Questions that are asked after each iteration.
    #[arg(long, default_value_t = 40)]
    held_out: usize,
    /// Learning rate of each iteration's first step.
    #[arg(long, default_value_t = 3e-6)]
    learning_rate: f64,
    /// More settings for all runs, as `coordinator --set` takes them.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// The model to begin with.
    #[arg(long, default_value = ".cache/models/SmolLM2-135M-Instruct")]
    model: PathBuf,
    /// Where runs, tables and plots go. Runs that are finished there are not run again.
    #[arg(long, default_value = "target/study")]
    output: PathBuf,
    /// Processor threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// Replies to each question before any training, of which those who are content and those
/// who are not have one each.
const DEPLOYED_REPLIES: u32 = 8;
/// Replies to each held-out question.
const HELD_OUT_REPLIES: u32 = 4;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    tch::set_num_threads(i32::try_from(arguments.threads)?);
    let mut study = Study::begin(&arguments.methods, arguments.iterations);
    eprintln!("asking the model, before any training");
    let deployed = evaluate::replies(&arguments.model, &task::all(), DEPLOYED_REPLIES, 0)?;
    let counts = [arguments.seed_pairs, arguments.questions, arguments.held_out];
    for seed in 1..=arguments.seeds {
        let questions = task::draw(seed, counts, &deployed)?;
        let success =
            |folder: &Path| evaluate::success(folder, &questions.held_out, HELD_OUT_REPLIES, seed);
        let before = success(&arguments.model)?;
        eprintln!("seed {seed}: {} before training", before.percent());
        for method in &arguments.methods {
            let dir = runs::run(arguments, method, seed, &questions)?;
            // The iteration 0 is the warm start.
            let checkpoints = (0..=arguments.iterations)
                .map(|k| success(&dir.join(format!("iterations/{k:02}/checkpoint"))));
            let successes = checkpoints.collect::<Result<Vec<Success>>>()?;
            let by_iteration: Vec<_> = successes.iter().map(Success::percent).collect();
            eprintln!("seed {seed}, {method}: {}", by_iteration.join(", "));
            study.add(method, &dir, before, successes)?;
            // After each: a study that is cut short has told what it knew.
            study.write(&arguments.output)?;
        }
    }
    println!("{}\nwritten to {}", study.table(), arguments.output.display());
    Ok(())
}
