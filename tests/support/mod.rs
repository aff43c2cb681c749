//! Where things are, and how the peers are asked.

pub(crate) mod model;
pub(crate) mod network;
#[path = "../chaos/model.rs"]
pub(crate) mod small_model;
pub(crate) mod training;

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// A file of the shared conversations.
pub(crate) fn data(name: &str) -> PathBuf {
    let path = root().join("../shared/data").join(name);
    assert!(path.exists(), "test data is missing: {}", path.display());
    path
}

/// SmolLM2-135M-Instruct in Hugging Face format, as `make setup` exports it.
pub(crate) fn demo_model() -> PathBuf {
    let path = root().join(".cache/models/SmolLM2-135M-Instruct");
    assert!(
        path.join("config.json").exists(),
        "run `make setup` first: {} is missing",
        path.display()
    );
    path
}

/// Runs `tests/python/SCRIPT ARGS…` in the project's virtual environment and
/// returns its standard output. Fails the test with the script's own words.
pub(crate) fn python(script: &str, args: &[&str]) -> String {
    let interpreter = root().join(".venv/bin/python");
    let output = Command::new(&interpreter)
        .arg(root().join("tests/python").join(script))
        .args(args)
        .env("OMP_NUM_THREADS", "2")
        .env("HF_HUB_OFFLINE", "1")
        .env("TOKENIZERS_PARALLELISM", "false")
        .output()
        .unwrap_or_else(|e| panic!("run `make setup` first: {}: {e}", interpreter.display()));
    assert!(
        output.status.success(),
        "{script} {args:?} failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// As [`python`]: the JSON object with which a script answers. Says who answered.
pub(crate) fn ask(script: &str, args: &[&str]) -> serde_json::Value {
    let output = python(script, args);
    let reply: serde_json::Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();
    eprintln!("{}: against {}", args[0], reply["versions"].as_str().unwrap());
    reply
}

/// A program of this build.
pub(crate) fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().parent().unwrap().join(name);
    assert!(
        path.exists(),
        "build the programs first (`make build`): {} is missing",
        path.display()
    );
    path
}

/// A coordinator in the workspace's root, without settings of today's shell.
pub(crate) fn coordinator(args: &[&str]) -> Command {
    let mut command = Command::new(program("coordinator"));
    command.args(args).current_dir(root()).stdin(std::process::Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DRIFT__") {
            command.env_remove(name);
        }
    }
    command
}

/// The demo model and corpus, as short as a run with every phase can be.
const SHORT: [&str; 11] = [
    // Runs that are compared may begin on two sides of midnight.
    "text.today=2026-01-01",
    "data.limit=8",
    "data.held_out=2",
    "text.max_length=160",
    "text.max_prompt_tokens=96",
    "sampling.max_prompt_tokens=128",
    "sampling.max_new_tokens=12",
    "sampling.shard_prompts=2",
    "training.warm_start_epochs=2",
    "training.iterations=1",
    // As users train.
    "training.dtype=bf16",
];

/// A run with the demo model that is as short as one with every phase can be.
pub(crate) fn short(run: &Path, workers: &str) -> Command {
    let mut command = coordinator(&["--workers", workers, "--run-dir", run.to_str().unwrap()]);
    for setting in SHORT {
        command.args(["--set", setting]);
    }
    command
}

/// A run of the model that [`small_model::write`] makes: with every phase, in seconds.
pub(crate) fn small(run: &Path, workers: &str, model: &Path) -> Command {
    let mut command = short(run, workers);
    command.args(["--model", model.to_str().unwrap()]);
    for setting in ["sampling.cache_budget=\"64MiB\"", "run.snapshot_steps=1"] {
        command.args(["--set", setting]);
    }
    command
}

/// Goes on with a run.
pub(crate) fn resume(run: &Path) -> Command {
    coordinator(&["--run-dir", run.to_str().unwrap(), "--resume"])
}

