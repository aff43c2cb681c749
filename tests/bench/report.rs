//! The figures: as a table for people, as JSON for programs.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::{Map, Value, json};

use crate::dpo::{Measured, versions};
use crate::floor::Rate;
use crate::job::{Recipe, Run};
use crate::mix::{responses, tokens};
use crate::options::DpoOptions;

const MIB: f64 = (1u64 << 20) as f64;
const TERA: f64 = 1e12;

/// Collects what `bench dpo` measured.
pub(crate) struct Report {
    head: Value,
    mixes: Map<String, Value>,
    versions: Map<String, Value>,
    rows: Vec<[String; 8]>,
    notes: Vec<String>,
}

/// One side's figures on a mix: medians over its runs.
struct Side {
    pairs_per_s: f64,
    tokens_per_s: f64,
    peak_bytes: f64,
    seconds: f64,
    system_share: f64,
}

impl Report {
    pub(crate) fn new(options: &DpoOptions, machine: Value) -> Self {
        let head = json!({
            "benchmark": "dpo",
            "date": jiff::Timestamp::now().to_string(),
            "machine": machine,
            "threads": options.threads,
            "rounds": options.rounds,
            "batch": options.batch,
            "warm_up": options.warm_up,
            "dtype": options.dtype(),
            "model": options.model.file_name().map(|name| name.to_string_lossy()),
            "recipe": Recipe::default(),
            "engine": options.engine,
            "tuned_peer": options.tune_peer,
        });
        let (rows, notes) = (Vec::new(), Vec::new());
        Self { head, mixes: Map::new(), versions: Map::new(), rows, notes }
    }

    pub(crate) fn add(&mut self, measured: &Measured) -> Result<()> {
        let Measured { mix, pairs, operations, rates, .. } = measured;
        let runs = [&measured.ours, &measured.trl, &measured.trl_checkpointing];
        let all = versions(runs.into_iter().flatten());
        self.versions.extend(all.into_iter().map(|(name, version)| (name, json!(version))));

        let ours = Side::of(measured, &measured.ours).context("ours was not run")?;
        let trl = Side::of(measured, &measured.trl);
        let checkpointing = Side::of(measured, &measured.trl_checkpointing);
        // The machine at its best, as far as it was seen: a conservative floor.
        let best = |rate: fn(&Rate) -> f64| rates.iter().map(rate).fold(0.0, f64::max);
        let (rate, square) = (best(|rate| rate.model_shapes), best(|rate| rate.square_2048));
        let floor_seconds = operations.total() / rate;
        let fraction = floor_seconds / ours.seconds;

        self.rows.push(ours.row(mix.name(), "ours", Some(fraction), None));
        for (name, side) in [("TRL", &trl), ("TRL, checkpointing", &checkpointing)] {
            if let Some(side) = side {
                self.rows.push(side.row("", name, Some(floor_seconds / side.seconds), Some(&ours)));
            }
        }
        self.notes.push(format!(
            "{}: {:.1} T operations at {:.2} T/s (square matrices of 2,048: {:.2} T/s) take {:.2} s",
            mix.name(),
            operations.total() / TERA,
            rate / TERA,
            square / TERA,
            floor_seconds
        ));

        let real: usize = pairs.iter().map(tokens).sum();
        let replies: usize = pairs.iter().map(responses).sum();
        let [prompt, chosen, rejected] = mix.lengths();
        let ratio = |ratio: fn(&Side, &Side) -> f64| trl.as_ref().map(|trl| ratio(&ours, trl));
        let described = json!({
            "ratio_pairs_per_s": ratio(|ours, trl| ours.pairs_per_s / trl.pairs_per_s),
            "ratio_peak_memory": ratio(|ours, trl| ours.peak_bytes / trl.peak_bytes),
            "fraction_of_floor": fraction,
            "lengths": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
            "pairs": pairs.len(),
            "tokens": real,
            "response_tokens": replies,
            "floor": {
                "seconds": floor_seconds,
                "operations": operations,
                "operations_total": operations.total(),
                "matrix_rate": rate,
                "matrix_rate_square_2048": square,
                "rates": rates,
            },
            "ours": ours.json(&measured.ours),
            "trl": trl.as_ref().map(|side| side.json(&measured.trl)),
            "trl_gradient_checkpointing":
                checkpointing.as_ref().map(|side| side.json(&measured.trl_checkpointing)),
        });
        self.mixes.insert(mix.name().to_owned(), described);
        Ok(())
    }

