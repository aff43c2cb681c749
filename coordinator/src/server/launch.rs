//! Starts local worker processes, watches them, and leaves none behind.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use drift_proto::{LAUNCHER_ENV, SLURM_LAUNCHER};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::opening::WayIn;
use super::slurm::Allocation;
use crate::config::{DeviceChoice, LaunchSettings};
use crate::run::command::Rank;
use crate::store::names;

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
    /// Counts the processes that were started; a lost one's successor has another.
    pub process: u64,
    /// Whether it ended by itself, rather than by a signal.
    pub by_itself: bool,
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

/// Threads of each worker: as set, or its share of the cores of a machine with
/// `workers` of them.
pub fn threads_per_worker(settings: &LaunchSettings, workers: u32) -> usize {
    if settings.threads > 0 {
        return settings.threads;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / workers as usize).max(1)
}

/// For `srun` to hear from a node that its task is gone.
const STEP_GRACE: Duration = Duration::from_secs(10);

/// How the workers of a run are started.
#[derive(Debug)]
pub struct LaunchPlan {
    /// The program.
    pub program: PathBuf,
    /// Device and program, as set.
    pub settings: LaunchSettings,
    /// Threads of each.
    pub threads: usize,
    /// Where they find the coordinator, and what lets them in.
    pub way: Arc<WayIn>,
    /// Folder of their logs.
    pub logs: PathBuf,
    /// The Slurm job whose nodes they run on; none: this machine.
    pub job: Option<Allocation>,
}

impl LaunchPlan {
    fn command(&self, rank: Rank, log: &Path) -> Result<Command, LaunchError> {
        let Self { program, settings, threads, way, job, .. } = self;
        let open = || File::options().create(true).append(true).open(log);
        let log_error = |cause| LaunchError::Log { path: log.to_owned(), cause };
        let (out, err) = (open().map_err(log_error)?, open().map_err(log_error)?);
        let on_its_machine = job.as_ref().map_or(rank.0, |job| job.place(rank).on_node);
        let device = match settings.device {
            DeviceChoice::Auto => "auto".to_owned(),
            DeviceChoice::Cpu => "cpu".to_owned(),
            DeviceChoice::Cuda => format!("cuda:{on_its_machine}"),
        };
        let ((variable, secret), other) = way.environment();
        let mut command = match job {
            Some(job) => {
                let mut command = Command::new("srun");
                job.prepare(&mut command, rank);
                // They find the coordinator by the join folder: not all are on its machine.
                command.arg(program).env(LAUNCHER_ENV, SLURM_LAUNCHER);
                command
            }
            None => {
                let mut command = Command::new(program);
                command.arg("--coordinator").arg(way.url());
                command.env(LAUNCHER_ENV, std::process::id().to_string());
                command
            }
        };
        if !settings.interface.is_empty() {
            command.args(["--interface", &settings.interface]);
        }
        command
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
        Ok(command)
    }
}

/// Running workers of one run. Dropped, it kills them.
#[derive(Debug)]
pub struct Launcher {
    /// None where somebody else starts them.
    plan: Option<LaunchPlan>,
    exits: mpsc::UnboundedSender<WorkerExit>,
    running: BTreeMap<Rank, Running>,
    processes: u64,
}

/// A process and the task that watches it.
#[derive(Debug)]
struct Running {
    process: u64,
    /// It was given up: its end is no news.
    is_dismissed: bool,
    watcher: JoinHandle<()>,
    kill: mpsc::Sender<()>,
}

impl Launcher {
    /// Starts nothing yet; ends of processes go to `exits`.
    pub fn new(plan: Option<LaunchPlan>, exits: mpsc::UnboundedSender<WorkerExit>) -> Self {
        Self { plan, exits, running: BTreeMap::new(), processes: 0 }
    }

    /// Whether this is the rank's process of now, and not given up.
    pub fn is_current(&self, rank: Rank, process: u64) -> bool {
        self.running.get(&rank).is_some_and(|r| r.process == process && !r.is_dismissed)
    }