/// What a finished program left.
pub(crate) struct Ended {
    /// Exit status; none where a signal ended it.
    pub(crate) code: Option<i32>,
    /// The signal that ended it.
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command to its end.
pub(crate) fn ended(mut command: Command) -> Ended {
    let output = command.output().unwrap();
    Ended {
        code: output.status.code(),
        signal: output.status.signal(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs a command that must exit with 0.
pub(crate) fn succeeds(command: Command) -> Ended {
    let ended = ended(command);
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.stdout, ended.stderr);
    ended
}

/// Starts a command, sends its process `signal` once a line of its log holds
/// `line`, and waits for its end. `None` where no line did.
pub(crate) fn signalled_at(mut command: Command, line: &str, signal: &str) -> Option<Ended> {
    use std::io::{BufRead, BufReader};
    let mut child = command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = String::new();
    let mut sent = false;
    for text in BufReader::new(child.stderr.take().unwrap()).lines() {
        let text = text.unwrap();
        if !sent && text.contains(line) {
            sent = true;
            let pid = child.id().to_string();
            assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        }
        log.push_str(&text);
        log.push('\n');
    }
    let status = child.wait().unwrap();
    sent.then_some(Ended {
        code: status.code(),
        signal: status.signal(),
        stdout: String::new(),
        stderr: log,
    })
}

/// Where a coordinator said that it listens; nowhere, if it started no worker.
pub(crate) fn address(log: &str) -> Option<String> {
    let after = log.split("address=").nth(1)?;
    Some(format!("http://{}", after.split_whitespace().next().unwrap()))
}

/// Processes whose command line holds `part`.
pub(crate) fn processes(part: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(part) {
            found.push(line);
        }
    }
    found
}

/// Waits until `holds`; panics with `what` after `seconds`.
pub(crate) fn eventually(seconds: u64, what: &str, holds: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "not within {seconds} s: {what}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// SHA-256 of every file under a run's `iterations`, by path: everything that
/// equal runs have in common.
pub(crate) fn published(run: &Path) -> std::collections::BTreeMap<String, String> {
    fn walk(folder: &Path, base: &Path, files: &mut std::collections::BTreeMap<String, String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, base, files);
            } else {
                let name = path.strip_prefix(base).unwrap().display().to_string();
                let hash: [u8; 32] = sha2::Digest::finalize(sha2::Digest::chain_update(
                    <sha2::Sha256 as sha2::Digest>::new(),
                    std::fs::read(&path).unwrap(),
                ))
                .into();
                files.insert(name, hash.iter().map(|b| format!("{b:02x}")).collect());
            }
        }
    }
    let mut files = std::collections::BTreeMap::new();
    let iterations = run.join("iterations");
    walk(&iterations, &iterations, &mut files);
    files
}

/// Lines of an iteration's `metrics.jsonl`.
pub(crate) fn metrics(run: &Path, iteration: u32) -> Vec<serde_json::Value> {
    let path = run.join(format!("iterations/{iteration:02}/metrics.jsonl"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every iteration's first step has a loss of exactly ln 2 and no margin.
pub(crate) fn first_steps_are_ln_2(run: &Path, iterations: u32) {
    for k in 0..=iterations {
        let first = &metrics(run, k)[0];
        assert_eq!(first["loss"].as_f64().unwrap(), std::f64::consts::LN_2, "iteration {k}");
        for name in ["rewards/margins", "rewards/chosen", "rewards/rejected"] {
            assert_eq!(first[name].as_f64().unwrap(), 0.0, "iteration {k}: {name}");
        }
    }
}

/// What the pairs that an iteration holds out say after its last epoch.
#[derive(Debug)]
pub(crate) struct HeldOut {
    pub(crate) pairs: f64,
    /// Share of pairs in which the chosen side's reward is higher.
    pub(crate) accuracy: f64,
    /// Mean difference of the sides' rewards.
    pub(crate) margin: f64,
}

pub(crate) fn held_out(run: &Path, iteration: u32) -> HeldOut {
    let rows = metrics(run, iteration);
    let last = rows.last().unwrap();
    let number = |name: &str| last[name].as_f64().expect("an evaluation comes last");
    HeldOut {
        pairs: number("eval_pairs"),
        accuracy: number("eval_rewards/accuracies"),
        margin: number("eval_rewards/margins"),
    }
}
