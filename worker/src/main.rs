//! The `worker` program: one process per GPU, started by the coordinator or by
//! whoever schedules machines.

use std::process::ExitCode;

use clap::Parser;
use drift_proto::{JOIN_TOKEN_ENV, LAUNCHER_ENV};
use drift_worker::agent::{AgentOptions, choose_device, run};
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

/// Samples, scores and trains for a DRIFT coordinator.
///
/// A coordinator started with `--workers N` starts its workers itself; nobody
/// needs to run this by hand. The run's join token comes in the environment
/// variable DRIFT_JOIN_TOKEN, never on the command line.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// Where the coordinator listens.
    #[arg(long, value_name = "http://HOST:PORT")]
    coordinator: String,

    /// Number of this worker, from 0; becomes its rank.
    #[arg(long, value_name = "N")]
    slot: u32,

    /// Device to compute on: auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,

    /// Threads to compute with on CPU.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: u32,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("DRIFT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match serve(arguments) {
        Ok(()) => {
            info!("leaving");
            ExitCode::SUCCESS
        }
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: Arguments) -> anyhow::Result<()> {
    end_with_launcher()?;
    let token = std::env::var(JOIN_TOKEN_ENV).map_err(|_| {
        anyhow::anyhow!(
            "{JOIN_TOKEN_ENV} is not set: the coordinator hands it to the workers that it starts"
        )
    })?;
    tch::set_num_threads(arguments.threads as i32);
    let options = AgentOptions {
        device: choose_device(&arguments.device, arguments.slot)?,
        coordinator: arguments.coordinator,
        token,
        slot: arguments.slot,
        threads: arguments.threads,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
    };
    // One thread for the stream; libtorch has its own, so that heartbeats never
    // wait for a step.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(options))?;
    Ok(())
}

/// Where a coordinator started this worker, has the kernel end it when that
/// coordinator dies: a worker that is stopped or hangs would outlive it.
fn end_with_launcher() -> anyhow::Result<()> {
    use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
    let Ok(launcher) = std::env::var(LAUNCHER_ENV) else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before that.
    let launcher = launcher.parse().ok().and_then(Pid::from_raw);
    anyhow::ensure!(getppid() == launcher, "the coordinator that started this worker is gone");
    Ok(())
}
