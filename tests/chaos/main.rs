//! Kills, stops and interrupts real runs at places that a seed draws, and compares
//! what they leave with what an undisturbed run leaves, byte for byte.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod faults;
mod follower;
mod hosts;
mod latencies;
mod log;
mod model;
#[allow(clippy::unwrap_used, reason = "a network that cannot be made ends everything")]
#[path = "../support/network.rs"]
mod network;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;

use self::faults::Schedule;
use self::hosts::Hosts;
use self::latencies::Latencies;
use self::run::{Bed, Verdict};

/// Disturbs runs of a small model, and checks that they leave the same bytes.
///
/// Each seed draws a schedule: which process is killed, stopped for good, or stopped
/// for a while, and at which line of the run's story. Each third seed's run is over
/// several hosts (network namespaces, which take root), where cables are pulled and
/// congested, too. A seed that fails gives the same schedule again.
#[derive(Debug, Parser)]
#[command(name = "chaos", version)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 12)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// Instead of drawing from seeds, stop a run by SIGTERM in each of its phases.
    #[arg(long)]
    stops: bool,
    /// Keep every run on one host.
    #[arg(long)]
    one_host: bool,
    /// Workers of each run.
    #[arg(long, default_value_t = 2)]
    workers: u32,
    /// Keep the directories of the runs that failed here.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Print every run's log.
    #[arg(long)]
    verbose: bool,
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

/// What happens to each run, by the run's name.
fn schedules(arguments: &Arguments, places: &[String], has_hosts: bool) -> Vec<(String, Schedule)> {
    if arguments.stops {
        let stops = Schedule::stop_in_each_phase(places).into_iter().enumerate();
        return stops.map(|(n, schedule)| (format!("stop-{n}"), schedule)).collect();
    }
    let drawn = |seed| {
        let over_hosts = has_hosts && seed % 3 == 0;
        let schedule = Schedule::draw(seed, places, arguments.workers, over_hosts);
        (format!("seed-{seed}"), schedule)
    };
    (arguments.first_seed..arguments.first_seed + arguments.seeds).map(drawn).collect()
}

/// Runs all of them; returns how many failed.
fn carry_out(arguments: &Arguments) -> Result<u64> {
    let folder = tempfile::tempdir().context("make a folder for the runs")?;
    let has_hosts = !arguments.one_host && !arguments.stops && Hosts::are_possible();
    let bed = Bed::make(folder.path(), arguments.workers, has_hosts)?;
    println!(
        "undisturbed: {:.1} s, {} places for a fault, {} samples",
        bed.seconds,
        bed.places.len(),
        bed.samples
    );
    if !has_hosts && !arguments.stops {
        println!("every run is on one host: others take root and network namespaces");
    }
    let (mut passed, mut failed) = (0, 0);
    let mut latencies = Latencies::default();
    for (name, schedule) in schedules(arguments, &bed.places, has_hosts) {
        println!("{name}: {schedule}");
        let began = Instant::now();
        let dir = folder.path().join(&name);
        let Verdict { failure, fired, lost, restarts, latencies: more, log } =
            bed.run(&dir, schedule)?;
        latencies.extend(more);
        let seconds = began.elapsed().as_secs_f64();
        let story = format!(
            "{fired} faults, {lost} workers replaced, {restarts} coordinators restarted, {seconds:.1} s"
        );
        if arguments.verbose || failure.is_some() {
            println!("{log}");
        }
        match failure {
            None => {
                passed += 1;
                println!("{name}: same bytes ({story})");
                let _ = std::fs::remove_dir_all(&dir);
            }
            Some(why) => {
                failed += 1;
                println!("{name}: FAILED: {why} ({story})");
                if let Some(keep) = &arguments.keep {
                    let kept = keep.join(&name);
                    std::fs::create_dir_all(keep)?;
                    std::fs::rename(&dir, &kept).context("keep a run")?;
                    println!("{name}: its directory is {}", kept.display());
                }
            }
        }
    }
    print!("{latencies}");
    println!("{passed} passed, {failed} failed");
    Ok(failed)
}
