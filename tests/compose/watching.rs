//! The endpoints of both programs, asked from outside their containers.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::bed::root;
use crate::project::{Project, told};

/// `launch.heartbeat_deadline`.
const DEADLINE: Duration = Duration::from_secs(5);

/// The value of a metric in Prometheus' text format.
pub(crate) fn value(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// Prometheus' own checker has nothing to say against the metrics of either program.
pub(crate) fn metrics_are_accepted(project: &Project) -> Result<()> {
    let promtool = promtool()?;
    for (service, names) in [
        ("coordinator", ["drift_training_loss", "drift_leases", "drift_trained_pairs_total"]),
        (
            "worker-0",
            [
                "drift_worker_training_steps_total",
                "drift_worker_coordinator_heartbeat_age_seconds",
                "process_resident_memory_bytes",
            ],
        ),
    ] {
        let (status, text) = project.get(service, "/metrics")?;
        ensure!(status == 200, "{service}: {status}");
        for name in names {
            let value = value(&text, name).with_context(|| format!("{service}: no {name}"))?;
            ensure!(value.is_finite() && value >= 0.0, "{service}: {name} is {value}");
        }
        let mut child = Command::new(&promtool)
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {}", promtool.display()))?;
        child.stdin.take().context("its standard input")?.write_all(text.as_bytes())?;
        let said = child.wait_with_output()?;
        let words = [said.stdout, said.stderr].concat();
        let words = String::from_utf8_lossy(&words).into_owned();
        ensure!(said.status.success() && words.is_empty(), "{service}: promtool: {words}");
        let metrics = text.lines().filter(|line| line.starts_with("# TYPE")).count();
        println!("  {service}: promtool accepts {metrics} metrics");
    }
    Ok(())
}

/// Each makes the other unready within the deadline while it is paused, and neither
/// makes it look dead.
pub(crate) fn a_paused_peer_makes_unready(project: &Project, a: &str, b: &str) -> Result<()> {
    for (paused, other) in [(a, b), (b, a)] {
        becomes(project, other, 200, PATIENCE)?;
        let (unready, took, alive) = project.paused(paused, || {
            let began = Instant::now();
            let unready = becomes(project, other, 503, DEADLINE);
            (unready, began.elapsed(), project.get(other, "/healthz"))
        })?;
        let why = unready.with_context(|| format!("{paused} is paused"))?;
        ensure!(alive?.0 == 200, "{other} is taken for dead while {paused} is paused");
        println!("  {paused} paused: {other} unready after {took:.1?}: {}", why.trim());
    }
    Ok(())
}

/// A worker that came back is ready again before this has passed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `/readyz` has a status; returns its body.
fn becomes(project: &Project, service: &str, status: u16, within: Duration) -> Result<String> {
    let began = Instant::now();
    loop {
        let answer = project.get(service, "/readyz");
        if let Ok((found, body)) = &answer
            && *found == status
        {
            return Ok(body.clone());
        }
        if began.elapsed() > within {
            bail!("{service}'s /readyz is {answer:?}, and not {status}, after {within:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Prometheus' checker: an installed one, or the one in Debian's package, unpacked here.
fn promtool() -> Result<PathBuf> {
    let is_there = Command::new("promtool").arg("--version").output().is_ok();
    if is_there {
        return Ok("promtool".into());
    }
    let folder = root().join("target/promtool");
    let program = folder.join("usr/bin/promtool");
    if !program.exists() {
        std::fs::create_dir_all(&folder)?;
        let mut fetch = Command::new("sh");
        let script = "apt-get download prometheus >/dev/null && dpkg -x prometheus_*.deb .";
        fetch.args(["-c", script]).current_dir(&folder);
        told(fetch).context("get promtool: install Debian's package `prometheus`")?;
    }
    Ok(program)
}
