//! The `worker` program: one process per GPU, started by the coordinator or by
//! whoever schedules machines.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use drift_proto::watch::{self, WatchAddress};
use drift_proto::{JOIN_DIR_ENV, JOIN_TOKEN_ENV, LAUNCHER_ENV, SLURM_LAUNCHER};
use drift_worker::agent::{AgentOptions, JoinOptions, Watch, choose_device, device_name, run};
use tracing::{error, info, warn};
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

    /// Number of this worker, from 0; becomes its rank. In a task of `srun`, the task's.
    #[arg(long, value_name = "N", env = "SLURM_PROCID")]
    slot: u32,

    /// Device to compute on: auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,

    /// Interface or address of this machine on which to exchange gradients with the
    /// other workers. Without it: the one that leads to the coordinator.
    #[arg(long, value_name = "NAME|IP")]
    interface: Option<String>,

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
    #[cfg(feature = "cuda")]
    drift_worker::collective::nccl_defaults();
    let filter = EnvFilter::try_from_env("DRIFT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    match arguments.log_format.as_str() {
        "json" => log.json().init(),
        _ => log.init(),
    }
    let launcher = std::env::var(LAUNCHER_ENV).ok();
    let served = match &launcher {
        // Whoever runs the container starts it again.
        None if std::process::id() == 1 => serve(arguments, CONTAINER),
        // Nobody would start it again.
        None => match device_exists(&arguments) {
            Ok(()) => return supervise(),
            Err(error) => Err(error),
        },
        Some(launcher) => serve(arguments, launcher),
    };
    match served {
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

/// A wrong `--device` is said at once: another process would load gigabytes of libraries
/// first, to say the same. What `auto` finds is the other's to tell.
fn device_exists(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.device != "auto" {
        choose_device(&arguments.device, arguments.slot)?;
    }
    Ok(())
}

/// Runs this program once more, as the one that works, and again whenever a signal ends
/// it: a crash, a lack of memory, or its own hand where it hangs among peers that are
/// gone. What it says of itself is final.
fn supervise() -> ExitCode {
    let worked = || -> anyhow::Result<ExitCode> {
        let mut short_lives = 0;
        loop {
            let began = Instant::now();
            let status = std::process::Command::new(std::env::current_exe()?)
                .args(std::env::args_os().skip(1))
                .env(LAUNCHER_ENV, format!("{SUPERVISOR}{}", std::process::id()))
                .status()
                .context("start the process that works")?;
            match status.code() {
                Some(code) => return Ok(ExitCode::from(code as u8)),
                None if began.elapsed() < SHORT_LIFE => short_lives += 1,
                None => short_lives = 0,
            }
            anyhow::ensure!(
                short_lives < MAX_SHORT_LIVES,
                "the process that works was ended as soon as it began, {short_lives} times: {status}"
            );
            warn!(%status, "the process that works was ended; start it again");
            std::thread::sleep(SHORT_LIFE * short_lives);
        }
    };
    worked().unwrap_or_else(|error| {
        error!("{error:#}");
        ExitCode::FAILURE
    })
}

/// One that lives shorter is likely to have been ended by what it met at its start. After
/// so many in a row nothing is to be hoped of another; before each, a longer wait.
const SHORT_LIFE: Duration = Duration::from_secs(1);
const MAX_SHORT_LIVES: u32 = 4;

/// Says that this is a container's first process.
const CONTAINER: &str = "container";

/// Says in front of its process's id that the launcher is a supervisor.
const SUPERVISOR: &str = "supervisor:";

fn serve(arguments: Arguments, launcher: &str) -> anyhow::Result<()> {
    tell_of_nccl();
    if launcher == SLURM_LAUNCHER {
        arguments.join.as_deref().map_or(Ok(()), sees_run)?;
    } else if launcher != CONTAINER {
        end_with(launcher.trim_start_matches(SUPERVISOR))?;
    }
    tch::set_num_threads(arguments.threads as i32);
    let device = choose_device(&arguments.device, arguments.slot)?;
    let watch = Arc::new(Watch::new(arguments.slot, &device_name(device))?);
    if let Some(address) = arguments.metrics {
        let address = watch::serve(address, Arc::clone(&watch) as _)?;
        info!(%address, "show /healthz, /readyz and /metrics");
    }
    let options = AgentOptions {
        rejoins: launcher == CONTAINER || launcher.starts_with(SUPERVISOR),
        device,
        join: JoinOptions {
            coordinator: arguments.coordinator,
            folder: arguments.join,
            token: std::env::var(JOIN_TOKEN_ENV).ok(),
        },
        wait: Duration::from_secs(arguments.wait),
        slot: arguments.slot,
        threads: arguments.threads,
        interface: arguments.interface,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        watch,
    };
    // One thread for the stream; libtorch has its own, so that heartbeats never
    // wait for a step.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(options))?;
    Ok(())
}

/// A coordinator that has a worker started elsewhere has written its join folder: where
/// the run directory is out of sight, no waiting helps.
fn sees_run(join: &Path) -> anyhow::Result<()> {
    let run = join.parent().unwrap_or(join);
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    anyhow::ensure!(
        run.is_dir(),
        "cannot see the run directory {} from {host}: put it on a file system that all nodes share",
        run.display()
    );
    Ok(())
}

/// Has the kernel end this process when the one that started it dies: a worker that is
/// stopped or hangs would outlive it.
fn end_with(launcher: &str) -> anyhow::Result<()> {
    use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before that.
    let launcher = launcher.parse().ok().and_then(Pid::from_raw);
    anyhow::ensure!(getppid() == launcher, "the process that started this worker is gone");
    Ok(())
}
