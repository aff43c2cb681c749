//! The `worker` program: one process per GPU, started by the coordinator or by
//! whoever schedules machines.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use drift_proto::{JOIN_DIR_ENV, JOIN_TOKEN_ENV, LAUNCHER_ENV};
use drift_worker::agent::{AgentOptions, JoinOptions, choose_device, run};
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

/// Samples, scores and trains for a DRIFT coordinator.
///
/// A coordinator started with `--workers N` starts its workers itself. With
/// `launch.start = "none"` it waits for workers that somebody else starts:
///
///   worker --join RUN_DIR/join --slot 0
///
/// A worker may start before its coordinator does. Secrets come in the join folder
/// or in the environment (DRIFT_JOIN_TOKEN), never on the command line.
#[derive(Debug, Parser)]
#[command(version, about, verbatim_doc_comment)]
struct Arguments {
    /// The run's join folder, or a copy of it.
    #[arg(long, value_name = "DIR", env = JOIN_DIR_ENV)]
    join: Option<PathBuf>,

    /// Where the coordinator listens: http://HOST:PORT or https://HOST:PORT. Without
    /// it: as the join folder says.
    #[arg(long, value_name = "URL")]
    coordinator: Option<String>,

    /// Seconds to wait for the coordinator.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=604_800))]
    wait: u64,

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
    #[cfg(feature = "cuda")]
    drift_worker::collective::nccl_defaults();
    let filter = EnvFilter::try_from_env("DRIFT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    tell_of_nccl();
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

/// What the environment says to NCCL and to c10d's use of it, for whoever reads the log.
fn tell_of_nccl() {
    if cfg!(feature = "cuda") {
        let ours = |name: &str| name.starts_with("NCCL_") || name.starts_with("TORCH_NCCL_");
        let set = std::env::vars_os().filter_map(|(name, value)| {
            let name = name.to_str().filter(|name| ours(name))?;
            Some(format!("{name}={}", value.to_string_lossy()))
        });
        info!(environment = %set.collect::<Vec<_>>().join(" "), "NCCL");
    }
}

fn serve(arguments: Arguments) -> anyhow::Result<()> {
    end_with_launcher()?;
    tch::set_num_threads(arguments.threads as i32);
    let options = AgentOptions {
        rejoins: std::env::var_os(LAUNCHER_ENV).is_none(),
        device: choose_device(&arguments.device, arguments.slot)?,
        join: JoinOptions {
            coordinator: arguments.coordinator,
            folder: arguments.join,
            token: std::env::var(JOIN_TOKEN_ENV).ok(),
        },
        wait: Duration::from_secs(arguments.wait),
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
