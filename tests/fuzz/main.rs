//! Feeds the readers of both programs inputs that are nearly right, by the million, and
//! watches for a panic, an abort, a hang, or memory without bound.
//!
//! Each target runs in a process of its own, which notes the number of its input before it
//! tries it: an input is a function of (target, seed, number), so what killed the process
//! is made again and kept.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[allow(dead_code, reason = "benchmarks want more of it")]
#[path = "../bench/machine.rs"]
mod machine;
mod mutate;
mod targets;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;

use self::mutate::Draw;
use self::targets::{NAMES, target};
use self::watch::Counter;

/// Feeds readers damaged input, and keeps what breaks them.
#[derive(Debug, Parser)]
#[command(name = "fuzz", version)]
struct Arguments {
    /// What to feed: all of them, or some.
    #[arg(value_name = "TARGET", value_parser = clap::builder::PossibleValuesParser::new(NAMES))]
    targets: Vec<String>,
    /// Seconds of a processor's time for each target.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Draws the inputs; another seed, other inputs.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The number of the input to begin with.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Where inputs that break something are kept.
    #[arg(long, value_name = "DIR", default_value = "target/fuzz")]
    keep: PathBuf,
    /// Try this file alone, in this process.
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// The watched process: where it counts, and the number it begins with.
    #[arg(long, hide = true, num_args = 2)]
    child: Option<Vec<String>>,
}

fn main() -> ExitCode {
    match carry_out(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns how many targets something was found in.
fn carry_out(arguments: &Arguments) -> Result<usize> {
    if let Some(path) = &arguments.replay {
        let [name] = &arguments.targets[..] else { bail!("--replay takes one target") };
        let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let mut target = target(name)?;
        watch::bound_memory()?;
        target.try_input(&bytes);
        println!("{name}: nothing");
        return Ok(0);
    }
    if let Some(child) = &arguments.child {
        let [counter, first] = &child[..] else { bail!("--child takes two values") };
        feed(&arguments.targets[0], arguments.seed, counter.as_ref(), first.parse()?)?;
    }
    let all: Vec<String> = NAMES.iter().map(|name| (*name).to_owned()).collect();
    let targets = if arguments.targets.is_empty() { &all } else { &arguments.targets };
    let mut failed = 0;
    for name in targets {
        let time = Duration::from_secs(arguments.seconds);
        let found = watch::watch(name, arguments.seed, arguments.first, time, &arguments.keep)?;
        failed += usize::from(found > 0);
    }
    println!("{} passed, {failed} failed", targets.len() - failed);
    Ok(failed)
}

/// Tries one input after another, until it is killed.
fn feed(name: &str, seed: u64, counter: &std::path::Path, first: u64) -> Result<()> {
    let mut target = target(name)?;
    let seeds = target.seeds();
    let counter = Counter::open(counter)?;
    watch::bound_memory()?;
    for number in first.. {
        counter.set(number)?;
        target.try_input(&Draw::new(seed, number).input(&seeds));
    }
    Ok(())
}
