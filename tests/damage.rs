//! Damaged run directories: each file cut, with a flipped bit, gone. `verify` names
//! it, and `--resume` ends with the bytes of an undisturbed run or names it too.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use drift_coordinator::store::FileEntry;

use crate::support::{
    Ended, address, coordinator, ended, eventually, processes, published, resume, signalled_at,
    small_model, succeeds,
};

/// What is done to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    Cut,
    Flipped,
    Gone,
}

const HARMS: [Harm; 3] = [Harm::Cut, Harm::Flipped, Harm::Gone];

/// A run with one worker on one thread, with every phase, in seconds: two epochs
/// of the warm start and two of iteration 1.
fn small(model: &Path, run: &Path) -> std::process::Command {
    let mut command = coordinator(&["--run-dir", run.to_str().unwrap(), "--workers", "1"]);
    command.args(["--model", model.to_str().unwrap()]);
    for setting in [
        "launch.threads=1",
        "text.today=2026-01-01",
        "data.limit=8",
        "data.held_out=2",
        "text.max_length=96",
        "text.max_prompt_tokens=64",
        "sampling.max_prompt_tokens=64",
        "sampling.max_new_tokens=6",
        "sampling.shard_prompts=2",
        "training.warm_start_epochs=2",
        "training.epochs=2",
        "training.iterations=1",
    ] {
        command.args(["--set", setting]);
    }
    command
}

/// Files of a directory by their names in it.
fn files(root: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                names.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    names.sort();
    names
}

/// A copy of a run. Files that nothing writes in place are shared.
fn copy(from: &Path, to: &Path) {
    for name in files(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        let shared = ["checkpoint/", "snapshots/"].iter().any(|part| name.contains(part));
        if shared {
            fs::hard_link(from, to).unwrap();
        } else {
            fs::copy(from, to).unwrap();
        }
    }
    // Folders that are empty belong to the layout too.
    for folder in ["iterations", "snapshots", "logs"] {
        fs::create_dir_all(to.join(folder)).unwrap();
    }
}

/// Harms a file that may be shared: its name gets a file of its own.
fn harm(path: &Path, harm: Harm, at: impl Fn(&[u8]) -> usize) {
    let mut bytes = fs::read(path).unwrap();
    fs::remove_file(path).unwrap();
    match harm {
        Harm::Cut => bytes.truncate(bytes.len() / 2),
        Harm::Flipped => {
            let at = at(&bytes);
            bytes[at] ^= 0x10;
        }
        Harm::Gone => return,
    }
    fs::write(path, bytes).unwrap();
}

/// Nothing rests on these: they may be harmed and nobody told.
fn is_free(name: &str) -> bool {
    name == "lock" || name.starts_with("logs/")
}

/// A finished run, or one that was killed, with each of its files harmed in turn.
struct Case<'a> {
    whole: &'a Path,
    scratch: &'a Path,
    copies: &'a AtomicUsize,
    expected: &'a BTreeMap<String, String>,
}

impl Case<'_> {
    /// The run with one file harmed; and what `verify` says of it.
    fn harmed(&self, name: &str, how: Harm, at: impl Fn(&[u8]) -> usize) -> (PathBuf, Ended) {
        let number = self.copies.fetch_add(1, Ordering::Relaxed);
        let run = self.scratch.join(format!("run-{number}"));
        copy(self.whole, &run);
        harm(&run.join(name), how, at);
        let told = ended(coordinator(&["verify", run.to_str().unwrap()]));
        assert!(!told.stderr.contains("panicked"), "{}", told.stderr);
        (run, told)
    }

    fn is_named(&self, name: &str, how: Harm, told: &Ended) {
        let is_told = told.stdout.lines().any(|line| {
            (line.starts_with("damaged") || line.starts_with("missing")) && line.contains(name)
        });
        assert_eq!(told.code, Some(1), "{name} {how:?}: {}{}", told.stdout, told.stderr);
        assert!(is_told, "{name} {how:?} is not named:\n{}", told.stdout);
    }

    /// Goes on with the harmed run: the same bytes, or a refusal by name.
    fn goes_on(&self, run: &Path, name: &str, how: Harm) -> Ended {
        let last = ended(resume(run));
        let log = fs::read_to_string(run.join("logs/coordinator.log")).unwrap_or_default();
        for text in [&last.stderr, &last.stdout, &log] {
            assert!(!text.contains("panicked"), "{name} {how:?}: {text}");
        }
        if last.code == Some(0) {
            let mut found = published(run);
            found.retain(|name, _| !name.contains(".damaged-"));
            assert_eq!(&found, self.expected, "{name} {how:?}: {}", last.stderr);
            // Damage that nothing rests on stays in the journal, and is told again.
            let well = ended(coordinator(&["verify", run.to_str().unwrap()]));
            let unmended = |line: &str| !line.contains("the run is not held up");
            let findings: Vec<_> =
                well.stdout.lines().filter(|l| l.starts_with("damaged")).collect();
            assert!(!findings.iter().any(|line| unmended(line)), "{name} {how:?}: {findings:?}");
            assert!(!well.stdout.contains("missing "), "{name} {how:?}: {}", well.stdout);
        } else {
            assert!(last.code.is_some_and(|code| code > 0), "{name} {how:?}: {}", last.stderr);
            assert!(last.stderr.contains(name), "{name} {how:?}: {}", last.stderr);
        }
        fs::remove_dir_all(run).unwrap();
        last
    }
}

