//! What the machine is, and what a process took of it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Linux tells processor time to every program in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;

/// Largest resident memory so far, in bytes, of the process whose folder in `/proc` it is.
pub(crate) fn peak_bytes(process: &Path) -> Result<u64> {
    Ok(field(&process.join("status"), "VmHWM:")? << 10)
}

/// Processor seconds of a process so far, over all its threads: outside and inside the
/// kernel.
pub(crate) fn processor_seconds(process: &Path) -> Result<(f64, f64)> {
    let path = process.join("stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    // The program's name, in parentheses, may hold spaces. After it: state, and then numbers.
    let numbers = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: Vec<f64> = numbers.skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
    match ticks[..] {
        [user, system] => Ok((user / TICKS_PER_SECOND, system / TICKS_PER_SECOND)),
        _ => anyhow::bail!("{} holds no processor times: {stat}", path.display()),
    }
}

/// The machine, for whoever reads the figures elsewhere.
pub(crate) fn describe() -> Result<Value> {
    let info = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1))
        .unwrap_or("unknown");
    Ok(json!({
        "cpu": model,
        "cores": std::thread::available_parallelism()?.get(),
        "memory_bytes": field(Path::new("/proc/meminfo"), "MemTotal:")? << 10,
    }))
}

/// A number in one of the kernel's tables; memory is in kB there.
pub(crate) fn field(path: &Path, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("{} holds no {name}", path.display()))
}
