//! What the machine is, and what a process took of it.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Linux tells processor time to every program in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;

/// This process's largest resident memory so far, in bytes.
pub(crate) fn peak_bytes() -> Result<u64> {
    Ok(field("/proc/self/status", "VmHWM:")? << 10)
}

/// Processor seconds of this process so far, over all its threads: outside and
/// inside the kernel.
pub(crate) fn processor_seconds() -> Result<(f64, f64)> {
    let stat = fs::read_to_string("/proc/self/stat").context("read /proc/self/stat")?;
    // The program's name, in parentheses, may hold spaces. After it: state, and then numbers.
    let numbers = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: Vec<f64> = numbers.skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
    match ticks[..] {
        [user, system] => Ok((user / TICKS_PER_SECOND, system / TICKS_PER_SECOND)),
        _ => anyhow::bail!("/proc/self/stat holds no processor times: {stat}"),
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
        "memory_bytes": field("/proc/meminfo", "MemTotal:")? << 10,
    }))
}

/// A number of kB in one of the kernel's tables.
fn field(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("{path} holds no {name}"))
}
