//! Starts runs, lets faults happen, and looks at what is left.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drift_coordinator::domain::Iteration;
use drift_coordinator::store::Journal;
use sha2::{Digest, Sha256};

use crate::faults::{Fault, Kind, PAUSE, Schedule, Victim};
use crate::latencies::Latencies;
use crate::log;
use crate::model;

/// As short as a run with every phase, several epochs and many shards can be.
const SETTINGS: [&str; 17] = [
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
    /// Makes the model and runs it undisturbed.
    pub(crate) fn make(folder: &Path, workers: u32) -> Result<Self> {
        let model = folder.join("model");
        model::write(&root().join(".cache/models/SmolLM2-135M-Instruct"), &model)
            .context("make the small model; `make setup` exports the one it is made of")?;
        let mut bed = Self {
            model,
            workers,
            expected: BTreeMap::new(),
            places: Vec::new(),
            samples: 0,
            seconds: 0.0,
        };
        let dir = folder.join("undisturbed");
        let began = Instant::now();
        let mut follower = Follower::new(Schedule(Vec::new()));
        let status = follower.follow(bed.begin(&dir))?;
        ensure!(status.success(), "the undisturbed run failed:\n{}", follower.log);
        bed.seconds = began.elapsed().as_secs_f64();
        bed.expected = published(&dir)?;
        bed.places = follower.log.lines().filter_map(log::place).collect();
        bed.samples = samples(&dir)?;
        Ok(bed)
    }

    /// Runs to the end under a schedule.
    pub(crate) fn run(&self, dir: &Path, schedule: Schedule) -> Result<Verdict> {
        let mut follower = Follower::new(schedule);
        let (mut restarts, mut failure) = (0, None);
        let mut command = self.begin(dir);
        let deadline = Instant::now() + PATIENCE;
        loop {
            follower.deadline = deadline;
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
                true => self.resume(dir),
                false => self.begin(dir),
            };
        }
        failure =
            failure.or_else(|| self.compare(dir, &follower.log).err().map(|e| format!("{e:#}")));
        Ok(Verdict {
            failure,
            fired: follower.fired,
            lost: follower.lost,
            restarts,
            latencies: follower.latencies,
            log: follower.log,
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
            let log = std::fs::read_to_string(dir.join(format!("logs/worker-{rank}.log")))?;
            ensure!(!log.contains("panicked"), "worker {rank} panicked:\n{log}");
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

/// Follows a run's story over the lives of its coordinators, and lets faults happen.
struct Follower {
    waiting: Vec<Fault>,
    workers: BTreeMap<u32, u32>,
    /// Every worker of the coordinator of now.
    pids: Vec<u32>,
    /// Workers that a signal struck, and which.
    struck: BTreeMap<u32, (Kind, Instant)>,
    lost_in_training: Option<Instant>,
    phase: String,
    deadline: Instant,
    fired: usize,
    lost: usize,
    latencies: Latencies,
    /// Whether a fault ended the coordinator of now, and since when.
    coordinator_fell: bool,
    told_to_stop: Option<Instant>,
    log: String,
}

/// A stop by SIGTERM is to be over by then, and workers are to be gone so long after
/// their coordinator.
const STOP_LIMIT: Duration = Duration::from_secs(5);
const ORPHAN_LIMIT: Duration = Duration::from_secs(10);

impl Follower {
    fn new(schedule: Schedule) -> Self {
        let mut waiting = schedule.0;
        waiting.reverse();
        Self {
            waiting,
            workers: BTreeMap::new(),
            pids: Vec::new(),
            struck: BTreeMap::new(),
            lost_in_training: None,
            phase: "start".to_owned(),
            deadline: Instant::now() + PATIENCE,
            fired: 0,
            lost: 0,
            latencies: Latencies::default(),
            coordinator_fell: false,
            told_to_stop: None,
            log: String::new(),
        }
    }

    /// Runs one coordinator to its end.
    fn follow(&mut self, mut command: Command) -> Result<ExitStatus> {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let coordinator = child.id();
        let stderr = child.stderr.take().context("its log")?;
        let (lines, told) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        self.workers.clear();
        self.pids.clear();
        self.struck.clear();
        self.phase = "start".to_owned();
        (self.coordinator_fell, self.lost_in_training, self.told_to_stop) = (false, None, None);
        self.listen(&told, coordinator)?;
        if Instant::now() > self.deadline {
            signal(coordinator, "KILL");
            for pid in self.workers.values() {
                signal(*pid, "KILL");
            }
            self.log.push_str("(it took too long)\n");
        }
        let status = child.wait()?;
        if let Some(since) = self.told_to_stop {
            self.latencies.stopped.push(since.elapsed());
        }
        Ok(status)
    }

    /// What a coordinator that ended must not leave: workers that live on, or a stop
    /// that took long.
    fn left_behind(&self) -> Option<String> {
        if let Some(since) = self.told_to_stop
            && since.elapsed() > STOP_LIMIT
        {
            return Some(format!("a stop by SIGTERM took {:?}", since.elapsed()));
        }
        let ended = Instant::now();
        let is_alive = |pid: &u32| {
            // A zombie of a reaped parent's is gone.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        while self.pids.iter().any(is_alive) {
            if ended.elapsed() > ORPHAN_LIMIT {
                return Some("workers outlive their coordinator".to_owned());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    fn listen(&mut self, told: &Receiver<String>, coordinator: u32) -> Result<()> {
        loop {
            match told.recv_timeout(Duration::from_millis(500)) {
                Ok(line) => {
                    self.hear(&line);
                    self.log.push_str(&line);
                    self.log.push('\n');
                    let place = log::place(&line);
                    if self.waiting.last().is_some_and(|f| Some(&f.place) == place.as_ref())
                        && let Some(fault) = self.waiting.pop()
                    {
                        self.fire(&fault, coordinator)?;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) if Instant::now() > self.deadline => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn hear(&mut self, line: &str) {
        if let Some((rank, pid)) = log::attached(line) {
            self.workers.insert(rank, pid);
            self.pids.push(pid);
        }
        if let Some(rank) = log::lost(line) {
            self.lost += 1;
            if let Some((kind, since)) = self.struck.remove(&rank) {
                match kind {
                    Kind::Stop => self.latencies.silence.push(since.elapsed()),
                    _ => self.latencies.noticed.push(since.elapsed()),
                }
                if self.phase == "Training" {
                    self.lost_in_training = Some(Instant::now());
                }
            }
        }
        if let Some(phase) = log::phase(line) {
            self.phase = phase;
        }
        if log::is_step(line)
            && let Some(since) = self.lost_in_training.take()
        {
            self.latencies.trained_again.push(since.elapsed());
        }
    }

    fn fire(&mut self, fault: &Fault, coordinator: u32) -> Result<()> {
        std::thread::sleep(fault.delay);
        let pid = match fault.victim {
            Victim::Coordinator => Some(coordinator),
            Victim::Worker(rank) => self.workers.get(&rank).copied(),
        };
        // A worker that has not attached has no process that is known here.
        let Some(pid) = pid else { return Ok(()) };
        self.fired += 1;
        *self.latencies.by_phase.entry(self.phase.clone()).or_default() += 1;
        self.log.push_str(&format!("(chaos: {:?} {:?})\n", fault.kind, fault.victim));
        match fault.kind {
            Kind::Kill => signal(pid, "KILL"),
            Kind::Stop => signal(pid, "STOP"),
            Kind::Term => signal(pid, "TERM"),
            Kind::Pause => {
                signal(pid, "STOP");
                std::thread::sleep(PAUSE);
                signal(pid, "CONT");
            }
        }
        match (fault.victim, fault.kind) {
            (Victim::Coordinator, kind) => {
                self.coordinator_fell = true;
                self.told_to_stop = (kind == Kind::Term).then(Instant::now);
            }
            (Victim::Worker(rank), kind @ (Kind::Kill | Kind::Stop)) => {
                self.struck.insert(rank, (kind, Instant::now()));
            }
            (Victim::Worker(_), _) => {}
        }
        Ok(())
    }
}

fn signal(pid: u32, name: &str) {
    // The process may have ended by itself.
    let _ =
        Command::new("kill").args(["-s", name, &pid.to_string()]).stderr(Stdio::null()).status();
}

/// The workspace's root.
fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// The coordinator of this build, without settings of today's shell.
fn coordinator() -> Command {
    let own = std::env::current_exe().unwrap_or_default();
    let mut command = Command::new(own.with_file_name("coordinator"));
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