    pub(crate) fn json(&self) -> Value {
        let mut all = self.head.clone();
        all["versions"] = json!(self.versions);
        all["mixes"] = json!(self.mixes);
        all
    }

    /// All mixes as one table, and below it what the floor is.
    pub(crate) fn table(&self) -> String {
        let header = [
            "mix",
            "side",
            "pairs/s",
            "tokens/s",
            "peak MiB",
            "in kernel",
            "of floor",
            "ours is at",
        ];
        let mut text = table(&header, &self.rows).to_string();
        text.push_str("\n\n");
        for note in &self.notes {
            text.push_str(note);
            text.push('\n');
        }
        text.push_str(
            "tokens: of prompt, chosen and rejected, the prompt once, on every side. \
             of floor: the time that the matrix products which must be done take at the measured \
             rate, over the time taken.",
        );
        text
    }
}

impl Side {
    /// `None` where there was no run.
    fn of(measured: &Measured, runs: &[Run]) -> Option<Self> {
        let seconds = median(runs.iter().map(|run| run.seconds))?;
        let tokens: usize = measured.pairs.iter().map(tokens).sum();
        let system_share =
            |run: &Run| run.system_seconds / (run.user_seconds + run.system_seconds).max(1e-9);
        Some(Self {
            pairs_per_s: measured.pairs.len() as f64 / seconds,
            tokens_per_s: tokens as f64 / seconds,
            peak_bytes: median(runs.iter().map(|run| run.peak_bytes as f64))?,
            seconds,
            system_share: median(runs.iter().map(system_share))?,
        })
    }

    fn row(
        &self,
        mix: &str,
        name: &str,
        of_floor: Option<f64>,
        ours: Option<&Self>,
    ) -> [String; 8] {
        let percent = |share: f64| format!("{:.0} %", 100.0 * share);
        let against = |ours: &Self| {
            let speed = ours.pairs_per_s / self.pairs_per_s;
            format!("{speed:.2} × pairs/s, {:.2} × memory", ours.peak_bytes / self.peak_bytes)
        };
        [
            mix.to_owned(),
            name.to_owned(),
            format!("{:.3}", self.pairs_per_s),
            format!("{:.0}", self.tokens_per_s),
            format!("{:.0}", self.peak_bytes / MIB),
            percent(self.system_share),
            of_floor.map_or_else(String::new, percent),
            ours.map_or_else(String::new, against),
        ]
    }

    fn json(&self, runs: &[Run]) -> Value {
        json!({
            "pairs_per_s": self.pairs_per_s,
            "tokens_per_s": self.tokens_per_s,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "system_share": self.system_share,
            "runs": runs,
        })
    }
}

/// Columns of numbers to the right, the first two, of names, to the left.
pub(crate) fn table<const N: usize>(header: &[&str; N], rows: &[[String; N]]) -> Table {
    let cell = |(column, text): (usize, String)| {
        let side = if column < 2 { CellAlignment::Left } else { CellAlignment::Right };
        Cell::new(text).set_alignment(side)
    };
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().map(|name| (*name).to_owned()).enumerate().map(cell));
    for row in rows {
        table.add_row(row.iter().cloned().enumerate().map(cell));
    }
    table
}

/// The middle value; the mean of the middle two; `None` of nothing.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Writes figures to `path`.
pub(crate) fn write(path: &Path, figures: &Value) -> Result<()> {
    let failed = || format!("write {}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(failed)?;
    }
    fs::write(path, format!("{figures:#}\n")).with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }
}
