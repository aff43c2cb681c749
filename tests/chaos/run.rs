//! Starts runs, lets faults happen, and looks at what is left.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drift_coordinator::domain::Iteration;
use drift_coordinator::store::Journal;
use sha2::{Digest, Sha256};

use crate::faults::Schedule;
use crate::follower::Follower;
use crate::hosts::Hosts;
use crate::latencies::Latencies;
use crate::log;
use crate::model;

/// As short as a run with every phase, several epochs and many shards can be.
const SETTINGS: [&str; 19] = [
    "text.today=2026-01-01",
    "data.limit=12",
    "data.held_out=2",
    "text.max_length=128",
    "text.max_prompt_tokens=64",
    "sampling.max_prompt_tokens=96",
    "sampling.max_new_tokens=12",
    "sampling.shard_prompts=2",
    "sampling.cache_budget=\"64MiB\"",
    "training.warm_start_epochs=2",
    "training.iterations=1",
    "training.pairs_per_worker=2",
    "training.warmup_ratio=0.0",
    "training.learning_rate=1e-3",
    "training.dtype=bf16",
    "launch.heartbeat=0.25",
    "launch.heartbeat_deadline=2",
    "run.snapshot_steps=2",
    "run.log_steps=true",
];

/// A run has this long, whatever happens to it.
const PATIENCE: Duration = Duration::from_secs(120);

/// What all runs have in common, and what an undisturbed one left.
pub(crate) struct Bed {
    model: PathBuf,
    workers: u32,
    hosts: Option<Hosts>,
    expected: BTreeMap<String, String>,
    /// Lines of its story where a fault may happen.
    pub(crate) places: Vec<String>,
    pub(crate) samples: usize,
    pub(crate) seconds: f64,
}

/// What came of a disturbed run.
pub(crate) struct Verdict {
    pub(crate) failure: Option<String>,
    pub(crate) fired: usize,
    pub(crate) lost: usize,
    pub(crate) restarts: usize,
    pub(crate) latencies: Latencies,
    pub(crate) log: String,
}

impl Bed {
    /// Makes the model and runs it undisturbed, on one host. `has_hosts` makes others.
    pub(crate) fn make(folder: &Path, workers: u32, has_hosts: bool) -> Result<Self> {
        let model = folder.join("model");
        model::write(&root().join(".cache/models/SmolLM2-135M-Instruct"), &model)
            .context("make the small model; `make setup` exports the one it is made of")?;
        let mut bed = Self {
            model,
            workers,
            hosts: has_hosts.then(|| Hosts::make(folder, workers)),
            expected: BTreeMap::new(),
            places: Vec::new(),
            samples: 0,
            seconds: 0.0,
        };
        let dir = folder.join("undisturbed");
        let began = Instant::now();
        let mut follower = Follower::new(Schedule::default(), None, Instant::now() + PATIENCE);
        let status = follower.follow(bed.begin(&dir))?;
        let log = std::mem::take(&mut follower.log);
        ensure!(status.success(), "the undisturbed run failed:\n{log}");
        bed.seconds = began.elapsed().as_secs_f64();
        bed.expected = published(&dir)?;
        bed.places = log.lines().filter_map(log::place).collect();
        bed.samples = samples(&dir)?;
        Ok(bed)
    }

    /// Runs to the end under a schedule.
    pub(crate) fn run(&self, dir: &Path, schedule: Schedule) -> Result<Verdict> {
        let hosts = self.hosts.as_ref().filter(|_| schedule.over_hosts);
        let placed = |command: Command, begins| match hosts {
            Some(hosts) => hosts.coordinator(command, begins),
            None => command,
        };
        let deadline = Instant::now() + PATIENCE;
        let mut follower = Follower::new(schedule, hosts.map(|hosts| (hosts, dir)), deadline);
        let (mut restarts, mut failure) = (0, None);
        let mut command = placed(self.begin(dir), true);
        loop {
            let status = follower.follow(command)?;
            if let Some(why) = follower.left_behind() {
                failure = Some(why);
                break;
            }
            if status.success() {
                break;
            }
            let is_ours = follower.coordinator_fell
                && (status.signal() == Some(9) || status.code() == Some(143));
            if !is_ours || Instant::now() > deadline {
                failure = Some(format!("the coordinator ended with {status}"));
                break;
            }
            restarts += 1;
            command = match dir.join("journal.sqlite").exists() {
                true => placed(self.resume(dir), false),
                false => placed(self.begin(dir), true),
            };
        }
        let outcome = follower.end();
        let compared = self.compare(dir, &outcome.log);
        failure = failure.or_else(|| compared.err().map(|error| format!("{error:#}")));
        Ok(Verdict {
            failure,
            fired: outcome.fired,
            lost: outcome.lost,
            restarts,
            latencies: outcome.latencies,
            log: outcome.log,
        })
    }

    /// The same files, the same samples, no panic, nobody left behind.
    fn compare(&self, dir: &Path, log: &str) -> Result<()> {
        let left = published(dir)?;
        for (name, hash) in &self.expected {
            match left.get(name) {
                None => bail!("{name} is missing"),
                Some(other) if other != hash => bail!("{name} has other bytes"),
                Some(_) => {}
            }
        }
        ensure!(left.len() == self.expected.len(), "there are more files: {:?}", left.keys());
        let samples = samples(dir)?;
        ensure!(samples == self.samples, "{samples} samples, not {}", self.samples);
        ensure!(!log.contains("panicked"), "the coordinator panicked");
        for rank in 0..self.workers {
            // Those that a coordinator started log there, and others here.
            for name in [format!("logs/worker-{rank}.log"), format!("worker-{rank}.log")] {
                let log = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
                ensure!(!log.contains("panicked"), "worker {rank} panicked:\n{log}");
            }
        }
        Ok(())
    }

    fn begin(&self, dir: &Path) -> Command {
        let mut command = coordinator();
        command.arg("--workers").arg(self.workers.to_string()).arg("--run-dir").arg(dir);
        command.arg("--model").arg(&self.model).args(["--set", "corpus=[\"demo\"]"]);
        for setting in SETTINGS {
            command.args(["--set", setting]);
        }
        command
    }

    fn resume(&self, dir: &Path) -> Command {
        let mut command = coordinator();
        command.arg("--run-dir").arg(dir).args(["--resume", "--log-steps"]);
        command
    }
}

/// The workspace's root.
fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// A program of this build.
pub(crate) fn program(name: &str) -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name(name)
}

/// The coordinator of this build, without settings of today's shell.
fn coordinator() -> Command {
    let mut command = Command::new(program("coordinator"));
    command.current_dir(root()).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DRIFT_") {
            command.env_remove(name);
        }
    }
    command
}

fn samples(dir: &Path) -> Result<usize> {
    let (journal, _) = Journal::open(&dir.join("journal.sqlite"))?;
    Ok(journal.samples(Iteration(1))?.len())
}

/// SHA-256 of every file under a run's `iterations`, by path.
fn published(dir: &Path) -> Result<BTreeMap<String, String>> {
    let base = dir.join("iterations");
    let (mut files, mut folders) = (BTreeMap::new(), vec![base.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().with_context(|| format!("list {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(&base)?.display().to_string();
                let hash = Sha256::digest(std::fs::read(&path)?);
                files.insert(name, hash.iter().map(|byte| format!("{byte:02x}")).collect());
            }
        }
    }
    Ok(files)
}
