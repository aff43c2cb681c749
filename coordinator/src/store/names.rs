//! What the files of a run are called, relative to its directory.

use crate::domain::{Epoch, Iteration, Step};

/// Who holds the directory.
pub const LOCK: &str = "lock";
/// The resolved configuration.
pub const CONFIG: &str = "config.toml";
/// What has happened.
pub const JOURNAL: &str = "journal.sqlite";
/// What of it SQLite has not yet moved into [`JOURNAL`].
pub const JOURNAL_LOG: &str = "journal.sqlite-wal";
/// What a finished run did.
pub const SUMMARY: &str = "summary.json";
/// A folder for each iteration.
pub const ITERATIONS: &str = "iterations";
/// A folder for each state inside an iteration.
pub const SNAPSHOTS: &str = "snapshots";
/// What the programs said.
pub const LOGS: &str = "logs";
/// What lets workers in, while a coordinator runs.
pub const JOIN: &str = "join";
/// Between the name of something that was found damaged and its number.
pub const SET_ASIDE: &str = ".damaged-";

/// Before the number under which the journal keeps that a resume went back.
pub const WENT_BACK: &str = "went back ";

/// `iterations/01`.
pub fn iteration(k: Iteration) -> String {
    format!("{ITERATIONS}/{:02}", k.0)
}

/// `iterations/01/checkpoint`.
pub fn checkpoint(k: Iteration) -> String {
    format!("{}/checkpoint", iteration(k))
}

/// `iterations/01/pairs.parquet`.
pub fn pairs(k: Iteration) -> String {
    format!("{}/pairs.parquet", iteration(k))
}

/// `iterations/01/metrics.jsonl`.
pub fn metrics(k: Iteration) -> String {
    format!("{}/metrics.jsonl", iteration(k))
}

/// `snapshots/01-epoch-0`.
pub fn snapshot(k: Iteration, epoch: Epoch) -> String {
    format!("{SNAPSHOTS}/{:02}-epoch-{}", k.0, epoch.0)
}

/// Iteration and epoch of a folder in `snapshots`, from its name.
pub fn parse_snapshot(name: &str) -> Option<(Iteration, Epoch)> {
    let (k, epoch) = name.split_once("-epoch-")?;
    let parsed = (Iteration(k.parse().ok()?), Epoch(epoch.parse().ok()?));
    // Digits alone: no sign, no other number of zeros.
    (snapshot(parsed.0, parsed.1).rsplit('/').next() == Some(name)).then_some(parsed)
}

/// `snapshots/01-step-40`: inside an epoch, behind that step.
pub fn step_snapshot(k: Iteration, step: Step) -> String {
    format!("{SNAPSHOTS}/{:02}-step-{}", k.0, step.0)
}

/// Iteration and step of a folder in `snapshots`, from its name.
pub fn parse_step_snapshot(name: &str) -> Option<(Iteration, Step)> {
    let (k, step) = name.split_once("-step-")?;
    let parsed = (Iteration(k.parse().ok()?), Step(step.parse().ok()?));
    (step_snapshot(parsed.0, parsed.1).rsplit('/').next() == Some(name)).then_some(parsed)
}

/// `worker-0.log`, in [`LOGS`].
pub fn worker_log(slot: u32) -> String {
    format!("worker-{slot}.log")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshots_name_says_what_it_is_of() {
        assert_eq!(snapshot(Iteration(1), Epoch(0)), "snapshots/01-epoch-0");
        assert_eq!(parse_snapshot("01-epoch-0"), Some((Iteration(1), Epoch(0))));
        assert_eq!(parse_snapshot("100-epoch-12"), Some((Iteration(100), Epoch(12))));
        assert_eq!(parse_step_snapshot("01-step-40"), Some((Iteration(1), Step(40))));
        assert_eq!(parse_step_snapshot("01-epoch-0"), None);
        for other in ["01-epoch-0.damaged-1", "1-epoch-0", "01-epoch-+1", ".01-epoch-0.staging"] {
            assert_eq!(parse_snapshot(other), None, "{other}");
        }
    }
}