/// Does `work` for each job, two at a time: a run computes on one thread.
fn side_by_side<T: Send + Sync>(jobs: &[T], work: impl Fn(&T) + Sync) {
    let next = Mutex::new(jobs.iter());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(job) = { next.lock().unwrap().next() } {
                    work(job);
                }
            });
        }
    });
}

#[test]
fn each_damaged_file_is_named_and_no_resume_ends_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let model = path("model");
    small_model::write(&crate::support::demo_model(), &model).unwrap();

    let once = path("once");
    let began = std::time::Instant::now();
    succeeds(small(&model, &once));
    eprintln!("undisturbed: {:?}", began.elapsed());
    let expected = published(&once);
    assert!(expected.contains_key("01/checkpoint/model.safetensors"));
    let well = succeeds(coordinator(&["verify", once.to_str().unwrap()]));
    assert!(well.stdout.contains("all is well"), "{}", well.stdout);

    // Stopped, its journal in one file; then killed behind each commit up to the one
    // that a snapshot stands behind, so that those are in the log.
    let stopped = path("stopped");
    let line = " committed iteration=1 phase=sampled";
    let halted = signalled_at(small(&model, &stopped), line, "TERM").expect(line);
    assert_eq!(halted.code, Some(143), "{}", halted.stderr);
    let killed = path("killed");
    copy(&stopped, &killed);
    let mut log = String::new();
    while !log.contains(" committed iteration=1 phase=evaluated epoch=0") {
        let mut command = resume(&killed);
        command.env("DRIFT_FAULT", "committed");
        let ended = ended(command);
        assert_eq!(ended.signal, Some(9), "{}", ended.stderr);
        assert!(!ended.stderr.contains("epoch=1"), "too late: {}", ended.stderr);
        if let Some(address) = address(&ended.stderr) {
            let slot = format!("worker --coordinator {address}");
            eventually(15, "the worker outlives its coordinator", || processes(&slot).is_empty());
        }
        log.push_str(&ended.stderr);
    }
    let well = succeeds(coordinator(&["verify", killed.to_str().unwrap()]));
    assert!(well.stdout.contains("snapshots/01-epoch-0"), "{}", well.stdout);
    assert!(killed.join("journal.sqlite-wal").exists());

    let scratch = path("scratch");
    fs::create_dir(&scratch).unwrap();
    let copies = AtomicUsize::new(0);
    for whole in [&once, &killed] {
        let began = std::time::Instant::now();
        let case = Case { whole, scratch: &scratch, copies: &copies, expected: &expected };
        let jobs: Vec<(String, Harm)> = files(whole)
            .into_iter()
            .flat_map(|name| HARMS.map(|how| (name.clone(), how)))
            .collect();
        side_by_side(&jobs, |(name, how)| {
            let middle = |bytes: &[u8]| match name.as_str() {
                // Where a row is: bytes that no row uses are nobody's.
                "journal.sqlite" => place(bytes, &config_hash(whole)),
                _ => bytes.len() / 2,
            };
            let (run, told) = case.harmed(name, *how, middle);
            // Of a run that was killed these may be behind.
            let in_hand = whole == &killed && name == "iterations/01/metrics.jsonl";
            if !is_free(name) && (!in_hand || *how == Harm::Flipped) {
                case.is_named(name, *how, &told);
            }
            case.goes_on(&run, name, *how);
        });
        eprintln!("{} cases of {}: {:?}", jobs.len(), whole.display(), began.elapsed());
    }

    // Wherever in a journal a bit flips: it is told, or nothing rests on it.
    for (whole, places) in [(&once, 40), (&stopped, 30)] {
        let case = Case { whole, scratch: &scratch, copies: &copies, expected: &expected };
        let length = fs::metadata(whole.join("journal.sqlite")).unwrap().len() as usize;
        let places: Vec<usize> = (0..length).step_by(length / places).collect();
        let told = Mutex::new(0);
        side_by_side(&places, |&at| {
            let (run, verified) = case.harmed("journal.sqlite", Harm::Flipped, |_| at);
            *told.lock().unwrap() += i32::from(verified.code == Some(1));
            case.goes_on(&run, "journal.sqlite", Harm::Flipped);
        });
        let told = told.into_inner().unwrap();
        eprintln!("{told} of {} flips in the journal are told", places.len());
    }
}

/// The hash of a run's settings, as its journal has it.
fn config_hash(run: &Path) -> Vec<u8> {
    let bytes = fs::read(run.join("config.toml")).unwrap();
    FileEntry::of_bytes(&bytes).sha256.into_bytes()
}

/// Where `part` is in the file.
fn place(bytes: &[u8], part: &[u8]) -> usize {
    bytes.windows(part.len()).position(|found| found == part).unwrap()
}
