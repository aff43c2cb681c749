//! The real coordinator beside many simulated workers, which speak the real wire and
//! sleep where an engine would compute: what a lease costs, and how soon it comes.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod coordinator;
mod corpus;
mod fleet;
#[path = "../bench/machine.rs"]
mod machine;
#[path = "../chaos/model.rs"]
mod model;
mod report;
mod run;
mod tally;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use self::report::Report;
use self::run::{Bed, Measured};

/// Measures the coordinator's sampling phase beside simulated workers.
///
/// Every number of workers draws the same prompts at the same rate altogether: a lease
/// takes a worker as long as that rate says, from half of it to one and a half. Then
/// once more without any sleep, which is the coordinator's limit on this machine.
#[derive(Debug, Parser)]
#[command(name = "scale", version)]
struct Arguments {
    /// How many workers there are, each in a run of its own.
    #[arg(long, value_delimiter = ',', default_value = "8,64,512,1024")]
    workers: Vec<u32>,
    /// Prompts of each run.
    #[arg(long, default_value_t = 1_000_000)]
    prompts: u64,
    /// Prompts that all workers together sample in a second; `max`: they never sleep.
    #[arg(long, value_delimiter = ',', default_value = "26000,max", value_parser = rate)]
    rates: Vec<Rate>,
    /// Tokens of a reply.
    #[arg(long, default_value_t = 8)]
    reply_tokens: u32,
    /// Prompts of a lease.
    #[arg(long, default_value_t = 64)]
    shard_prompts: u32,
    /// Workers whose connection closes while they hold a lease, in each run.
    #[arg(long, default_value_t = 5)]
    losses: u64,
    /// Where the figures go.
    #[arg(long, default_value = "target/bench/scale.json")]
    report: PathBuf,
    /// Seconds that a coordinator has for each of preparing, attaching and sampling.
    #[arg(long, default_value_t = 1200)]
    patience: u64,
    /// Print each coordinator's log.
    #[arg(long)]
    verbose: bool,
}

/// Prompts a second that all workers together sample; none: as many as they are given.
type Rate = Option<f64>;

fn rate(text: &str) -> Result<Rate, String> {
    match text {
        "max" => Ok(None),
        number => match number.parse() {
            Ok(rate) if rate > 0.0 => Ok(Some(rate)),
            _ => Err("expected a number of prompts a second, or max".to_owned()),
        },
    }
}

fn main() -> ExitCode {
    match carry_out(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(arguments: &Arguments) -> Result<()> {
    raise_open_files().context("allow as many connections as there are workers")?;
    let folder = tempfile::tempdir().context("make a folder for the runs")?;
    let bed = Bed::make(folder.path(), arguments)?;
    let mut report = Report::new(arguments)?;
    for &workers in &arguments.workers {
        for &rate in &arguments.rates {
            let measured: Measured = bed.measure(workers, rate)?;
            println!("{}", report.add(&measured));
        }
    }
    println!("{}", report.table());
    report.write(&arguments.report)
}

/// A connection is a file on each side.
fn raise_open_files() -> rustix::io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
}
