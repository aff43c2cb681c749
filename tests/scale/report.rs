//! The figures: as a table for people, as JSON for programs.

use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::run::Measured;
use crate::{Arguments, machine};

const MEGA: f64 = 1e6;

/// Collects what was measured.
pub(crate) struct Report {
    head: Value,
    runs: Vec<Value>,
    rows: Vec<Vec<String>>,
}

const COLUMNS: [&str; 13] = [
    "workers",
    "asked/s",
    "prompts/s",
    "leases/s",
    "wait p50 ms",
    "wait p99 ms",
    "µs/prompt",
    "peak MB",
    "prepare s",
    "attach s",
    "journal MB",
    "written MB/s",
    "recovery ms",
];

impl Report {
    pub(crate) fn new(arguments: &Arguments) -> Result<Self> {
        let head = json!({
            "benchmark": "scale",
            "date": jiff::Timestamp::now().to_string(),
            "machine": machine::describe()?,
            "prompts": arguments.prompts,
            "shard_prompts": arguments.shard_prompts,
            "reply_tokens": arguments.reply_tokens,
        });
        Ok(Self { head, runs: Vec::new(), rows: Vec::new() })
    }

    /// Adds a run; says it in a line.
    pub(crate) fn add(&mut self, run: &Measured) -> String {
        let prompts = run.prompts as f64;
        let rate = prompts / run.sampling;
        let leases = self.head["shard_prompts"].as_f64().map_or(f64::NAN, |size| rate / size);
        let seconds = run.after.seconds - run.before.seconds;
        let written = (run.after.written - run.before.written) as f64;
        let slowest = run.recoveries.iter().copied().fold(f64::NAN, f64::max);
        self.runs.push(json!({
            "workers": run.workers,
            "asked_prompts_per_second": run.rate,
            "prompts_per_second": rate,
            "wait_seconds": { "p50": run.wait_p50, "p99": run.wait_p99 },
            "processor_seconds_per_prompt": seconds / prompts,
            "resident_bytes": { "before_sampling": run.before.resident, "peak": run.after.peak },
            "seconds": {
                "preparing": run.preparing, "attaching": run.attaching, "sampling": run.sampling,
            },
            "journal_bytes": run.journal_bytes,
            "written_bytes_per_second": written / run.sampling,
            "recovery_seconds": run.recoveries,
            "each_prompt_once": true,
        }));
        let row = vec![
            run.workers.to_string(),
            run.rate.map_or_else(|| "max".to_owned(), |rate| format!("{rate:.0}")),
            format!("{rate:.0}"),
            format!("{leases:.0}"),
            format!("{:.1}", 1e3 * run.wait_p50),
            format!("{:.1}", 1e3 * run.wait_p99),
            format!("{:.1}", MEGA * seconds / prompts),
            format!("{:.0}", run.after.peak as f64 / MEGA),
            format!("{:.1}", run.preparing),
            format!("{:.1}", run.attaching),
            format!("{:.0}", run.journal_bytes as f64 / MEGA),
            format!("{:.1}", written / run.sampling / MEGA),
            format!("{:.1}", 1e3 * slowest),
        ];
        let cells = COLUMNS.iter().zip(&row).map(|(name, value)| format!("{name} {value}"));
        let line = cells.collect::<Vec<_>>().join(", ");
        self.rows.push(row);
        line
    }

    pub(crate) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(COLUMNS);
        for row in &self.rows {
            let right = |value: &String| Cell::new(value).set_alignment(CellAlignment::Right);
            table.add_row(row.iter().map(right).collect::<Vec<_>>());
        }
        table
    }

    pub(crate) fn write(mut self, path: &Path) -> Result<()> {
        self.head["runs"] = Value::Array(self.runs);
        let text = serde_json::to_vec_pretty(&self.head)?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).context("make the report's folder")?;
        }
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        println!("written to {}", path.display());
        Ok(())
    }
}
