//! `metrics.jsonl`: training as dashboards read it, one JSON object a line.
//!
//! Names are TRL's (`loss`, `rewards/chosen`, `logps/rejected`, …; `eval_…` for
//! the held-out pairs), after `iteration` and `step`.
//!
//! The file is a view: the journal's steps are what is durable. While a phase
//! runs, lines are appended as steps end, for `tail -f`, unsynced; at each
//! phase's end, and when a run continues, the file is made anew from the journal
//! and published whole. So a line torn by a kill does not last, and since
//! values of the clock are left out ([`WALL_CLOCK`]), a run that was killed and
//! continued ends with the very bytes of one that was not.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::error::StoreError;
use super::journal::{CommittedPhase, Journal, StepRecord};
use super::publish;
use crate::domain::{Epoch, Iteration, Step};

/// Keys of a step's record that depend on the clock. They stay in the journal,
/// and are left out of `metrics.jsonl`.
pub const WALL_CLOCK: [&str; 6] = [
    "seconds",
    "reduce_seconds",
    "exposed_seconds",
    "pairs_per_second",
    "tokens_per_second",
    "resident_bytes",
];

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MetricsRow {
    iteration: Iteration,
    step: Step,
    #[serde(flatten)]
    values: Map<String, Value>,
}

impl MetricsRow {
    /// A training step's line.
    pub fn step(iteration: Iteration, record: &StepRecord) -> Self {
        Self { iteration, step: record.step, values: values(&record.metrics, "") }
    }

    /// The line of an evaluation after `step`: the same names behind `eval_`.
    pub fn evaluation(iteration: Iteration, step: Step, metrics: &Value) -> Self {
        Self { iteration, step, values: values(metrics, "eval_") }
    }

    fn line(&self, path: &Path) -> Result<String, StoreError> {
        let mut line = serde_json::to_string(self)
            .map_err(|e| StoreError::malformed(path, e.to_string(), "report this as a bug"))?;
        line.push('\n');
        Ok(line)
    }
}

fn values(metrics: &Value, prefix: &str) -> Map<String, Value> {
    let reserved = |key: &str| WALL_CLOCK.contains(&key) || key == "iteration" || key == "step";
    let metrics = metrics.as_object().into_iter().flatten();
    metrics
        .filter(|(key, _)| !reserved(key))
        .map(|(key, value)| match key.strip_prefix(prefix) {
            Some(_) => (key.clone(), value.clone()),
            None => (format!("{prefix}{key}"), value.clone()),
        })
        .collect()
}

/// An iteration's rows as the journal has them: its steps, and an evaluation behind
/// the last step of each epoch that was evaluated.
///
/// # Errors
/// A journal that is damaged there, or that cannot be read.
pub fn rows(journal: &Journal, k: Iteration) -> Result<Vec<MetricsRow>, StoreError> {
    let steps = journal.steps(k)?;
    let commits = journal.commits()?;
    let evaluation = |epoch: Epoch| {
        commits.iter().find(|c| {
            c.iteration == k && c.phase == CommittedPhase::Evaluated && c.epoch == Some(epoch)
        })
    };
    let mut rows = Vec::new();
    for (n, step) in steps.iter().enumerate() {
        rows.push(MetricsRow::step(k, step));
        let ends_epoch = steps.get(n + 1).is_none_or(|next| next.epoch != step.epoch);
        if ends_epoch && let Some(evaluated) = evaluation(step.epoch) {
            rows.push(MetricsRow::evaluation(k, step.step, &evaluated.detail));
        }
    }
    Ok(rows)
}

/// The bytes that [`write()`] gives the file at `path`.
///
/// # Errors
/// A value that JSON cannot hold.
pub fn text(path: &Path, rows: &[MetricsRow]) -> Result<String, StoreError> {
    rows.iter().map(|row| row.line(path)).collect()
}

