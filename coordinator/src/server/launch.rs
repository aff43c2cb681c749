//! Starts local worker processes, watches them, and leaves none behind.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::opening::WayIn;
use crate::config::{DeviceChoice, LaunchSettings};
use crate::run::command::Rank;

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No program was found.
    #[error(
        "no worker program beside {beside} or on PATH; build it with `make build`, or name it with launch.worker"
    )]
    NotFound {
        /// Where the coordinator itself lies.
        beside: PathBuf,
    },
    /// The program named does not exist.
    #[error("launch.worker = {0:?}: no such file")]
    Missing(PathBuf),
    /// Its log cannot be opened.
    #[error("open worker log {}: {cause}", path.display())]
    Log {
        /// The log.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// It cannot be started.
    #[error("start {}: {cause}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
}

/// A worker process that ended.
#[derive(Debug, Clone)]
pub struct WorkerExit {
    /// Which.
    pub rank: Rank,
    /// Its status, in words.
    pub status: String,
    /// The last lines of its log.
    pub last_lines: Vec<String>,
}

/// Finds the worker program: as set, beside this program, or on PATH.
///
/// # Errors
/// There is none.
pub fn find_worker(settings: &LaunchSettings) -> Result<PathBuf, LaunchError> {
    if !settings.worker.is_empty() {
        let named = PathBuf::from(&settings.worker);
        return if named.is_file() { Ok(named) } else { Err(LaunchError::Missing(named)) };
    }
    let own = std::env::current_exe().unwrap_or_default();
    let beside = own.parent().unwrap_or(Path::new(".")).to_path_buf();
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(beside.clone())
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join("worker"))
        .find(|candidate| candidate.is_file())
        .ok_or(LaunchError::NotFound { beside })
}

/// Threads of each worker: as set, or its share of the machine's cores.
pub fn threads_per_worker(settings: &LaunchSettings, workers: u32) -> usize {
    if settings.threads > 0 {
        return settings.threads;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / workers as usize).max(1)
}

/// Running workers of one run. Dropped, it kills them.
#[derive(Debug, Default)]
pub struct Launcher {
    watchers: Vec<(JoinHandle<()>, mpsc::Sender<()>)>,
}

impl Launcher {
    /// Starts the worker of `rank`. Its output goes to `log`; its end to `exits`.
    ///
    /// # Errors
    /// The program or its log cannot be opened.
    #[allow(clippy::too_many_arguments)] // one call, and each argument a different thing
    pub fn start(
        &mut self,
        program: &Path,
        rank: Rank,
        settings: &LaunchSettings,
        threads: usize,
        way: &WayIn,
        log: &Path,
        exits: mpsc::UnboundedSender<WorkerExit>,
    ) -> Result<(), LaunchError> {
        let open = || File::options().create(true).append(true).open(log);
        let log_error = |cause| LaunchError::Log { path: log.to_owned(), cause };
        let (out, err) = (open().map_err(log_error)?, open().map_err(log_error)?);
        let device = match settings.device {
            DeviceChoice::Auto => "auto".to_owned(),
            DeviceChoice::Cpu => "cpu".to_owned(),
            DeviceChoice::Cuda => format!("cuda:{rank}"),
        };
        let ((variable, secret), other) = way.environment();
        let mut command = Command::new(program);
        command
            .arg("--coordinator")
            .arg(way.url())
            .args(["--slot", &rank.to_string(), "--device", &device])
            .args(["--threads", &threads.to_string()])
            .env(variable, secret)
            .env_remove(other)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            // A terminal's Ctrl-C goes to its whole process group; the workers'
            // end is for the coordinator to arrange.
            .process_group(0)
            .kill_on_drop(true);
        let child = command
            .spawn()
            .map_err(|cause| LaunchError::Spawn { program: program.to_owned(), cause })?;
        let (kill, killed) = mpsc::channel(1);
        let watcher = tokio::spawn(watch(child, killed, rank, log.to_owned(), exits));
        self.watchers.push((watcher, kill));
        Ok(())
    }

    /// Waits until all workers are gone; kills those that are still there after `grace`.
    pub async fn reap(&mut self, grace: Duration) {
        let deadline = tokio::time::Instant::now() + grace;
        for (mut watcher, kill) in self.watchers.drain(..) {
            if tokio::time::timeout_at(deadline, &mut watcher).await.is_err() {
                let _ = kill.send(()).await;
                let _ = watcher.await;
            }
        }
    }
}

async fn watch(
    mut child: Child,
    mut killed: mpsc::Receiver<()>,
    rank: Rank,
    log: PathBuf,
    exits: mpsc::UnboundedSender<WorkerExit>,
) {
    let status = tokio::select! {
        status = child.wait() => status,
        _ = killed.recv() => {
            let _ = child.start_kill();
            child.wait().await
        }
    };
    let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
    let _ = exits.send(WorkerExit { rank, status, last_lines: last_lines(&log, 12) });
}

/// The last lines of a log, for the error that tells of its writer's end.
fn last_lines(path: &Path, count: usize) -> Vec<String> {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(16 << 10)..]).into_owned();
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines[lines.len().saturating_sub(count)..].to_vec()
}
