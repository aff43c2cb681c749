//! The process that is fed, and what becomes of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::machine::processor_seconds;
use super::mutate::Draw;
use super::targets::target;

/// An input that computes for longer hangs; so does one that waits for so long.
const PATIENCE: Duration = Duration::from_secs(20);
const WAITING_PATIENCE: Duration = Duration::from_secs(600);
/// What a process may map beyond what it has mapped before its first input.
const MEMORY: u64 = 1 << 30;
/// A target that breaks this often is left.
const ENOUGH: u64 = 20;

/// The number of the input that is being tried, seen by both processes.
pub(crate) struct Counter(File);

impl Counter {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        Ok(Self(file.with_context(|| format!("open {}", path.display()))?))
    }

    pub(crate) fn set(&self, number: u64) -> Result<()> {
        Ok(self.0.write_all_at(&number.to_le_bytes(), 0)?)
    }

    fn get(&self) -> u64 {
        let mut bytes = [0; 8];
        match self.0.read_exact_at(&mut bytes, 0) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(_) => 0,
        }
    }
}

/// Lets this process map a bounded amount more than it has.
pub(crate) fn bound_memory() -> Result<()> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split_whitespace().next().context("statm is empty")?.parse()?;
    let bytes = pages * rustix::param::page_size() as u64 + MEMORY;
    let maximum = getrlimit(Resource::As).maximum;
    Ok(setrlimit(Resource::As, Rlimit { current: Some(bytes), maximum })?)
}

/// Feeds one target for `time` of a processor's, from input `first` on; returns how often
/// something broke.
pub(crate) fn watch(
    name: &str,
    seed: u64,
    mut first: u64,
    time: Duration,
    keep: &Path,
) -> Result<u64> {
    let folder = tempfile::tempdir()?;
    let (counter_path, log_path) = (folder.path().join("number"), folder.path().join("log"));
    let counter = Counter::open(&counter_path)?;
    let mut computed = Duration::ZERO;
    let mut found = 0;
    while computed < time && found < ENOUGH {
        counter.set(first)?;
        let mut child = Command::new(std::env::current_exe()?)
            .args([name, "--seed", &seed.to_string(), "--child"])
            .arg(&counter_path)
            .arg(first.to_string())
            .env("RUST_BACKTRACE", "0")
            .stdout(Stdio::null())
            .stderr(File::create(&log_path)?)
            .spawn()?;
        let (end, took) = follow(&mut child, &counter, time - computed)?;
        computed += took;
        let number = counter.get();
        if let Some(how) = end {
            found += 1;
            let bytes = Draw::new(seed, number).input(&target(name)?.seeds());
            std::fs::create_dir_all(keep)?;
            let path = keep.join(format!("{name}-{seed}-{number}"));
            std::fs::write(&path, &bytes)?;
            let log = std::fs::read_to_string(&log_path).unwrap_or_default();
            let words = log.lines().rev().take(8).collect::<Vec<_>>();
            println!("{name}: input {number} ({} bytes, {}): {how}", bytes.len(), path.display());
            for line in words.iter().rev() {
                println!("  | {line}");
            }
        }
        first = number + 1;
    }
    let seconds = computed.as_secs_f64();
    println!("{name}: {first} inputs in {seconds:.0} s of a processor, {found} broke something");
    Ok(found)
}

/// Waits until the process ends, hangs, or has computed for `time`; says how it ended
/// before that, and how long it computed.
fn follow(
    child: &mut Child,
    counter: &Counter,
    time: Duration,
) -> Result<(Option<String>, Duration)> {
    let process = Path::new("/proc").join(child.id().to_string());
    let (mut number, mut began, mut since) = (counter.get(), Duration::ZERO, Instant::now());
    let mut computed = Duration::ZERO;
    let how = loop {
        // One that has just ended keeps its last figure.
        if let Ok((user, system)) = processor_seconds(&process) {
            computed = Duration::from_secs_f64(user + system);
        }
        if let Some(status) = child.try_wait()? {
            return Ok((Some(status.to_string()), computed));
        }
        if counter.get() != number {
            (number, began, since) = (counter.get(), computed, Instant::now());
        }
        if computed - began > PATIENCE || since.elapsed() > WAITING_PATIENCE {
            let (computed, waited) = ((computed - began).as_secs(), since.elapsed().as_secs());
            break Some(format!("not done after {computed} s of a processor, {waited} s in all"));
        }
        if computed >= time {
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    child.kill()?;
    child.wait()?;
    Ok((how, computed))
}
