//! `bench`: the engines beside their peers, measured on this machine.
//!
//! Every measured run is a process of its own, so that its peak memory is its
//! own: this program starts itself (`bench run-ours JOB`) and the peers' scripts
//! with a job as a JSON file, and reads one JSON object from their output.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod dpo;
mod floor;
mod job;
mod machine;
mod mix;
mod options;
mod ours;
mod process;
mod report;
mod sample;
mod scaling;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use options::{Arguments, Benchmark};

fn main() -> ExitCode {
    match run(Arguments::parse().benchmark) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(benchmark: Benchmark) -> Result<()> {
    match benchmark {
        Benchmark::Dpo(options) => dpo::run(&options),
        Benchmark::Scaling(options) => scaling::run(&options),
        Benchmark::Sample(options) => sample::run(&options),
        Benchmark::RunOurs { job } => process::answer(&ours::run(&process::read(&job)?)?),
        Benchmark::RunRate { job } => process::answer(&floor::measure(&process::read(&job)?)?),
        Benchmark::RunSample { job } => process::answer(&sample::run_ours(&process::read(&job)?)?),
        Benchmark::RunBandwidth { job } => {
            process::answer(&sample::bandwidth(&process::read(&job)?))
        }
        Benchmark::RunRank { job } => process::answer(&scaling::run_rank(&process::read(&job)?)?),
    }
}
