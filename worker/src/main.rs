//! The `worker` program: one process per GPU, started by the coordinator or by
//! whoever schedules machines.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use drift_proto::watch::{self, WatchAddress};
use drift_proto::{JOIN_DIR_ENV, JOIN_TOKEN_ENV, LAUNCHER_ENV};
use drift_worker::agent::{AgentOptions, JoinOptions, Watch, choose_device, device_name, run};
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

    /// Show /healthz, /readyz and Prometheus' /metrics at this port of loopback, or at
    /// IP:PORT. They tell numbers, and to whoever asks.
    #[arg(long, value_name = "[IP:]PORT")]
    metrics: Option<WatchAddress>,

    /// Log lines as text or json.
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"])]
    log_format: String,

    /// Threads to compute with on CPU.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: u32,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("DRIFT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    match arguments.log_format.as_str() {
        "json" => log.json().init(),
        _ => log.init(),
    }
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
    tch::set_num_threads(arguments.threads as i32);
    let device = choose_device(&arguments.device, arguments.slot)?;
    let watch = Arc::new(Watch::new(arguments.slot, &device_name(device))?);
    if let Some(address) = arguments.metrics {
        let address = watch::serve(address, Arc::clone(&watch) as _)?;
        info!(%address, "show /healthz, /readyz and /metrics");
    }
    let options = AgentOptions {
        rejoins: std::env::var_os(LAUNCHER_ENV).is_none(),
        device,
        join: JoinOptions {
            coordinator: arguments.coordinator,
            folder: arguments.join,
            token: std::env::var(JOIN_TOKEN_ENV).ok(),
        },
        wait: Duration::from_secs(arguments.wait),
        slot: arguments.slot,
        threads: arguments.threads,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        watch,
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