/// Publishes `rows` as the whole file: the same bytes for equal rows.
///
/// # Errors
/// The operation that failed; the file then is what it was.
pub fn write(path: &Path, rows: &[MetricsRow]) -> Result<(), StoreError> {
    publish::write_file(path, text(path, rows)?.as_bytes())
}

/// The file while steps are being done.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Publishes the rows that the journal has, and takes more behind them.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn begin(path: &Path, rows: &[MetricsRow]) -> Result<Self, StoreError> {
        write(path, rows)?;
        let file =
            OpenOptions::new().append(true).open(path).map_err(StoreError::io("open", path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Shows a row to whoever follows the file.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn append(&mut self, row: &MetricsRow) -> Result<(), StoreError> {
        let line = row.line(&self.path)?;
        self.file.write_all(line.as_bytes()).map_err(StoreError::io("append to", &self.path))
    }
}

/// Reads the lines of a file that may be growing: a last line without its end
/// is left out.
///
/// # Errors
/// A whole line that is not JSON, with its number; or the operation that failed.
pub fn read(path: &Path) -> Result<Vec<Value>, StoreError> {
    let text = fs::read_to_string(path).map_err(StoreError::io("read", path))?;
    text.split_inclusive('\n')
        .take_while(|line| line.ends_with('\n'))
        .enumerate()
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|e| {
                let problem = format!("line {}: not JSON: {e}", number + 1);
                StoreError::malformed(path, problem, "continue the run: the file is made anew")
            })
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(step: u64) -> MetricsRow {
        let metrics = json!({
            "rewards/chosen": 0.25, "loss": std::f64::consts::LN_2, "seconds": 1.5 + step as f64,
            "reduce_seconds": 0.5 + step as f64, "exposed_seconds": 0.25
        });
        MetricsRow::step(Iteration(1), &StepRecord { step: Step(step), epoch: Epoch(0), metrics })
    }

    #[test]
    fn a_continued_file_ends_with_the_bytes_of_an_undisturbed_one() {
        let dir = tempfile::tempdir().unwrap();
        let (calm, killed) = (dir.path().join("calm.jsonl"), dir.path().join("killed.jsonl"));
        let mut log = MetricsLog::begin(&calm, &[]).unwrap();
        for step in 0..3 {
            log.append(&row(step)).unwrap();
        }
        let mut log = MetricsLog::begin(&killed, &[]).unwrap();
        log.append(&row(0)).unwrap();
        log.file.write_all(br#"{"iteration":1,"st"#).unwrap();
        assert_eq!(read(&killed).unwrap().len(), 1, "the torn line is left out");
        let mut log = MetricsLog::begin(&killed, &[row(0)]).unwrap();
        log.append(&row(1)).unwrap();
        log.append(&row(2)).unwrap();
        assert_eq!(fs::read(&calm).unwrap(), fs::read(&killed).unwrap());
        write(&calm, &[row(0), row(1), row(2)]).unwrap();
        assert_eq!(fs::read(&calm).unwrap(), fs::read(&killed).unwrap());
    }

    #[test]
    fn names_are_trls_and_the_clock_is_left_out() {
        let path = Path::new("metrics.jsonl");
        assert_eq!(
            row(4).line(path).unwrap(),
            "{\"iteration\":1,\"step\":4,\"loss\":0.6931471805599453,\"rewards/chosen\":0.25}\n"
        );
        let metrics = json!({ "loss": 0.5, "rewards/accuracies": 1.0 });
        let evaluation = MetricsRow::evaluation(Iteration(0), Step(9), &metrics);
        assert_eq!(
            evaluation.line(path).unwrap(),
            "{\"iteration\":0,\"step\":9,\"eval_loss\":0.5,\"eval_rewards/accuracies\":1.0}\n"
        );
    }

    #[test]
    fn a_line_that_is_not_json_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, "{}\nhello\n{}\n").unwrap();
        let message = read(&path).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl: line 2: not JSON"), "{message}");
    }
}
