//! The figures of `bench sample`: as a table for people, as JSON for programs.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::floor::Floor;
use super::job::SampleRun;
use super::{Measured, Side};
use crate::machine;
use crate::options::{DType, SampleOptions};
use crate::report::{median, table};

/// Collects what was measured.
pub(super) struct Report {
    head: Value,
    settings: Map<String, Value>,
    versions: BTreeMap<String, String>,
    rows: Vec<[String; 7]>,
    dtype: DType,
}

/// One side's figures in a setting: medians over its runs.
struct Figures {
    tokens_per_s: f64,
    seconds: f64,
    peak_bytes: f64,
}

impl Report {
    pub(super) fn new(options: &SampleOptions, dtype: DType) -> Result<Self> {
        let head = json!({
            "benchmark": "sample",
            "date": jiff::Timestamp::now().to_string(),
            "machine": machine::describe()?,
            "threads": options.threads,
            "rounds": options.rounds,
            "dtype": dtype,
            "model": options.model.file_name().map(|name| name.to_string_lossy()),
        });
        let (settings, versions, rows) = (Map::new(), BTreeMap::new(), Vec::new());
        Ok(Self { head, settings, versions, rows, dtype })
    }

    /// `floors` are those of our runs.
    pub(super) fn add(&mut self, measured: &Measured, floors: &[Floor]) -> Result<()> {
        let Measured { setting, job, runs, .. } = measured;
        let figures: BTreeMap<Side, Figures> =
            runs.iter().filter_map(|(&side, runs)| Some((side, Figures::of(runs)?))).collect();
        let ours = figures.get(&Side::Ours).context("ours was not run")?;
        let of_floor = floors.iter().zip(&runs[&Side::Ours]);
        let of_floor = median(of_floor.map(|(floor, run)| floor.seconds / run.seconds))
            .context("ours was not run")?;
        let mut described = json!({
            "fraction_of_floor": of_floor,
            "floors": floors,
            "prompt_tokens": job.prompts.iter().map(Vec::len).sum::<usize>(),
        });
        for (side, theirs) in &figures {
            let ratio = ours.tokens_per_s / theirs.tokens_per_s;
            if let Some(name) = side.ratio() {
                described[name] = json!(ratio);
            }
            let runs = &runs[side];
            described[side.key()] = theirs.json(runs);
            self.versions.extend(runs.iter().flat_map(|run| run.versions.clone()));
            let first = *side == Side::Ours;
            self.rows.push([
                if first { setting.name().to_owned() } else { String::new() },
                side.name().to_owned(),
                format!("{:.0}", theirs.tokens_per_s),
                format!("{:.1}", theirs.seconds),
                format!("{:.0}", theirs.peak_bytes / f64::from(1 << 20)),
                if first { format!("{:.0} %", 100.0 * of_floor) } else { String::new() },
                format!("{ratio:.2} ×"),
            ]);
        }
        self.settings.insert(setting.name().to_owned(), described);
        Ok(())
    }

    pub(super) fn json(&self) -> Value {
        let mut all = self.head.clone();
        all["versions"] = json!(self.versions);
        all["settings"] = json!(self.settings);
        all
    }

    /// All settings as one table, and below it what the floor is.
    pub(super) fn table(&self) -> String {
        let header =
            ["setting", "side", "tokens/s", "seconds", "peak MiB", "of floor", "ours is at"];
        format!(
            "{}\n\ncomputed in {}. of floor: the time that the operations of the prompts and of \
             each decoding step take at the measured matrix rate, or its bytes at the measured \
             bandwidth, whichever is longer, over the time taken.",
            table(&header, &self.rows),
            self.dtype.name()
        )
    }
}

impl Figures {
    /// `None` where there was no run.
    fn of(runs: &[SampleRun]) -> Option<Self> {
        Some(Self {
            tokens_per_s: median(runs.iter().map(SampleRun::tokens_per_s))?,
            seconds: median(runs.iter().map(|run| run.seconds))?,
            peak_bytes: median(runs.iter().map(|run| run.peak_bytes as f64))?,
        })
    }

    fn json(&self, runs: &[SampleRun]) -> Value {
        json!({
            "tokens_per_s": self.tokens_per_s,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "runs": runs,
        })
    }
}
