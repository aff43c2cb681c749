//! The real coordinator as a process: started, listened to, measured, killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};

use crate::tally::Tally;
use crate::{Arguments, machine};

/// A run's coordinator.
pub(crate) struct Coordinator {
    child: Child,
    pid: u32,
    lines: Lines<BufReader<ChildStderr>>,
    log: Vec<String>,
    verbose: bool,
    /// It is to say the next thing within this time.
    patience: Duration,
}

/// What the process has taken so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    /// Of processors.
    pub(crate) seconds: f64,
    /// Resident now, and at most so far.
    pub(crate) resident: u64,
    pub(crate) peak: u64,
    /// Handed to the disk.
    pub(crate) written: u64,
}

impl Coordinator {
    pub(crate) fn start(settings: &[String], arguments: &Arguments) -> Result<Self> {
        let own = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(own.with_file_name("coordinator"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("DRIFT_") {
                command.env_remove(name);
            }
        }
        command.args(settings).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().context("start the coordinator")?;
        let pid = child.id().context("its process id")?;
        let stderr = child.stderr.take().context("its log")?;
        Ok(Self {
            child,
            pid,
            lines: BufReader::new(stderr).lines(),
            log: Vec::new(),
            verbose: arguments.verbose,
            patience: Duration::from_secs(arguments.patience),
        })
    }

    /// Waits for a line of its log that holds `mark`.
    pub(crate) async fn until(&mut self, mark: &str, tally: Option<&Tally>) -> Result<()> {
        let told = tokio::time::timeout(self.patience, self.listen(mark, tally)).await;
        let tail = || self.log[self.log.len().saturating_sub(20)..].join("\n");
        match told {
            Ok(told) => told.with_context(|| format!("wait for {mark:?} behind:\n{}", tail())),
            Err(_) => bail!("no {mark:?} within {:?} behind:\n{}", self.patience, tail()),
        }
    }

    async fn listen(&mut self, mark: &str, tally: Option<&Tally>) -> Result<()> {
        loop {
            tokio::select! {
                line = self.lines.next_line() => {
                    let Some(line) = line? else { bail!("the coordinator ended") };
                    if self.verbose {
                        eprintln!("{line}");
                    }
                    let is_it = line.contains(mark);
                    self.log.push(line);
                    if is_it {
                        return Ok(());
                    }
                }
                () = tokio::time::sleep(Duration::from_millis(100)) => {
                    if let Some(why) = tally.and_then(|tally| tally.seen().failure.take()) {
                        bail!("a worker failed: {why}");
                    }
                }
            }
        }
    }

    pub(crate) fn usage(&self) -> Result<Usage> {
        let folder = PathBuf::from(format!("/proc/{}", self.pid));
        let (user, system) = machine::processor_seconds(&folder)?;
        Ok(Usage {
            seconds: user + system,
            resident: machine::field(&folder.join("status"), "VmRSS:")? << 10,
            peak: machine::peak_bytes(&folder)?,
            written: machine::field(&folder.join("io"), "write_bytes:")?,
        })
    }

    /// Ends it where it stands, as a machine's failure would.
    pub(crate) async fn kill(mut self) -> Result<()> {
        self.child.kill().await.context("kill the coordinator")
    }
}

/// Bytes of a file; 0 of none.
pub(crate) fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}
