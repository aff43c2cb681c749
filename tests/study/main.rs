//! `study`: the three methods side by side on a task whose answers a program can check.
//!
//! The paper claims an ordering: what is learnt from dissatisfaction lasts longer than
//! what is learnt from one's own replies against given ones (SPIN, whose signal vanishes)
//! and from pairs of one's own (IterDPO). This says what comes out on a small model, with
//! the real programs, in minutes.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod evaluate;
mod report;
mod runs;
mod task;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use self::evaluate::Success;
use self::report::Study;

/// Runs DRIFT, IterDPO and SPIN on one task, with several seeds, and compares them.
///
/// The task: answer a short question with one word. Replies that disappointed are whole
/// sentences. After each iteration the model answers questions that no run trains on.
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
    #[arg(long, default_value_t = 40)]
    questions: usize,
    /// Learning rate of each iteration's first step.
    #[arg(long, default_value_t = 1e-5)]
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
    let mut study = Study::begin(&arguments.methods, arguments.iterations);
    for seed in 1..=arguments.seeds {
        let questions = task::draw(seed, arguments.seed_pairs, arguments.questions)?;
        let before = evaluate::success(arguments, &arguments.model, &questions.held_out, seed)?;
        eprintln!("seed {seed}: {} before training", before.percent());
        for method in &arguments.methods {
            let dir = runs::run(arguments, method, seed, &questions)?;
            let mut successes = Vec::new();
            // The iteration 0 is the warm start.
            for k in 0..=arguments.iterations {
                let checkpoint = dir.join(format!("iterations/{k:02}/checkpoint"));
                let after = evaluate::success(arguments, &checkpoint, &questions.held_out, seed)?;
                successes.push(after);
            }
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
