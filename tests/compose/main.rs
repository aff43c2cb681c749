//! Runs the demo in containers, as users start it, disturbs it from outside, and
//! compares what it leaves with what two workers on this machine leave, byte for byte.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bed;
mod images;
mod project;
mod watching;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;

use self::bed::Bed;
use self::project::Fault;

/// Tests DRIFT's images and `deploy/compose.yaml` with a real Docker engine.
///
/// `make test-compose` makes the images first.
#[derive(Debug, Parser)]
#[command(name = "compose", version)]
struct Arguments {
    /// Which images, by their tag.
    #[arg(long, default_value = "latest")]
    tag: String,
    /// A Python with what tests/python/requirements-deploy.txt names, for the manifests.
    #[arg(long)]
    python: PathBuf,
    /// Only the parts whose names hold this.
    #[arg(long, default_value = "")]
    only: String,
    /// Print the containers' logs.
    #[arg(long)]
    verbose: bool,
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

const UNDISTURBED: &str = "undisturbed";
const WATCHED: &str = "watched while peers are paused";

/// Which faults a run meets, in which phases, one after the other.
const DISTURBED: [(&str, &[(Place, Fault)]); 4] = [
    (
        "workers killed",
        &[(Place::Training, Fault::Kill("worker-0")), (Place::Sampling, Fault::Kill("worker-1"))],
    ),
    (
        "workers paused for longer than the deadline",
        &[(Place::Training, Fault::Pause("worker-1")), (Place::Sampling, Fault::Pause("worker-0"))],
    ),
    (
        "workers cut off from the network",
        &[(Place::Training, Fault::Cut("worker-0")), (Place::Sampling, Fault::Cut("worker-1"))],
    ),
    (
        "coordinator killed and started again",
        &[
            (Place::Training, Fault::KillAndStart("coordinator")),
            (Place::Sampling, Fault::Kill("coordinator")),
        ],
    ),
];

/// Where a fault happens: in the middle of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the warm start, behind its first steps.
    Training,
    /// In iteration 1, behind its first replies.
    Sampling,
}

fn carry_out(arguments: &Arguments) -> Result<()> {
    let began = Instant::now();
    let wanted = |name: &str| name.contains(&arguments.only);
    let part = |name: &str, body: &dyn Fn() -> Result<()>| -> Result<()> {
        if !wanted(name) {
            return Ok(());
        }
        let began = Instant::now();
        body().with_context(|| name.to_owned())?;
        println!("{name}: passed, {:.0} s", began.elapsed().as_secs_f64());
        Ok(())
    };
    part("images", &|| images::check(&arguments.tag))?;
    part("compose file", &images::check_files)?;
    part("manifests", &|| images::check_manifests(&arguments.python))?;
    let mut runs = DISTURBED.iter().map(|(name, _)| *name).chain([UNDISTURBED, WATCHED]);
    if !runs.any(wanted) {
        return Ok(());
    }
    let bed = Bed::make(&arguments.tag, arguments.verbose)?;
    println!("two workers on this machine: {} files, {:.0} s", bed.files(), bed.seconds);
    part(UNDISTURBED, &|| bed.undisturbed())?;
    part(WATCHED, &|| bed.watched())?;
    for (name, faults) in DISTURBED {
        part(name, &|| bed.disturbed(faults))?;
    }
    println!("all passed, {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}
