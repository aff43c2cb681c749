//! Runs over several hosts, so that cables can be pulled: the coordinator on the first,
//! one worker on each of the others.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::network::{Network, address};

/// The port that coordinators listen at: workers find the next one there, too.
const PORT: u16 = 7077;

/// What a congested link still carries: a step's gradients take seconds.
const CONGESTED: &str = "4mbit";

/// Hosts on one switch.
pub(crate) struct Hosts {
    network: Network,
    workers: usize,
}

impl Hosts {
    /// Whether this user may make network namespaces.
    pub(crate) fn are_possible() -> bool {
        let probe = format!("drift-probe{}", std::process::id());
        let ip = |verb: &str| {
            let mut command = Command::new("ip");
            command.args(["netns", verb, &probe]).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        ip("add") && ip("delete")
    }

    pub(crate) fn make(folder: &Path, workers: u32) -> Self {
        let names: Vec<String> = (0..=workers).map(|host| format!("host{host}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Self { network: Network::make(folder, &names), workers: workers as usize }
    }

    /// How many workers there are to be.
    pub(crate) fn workers(&self) -> usize {
        self.workers
    }

    /// A coordinator on its host. `begins` what others start the workers of.
    pub(crate) fn coordinator(&self, mut command: Command, begins: bool) -> Command {
        if begins {
            let listen = format!("launch.listen={}:{PORT}", address(0));
            command.args(["--set", "launch.start=none", "--set", &listen]);
        }
        self.network.on(0, &command)
    }

    /// A worker on each of the other hosts, where none is: a coordinator that is told to
    /// stop sends its workers home.
    pub(crate) fn start_workers(
        &self,
        program: &Path,
        dir: &Path,
        all: &mut Workers,
    ) -> Result<()> {
        all.processes.resize_with(self.workers, || None);
        for (slot, process) in all.processes.iter_mut().enumerate() {
            if let Some(process) = process
                && process.try_wait().context("look at a worker")?.is_none()
            {
                continue;
            }
            let mut command = Command::new(program);
            command.arg("--join").arg(dir.join("join")).args(["--slot", &slot.to_string()]);
            // As many threads as each has of this machine's cores in a local run.
            let threads = threads_of_each(self.workers);
            command.args(["--device", "cpu", "--wait", "60", "--threads", &threads]);
            command.env_remove("DRIFT_JOIN_TOKEN").env_remove("DRIFT_JOIN_DIR");
            let log = dir.join(format!("worker-{slot}.log"));
            let file = std::fs::File::options().create(true).append(true).open(&log);
            let file = file.context("make a worker's log")?;
            let mut command = self.network.on(slot + 1, &command);
            let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
            *process = Some(command.spawn().context("start a worker")?);
        }
        Ok(())
    }

    /// Pulls the cable of the host of worker `rank`, or the coordinator's; or plugs it in.
    pub(crate) fn plug(&self, rank: Option<u32>, state: &str) {
        self.network.plug(host(rank), state);
    }

    /// Makes its cable slow, or as fast as ever.
    pub(crate) fn congest(&self, rank: Option<u32>, congested: bool) {
        self.network.limit(host(rank), congested.then_some(CONGESTED));
    }
}

fn host(rank: Option<u32>) -> usize {
    rank.map_or(0, |rank| rank as usize + 1)
}

fn threads_of_each(workers: usize) -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / workers).max(1).to_string()
}

/// Workers of one run, by slot. Dropped, they are gone.
#[derive(Default)]
pub(crate) struct Workers {
    processes: Vec<Option<Child>>,
}

impl Drop for Workers {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().flatten() {
            // Those that it supervises die with it.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
