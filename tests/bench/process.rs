//! Starts measured runs as processes, and passes jobs and answers as JSON.

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

/// The signal that nothing survives: the kernel's when memory runs out.
const SIGKILL: i32 = 9;

/// A run under way. Dropped, it is killed.
pub(crate) struct Running {
    /// Absent once its answer was waited for.
    child: Option<Child>,
    what: String,
    /// Read by the process at any time, so kept to its end.
    _job: NamedTempFile,
}

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// Starts `bench COMMAND JOB`: this program, so with the workers' engine and allocator.
pub(crate) fn start_ours(command: &str, job: &impl Serialize) -> Result<Running> {
    let mut program = Command::new(std::env::current_exe()?);
    program.arg(command);
    start(program, format!("bench {command}"), job)
}

/// What spares TRL most of its page faults: glibc keeps freed memory, in huge pages.
const PEER_TUNABLES: &str = "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:\
    glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1";

/// Starts a peer's `SCRIPT JOB` with as many threads.
pub(crate) fn start_python(
    script: &str,
    job: &impl Serialize,
    threads: usize,
    tuned: bool,
) -> Result<Running> {
    let interpreter = root().join(".venv/bin/python");
    ensure!(
        interpreter.exists(),
        "{} is missing: run `make setup`, or leave the peer out with --skip-peer",
        interpreter.display()
    );
    let mut program = Command::new(interpreter);
    program.arg(root().join("tests/bench").join(script));
    program.env("OMP_NUM_THREADS", threads.to_string());
    program.env("HF_HUB_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "false");
    if tuned {
        program.env("GLIBC_TUNABLES", PEER_TUNABLES);
    }
    start(program, script.to_owned(), job)
}

impl Running {
    /// Waits for the answer. A run that fails says why in its own words.
    pub(crate) fn answer<T: DeserializeOwned>(mut self) -> Result<T> {
        let child = self.child.take().context("its answer was waited for already")?;
        let output = child.wait_with_output()?;
        if output.status.signal() == Some(SIGKILL) {
            bail!("{} was killed; most likely this machine's memory ran out", self.what);
        }
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            bail!("{} ended with {}:\n{words}", self.what, output.status);
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("read the answer of {}", self.what))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A job, in a process that was started with it.
pub(crate) fn read<T: DeserializeOwned>(job: &Path) -> Result<T> {
    let text = fs::read(job).with_context(|| format!("read job {}", job.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("read job {}", job.display()))
}

/// Answers the process that started this one.
pub(crate) fn answer(answer: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(answer)?);
    Ok(())
}

fn start(mut program: Command, what: String, job: &impl Serialize) -> Result<Running> {
    let mut file = NamedTempFile::new()?;
    file.write_all(&serde_json::to_vec(job)?)?;
    let child = program
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {what}"))?;
    Ok(Running { child: Some(child), what, _job: file })
}