    /// Kills the worker of `rank`, if there is one: a process that is stopped or hangs
    /// holds sockets that others wait for.
    pub fn kill(&mut self, rank: Rank) {
        if let Some(running) = self.running.get_mut(&rank) {
            running.is_dismissed = true;
            // A full queue holds the same wish already.
            let _ = running.kill.try_send(());
        }
    }

    /// Starts the worker of `rank` once the one before it, if any, is gone: two do not
    /// fit into a device's memory.
    ///
    /// # Errors
    /// Its log cannot be opened, or the program not be started.
    pub fn start(&mut self, rank: Rank) -> Result<(), LaunchError> {
        let Some(plan) = &self.plan else { return Ok(()) };
        let log = plan.logs.join(names::worker_log(rank.0));
        let is_step = plan.job.is_some();
        let program = if is_step { PathBuf::from("srun") } else { plan.program.clone() };
        let mut command = plan.command(rank, &log)?;
        self.kill(rank);
        let before = self.running.remove(&rank);
        self.processes += 1;
        let process = self.processes;
        let first = match before {
            None => Some(spawn(&mut command, &program)?),
            Some(_) => None,
        };
        let (kill, mut killed) = mpsc::channel(1);
        let exits = self.exits.clone();
        let watcher = tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.watcher.await;
            }
            let spawned = first.map_or_else(|| spawn(&mut command, &program), Ok);
            let (status, by_itself) = match spawned {
                Ok(child) => watch(child, is_step, &mut killed).await,
                Err(error) => (error.to_string(), true),
            };
            let last_lines = last_lines(&log, 12);
            let _ = exits.send(WorkerExit { rank, process, by_itself, status, last_lines });
        });
        self.running.insert(rank, Running { process, is_dismissed: false, watcher, kill });
        Ok(())
    }

    /// Waits until all workers are gone; kills those that are still there after `grace`.
    pub async fn reap(&mut self, grace: Duration) {
        let deadline = tokio::time::Instant::now() + grace;
        for (_, Running { mut watcher, kill, .. }) in std::mem::take(&mut self.running) {
            if tokio::time::timeout_at(deadline, &mut watcher).await.is_err() {
                let _ = kill.send(()).await;
                let _ = watcher.await;
            }
        }
    }
}

fn spawn(command: &mut Command, program: &Path) -> Result<Child, LaunchError> {
    command.spawn().map_err(|cause| LaunchError::Spawn { program: program.to_owned(), cause })
}

/// Waits for a process to end, or ends it; says how it ended, and whether by itself.
async fn watch(mut child: Child, is_step: bool, killed: &mut mpsc::Receiver<()>) -> (String, bool) {
    let status = tokio::select! {
        status = child.wait() => status,
        _ = killed.recv() => {
            if is_step {
                end_step(&mut child).await;
            }
            let _ = child.start_kill();
            child.wait().await
        }
    };
    match status {
        // `srun` passes a signal that ended its task on as a shell does.
        Ok(status) => (status.to_string(), status.code().is_some_and(|code| code <= 128)),
        Err(error) => (error.to_string(), false),
    }
}

/// Has `srun` kill its task, on whichever node that is, and waits until it did: killed
/// itself, it would be gone before its task is.
async fn end_step(srun: &mut Child) {
    use rustix::process::{Pid, Signal, kill_process};
    let Some(pid) = srun.id().and_then(|id| Pid::from_raw(id as i32)) else { return };
    if kill_process(pid, Signal::TERM).is_ok() {
        let _ = tokio::time::timeout(STEP_GRACE, srun.wait()).await;
    }
}

/// The last lines of a log, for the error that tells of its writer's end.
fn last_lines(path: &Path, count: usize) -> Vec<String> {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(16 << 10)..]).into_owned();
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines[lines.len().saturating_sub(count)..].to_vec()
}
