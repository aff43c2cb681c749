//! The same short run, on this machine and in containers.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::Place;
use crate::project::{Fault, Project, docker, told};
use crate::watching;

/// The demo, shortened: all phases, several steps and shards, a minute.
const SETTINGS: [(&str, &str); 14] = [
    ("data.limit", "10"),
    ("data.held_out", "2"),
    ("text.max_length", "160"),
    ("text.max_prompt_tokens", "96"),
    ("text.today", "2026-01-01"),
    ("sampling.max_prompt_tokens", "128"),
    ("sampling.max_new_tokens", "32"),
    ("sampling.shard_prompts", "1"),
    ("training.warm_start_epochs", "1"),
    ("training.iterations", "1"),
    ("training.pairs_per_worker", "1"),
    ("training.dtype", "bf16"),
    ("run.snapshot_steps", "3"),
    ("run.log_steps", "true"),
];

/// A run has this long, whatever happens to it.
const PATIENCE: Duration = Duration::from_secs(300);

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// What all runs are compared with.
pub(crate) struct Bed {
    folder: tempfile::TempDir,
    expected: BTreeMap<String, String>,
    tag: String,
    verbose: bool,
    pub(crate) seconds: f64,
}

impl Bed {
    /// Runs it with two workers on this machine.
    pub(crate) fn make(tag: &str, verbose: bool) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let run = folder.path().join("local");
        let began = Instant::now();
        let mut command = Command::new(root().join("target/release/coordinator"));
        command.current_dir(root()).arg("--config").arg("configs/demo.toml");
        command.args(["--workers", "2", "--set", "launch.threads=1", "--run-dir"]).arg(&run);
        for (key, value) in SETTINGS {
            command.args(["--set", &format!("{key}={value}")]);
        }
        told(command)?;
        let seconds = began.elapsed().as_secs_f64();
        let mut overrides = "services:\n  coordinator:\n    environment:\n".to_owned();
        for (key, value) in SETTINGS {
            let variable = key.to_uppercase().replace('.', "__");
            writeln!(overrides, "      DRIFT__{variable}: \"{value}\"")?;
        }
        std::fs::write(folder.path().join("short.yaml"), overrides)?;
        let expected = published(&run)?;
        let weights = "01/checkpoint/model.safetensors";
        ensure!(expected.contains_key(weights) && expected.contains_key("01/pairs.parquet"));
        Ok(Self { folder, expected, tag: tag.to_owned(), verbose, seconds })
    }

    /// How many files are compared.
    pub(crate) fn files(&self) -> usize {
        self.expected.len()
    }

    fn project(&self, name: &str) -> Project {
        Project::new(name, &self.folder.path().join("short.yaml"), &self.tag)
    }

    /// `compose up` exits 0 by itself when the run is finished.
    pub(crate) fn undisturbed(&self) -> Result<()> {
        let project = self.project("plain");
        let shown = self.folder.path().join("shown");
        let mut up = project.compose(&["up", "--no-color"]);
        let mut up = up.stdout(File::create(&shown)?).stderr(Stdio::null()).spawn()?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = up.try_wait()? {
                break status;
            }
            // Workers wait for a coordinator for longer than a test wants to.
            let given_up = project.inspect("coordinator", "{{.State.Status}} {{.State.ExitCode}}");
            let given_up = given_up.is_ok_and(|s| s.starts_with("exited ") && s != "exited 0");
            if given_up || Instant::now() > deadline {
                up.kill()?;
                up.wait()?;
                bail!("the run did not finish:\n{}", project.logs());
            }
            std::thread::sleep(Duration::from_millis(500));
        };
        ensure!(status.success(), "`up` ended with {status}:\n{}", project.logs());
        // What it showed is the containers' own lines: JSON, until the tables at the end.
        let lines = std::fs::read_to_string(&shown)?;
        let is_json = |line: &&str| {
            let text = line.split_once('|').map_or("", |(_, text)| text.trim());
            serde_json::from_str::<serde_json::Value>(text).is_ok_and(|l| l.is_object())
        };
        let json = lines.lines().filter(is_json).count();
        ensure!(json > 50, "{json} lines of the log are JSON:\n{lines}");
        for service in ["coordinator", "worker-0", "worker-1"] {
            let code = project.inspect(service, "{{.State.ExitCode}} {{.RestartCount}}")?;
            ensure!(code == "0 0", "{service}: status and restarts {code}\n{}", project.logs());
        }
        self.compare(&project)
    }

    /// Health, readiness and metrics of both programs, while each waits for the other.
    pub(crate) fn watched(&self) -> Result<()> {
        let project = self.project("watched");
        told(project.compose(&["up", "-d"]))?;
        await_place(&project, Place::Training)?;
        watching::metrics_are_accepted(&project)?;
        watching::a_paused_peer_makes_unready(&project, "worker-1", "coordinator")?;
        self.ends_well(&project)
    }

    /// Faults between containers leave the same bytes.
    pub(crate) fn disturbed(&self, faults: &[(Place, Fault)]) -> Result<()> {
        let project = self.project("faults");
        told(project.compose(&["up", "-d"]))?;
        for (place, fault) in faults {
            await_place(&project, *place)?;
            println!("  in {place:?}: {fault}");
            project.disturb(*fault).with_context(|| fault.to_string())?;
        }
        self.ends_well(&project)
    }

    fn ends_well(&self, project: &Project) -> Result<()> {
        let code = project.wait("coordinator", PATIENCE)?;
        ensure!(code == 0, "the coordinator ended with {code}:\n{}", project.logs());
        for worker in ["worker-0", "worker-1"] {
            let code = project.wait(worker, Duration::from_secs(60))?;
            ensure!(code == 0, "{worker} ended with {code}:\n{}", project.logs());
        }
        self.compare(project)
    }

    fn compare(&self, project: &Project) -> Result<()> {
        if self.verbose {
            println!("{}", project.logs());
        }
        let into = self.folder.path().join("copied");
        let _ = std::fs::remove_dir_all(&into);
        let from = format!("{}:/runs/demo", project.container("coordinator")?);
        told(docker(&["cp", &from, &into.display().to_string()]))?;
        let found = published(&into)?;
        for (name, hash) in &self.expected {
            let other = found.get(name).with_context(|| format!("{name} is missing"))?;
            ensure!(other == hash, "{name} has other bytes");
        }
        ensure!(found.len() == self.expected.len(), "there are more files than there should be");
        ensure!(!into.join("join").exists(), "secrets outlive the coordinator");
        Ok(())
    }
}

/// Waits until the run is in the middle of a phase.
fn await_place(project: &Project, place: Place) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let (phase, iteration, least) = match place {
        Place::Training => ("training", 0.0, 4.0),
        Place::Sampling => ("sampling", 1.0, 2.0),
    };
    loop {
        // It may be about to start again.
        if let Ok((_, text)) = project.get("coordinator", "/metrics") {
            let value = |name: &str| watching::value(&text, name).unwrap_or_default();
            if value(&format!("drift_phase{{phase=\"{phase}\"}}")) == 1.0
                && value("drift_iteration") == iteration
                && value("drift_phase_done") >= least
            {
                let left = value("drift_phase_planned") - value("drift_phase_done");
                ensure!(left > 0.0, "the end of a phase is not the middle of it");
                return Ok(());
            }
        }
        ensure!(Instant::now() < deadline, "{place:?} did not come:\n{}", project.logs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// SHA-256 of every file under a run's `iterations`, by path.
fn published(run: &Path) -> Result<BTreeMap<String, String>> {
    let base = run.join("iterations");
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
