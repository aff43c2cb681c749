//! `summary.json`, and the closing table: what the run did, what it cost, where
//! the model is, and how to load it.

use std::collections::BTreeMap;
use std::path::Path;

use comfy_table::{Cell, CellAlignment, LineStyle, Table, presets};
use serde::{Deserialize, Serialize};

use super::format;
use crate::domain::Iteration;

/// Contents of `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// Name of the run.
    pub run_id: String,
    /// Version of DRIFT that finished it.
    pub drift_version: String,
    /// The model it began with, as configured.
    pub base_model: String,
    /// `drift`, `spin` or `iter-dpo`.
    pub method: String,
    /// Workers at its end.
    pub workers: u32,
    /// Seed of the run.
    pub seed: u64,
    /// From its beginning to its end, pauses included.
    pub seconds: f64,
    /// By iteration, the warm start first.
    pub iterations: Vec<IterationSummary>,
    /// The last checkpoint: a directory in Hugging Face format.
    pub checkpoint: String,
}

/// What one iteration did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IterationSummary {
    /// 0 is the warm start.
    pub iteration: Iteration,
    /// Pairs trained on.
    pub pairs_trained: u64,
    /// Pairs kept for evaluation.
    pub pairs_held_out: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Mean loss of the first step; ln 2 where the policy is the reference.
    pub first_loss: f64,
    /// Mean loss of the last step.
    pub last_loss: f64,
    /// On the held-out pairs, after the last epoch; absent without such pairs.
    pub held_out: Option<HeldOut>,
    /// Mean sum of log-probabilities of the chosen replies, in nats.
    pub logps_chosen: StartEnd,
    /// The same of the rejected replies. Both falling is worth a look.
    pub logps_rejected: StartEnd,
    /// Tokens drawn.
    pub sampled_tokens: u64,
    /// Over all workers; absent where nothing was sampled.
    pub sampled_tokens_per_second: Option<f64>,
    /// Over all workers.
    pub trained_pairs_per_second: f64,
    /// Seconds of all steps in which gradients were being summed over workers, as
    /// a mean over these; 0 with one worker.
    #[serde(default)]
    pub reduce_seconds: f64,
    /// Seconds of these in which workers did nothing but wait for it.
    #[serde(default)]
    pub exposed_seconds: f64,
    /// At how many steps the training gave rise to a warning, by its name:
    /// `signal_vanishes`, `both_logps_fall`.
    #[serde(default)]
    pub warnings: BTreeMap<String, u64>,
    /// By phase, as the journal names them.
    pub seconds: BTreeMap<String, f64>,
    /// Its checkpoint, relative to the run directory.
    pub checkpoint: String,
}

/// Held-out pairs after training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// Mean loss.
    pub loss: f64,
    /// Share of pairs whose chosen reply has the larger reward.
    pub accuracy: f64,
    /// Mean difference of rewards.
    pub margin: f64,
}

/// A value at the first and at the last step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StartEnd {
    /// At the first step.
    pub start: f64,
    /// At the last step.
    pub end: f64,
}

impl RunSummary {
    /// As `summary.json` has it.
    ///
    /// # Errors
    /// A value that JSON cannot hold.
    pub fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        Ok(json)
    }
}

/// Which characters the reader's terminal has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Glyphs {
    /// Lines and arrows of Unicode.
    Unicode,
    /// ASCII alone.
    Ascii,
}

impl Glyphs {
    /// By the locale, read as C does: the first of `LC_ALL`, `LC_CTYPE` and
    /// `LANG` that is set decides.
    pub fn from_environment() -> Self {
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .filter_map(std::env::var_os)
            .find(|value| !value.is_empty());
        Self::of_locale(&locale.unwrap_or_default().to_string_lossy())
    }

    fn of_locale(locale: &str) -> Self {
        let locale = locale.to_ascii_lowercase();
        if locale.contains("utf-8") || locale.contains("utf8") {
            Self::Unicode
        } else {
            Self::Ascii
        }
    }

    fn arrow(self) -> &'static str {
        match self {
            Self::Unicode => "→",
            Self::Ascii => "->",
        }
    }

    fn rule(self) -> char {
        match self {
            Self::Unicode => '─',
            Self::Ascii => '-',
        }
    }
}

/// The closing report: two tables of at most 100 columns, without colours, then
/// where the checkpoint is and how to load it.
pub fn render(summary: &RunSummary, glyphs: Glyphs) -> String {
    let trained: u64 = summary.iterations.iter().map(|i| i.pairs_trained).sum();
    let workers = if summary.workers == 1 { "worker" } else { "workers" };
    format!(
        "{} from {}: {} iterations, {} pairs trained, {} {workers}, {}\n\n{}\n\n{}\n\n{}",
        summary.method,
        summary.base_model,
        summary.iterations.len(),
        format::count(trained),
        summary.workers,
        format::seconds(summary.seconds),
        learned(summary, glyphs),
        cost(summary, glyphs),
        how_to_load(Path::new(&summary.checkpoint)),
    )
}

fn learned(summary: &RunSummary, glyphs: Glyphs) -> String {
    let arrow = glyphs.arrow();
    let mut table = table(
        glyphs,
        &[
            "iter",
            "pairs",
            "held out",
            "loss",
            "accuracy",
            "margin",
            "logp chosen",
            "logp rejected",
        ],
    );
    for iteration in &summary.iterations {
        let held_out = |show: fn(&HeldOut) -> String| {
            iteration.held_out.as_ref().map_or_else(|| "-".to_owned(), show)
        };
        let span = |of: &StartEnd| format!("{} {arrow} {}", logp(of.start), logp(of.end));
        table.add_row(right([
            iteration.iteration.to_string(),
            format::count(iteration.pairs_trained),
            format::count(iteration.pairs_held_out),
            format!("{:.4} {arrow} {:.4}", iteration.first_loss, iteration.last_loss),
            held_out(|h| format!("{:.1} %", h.accuracy * 100.0)),
            held_out(|h| format!("{:+.4}", h.margin)),
            span(&iteration.logps_chosen),
            span(&iteration.logps_rejected),
        ]));
    }
    table.trim_fmt()
}

/// Four digits that matter: sums over long replies move by more than a tenth.
fn logp(nats: f64) -> String {
    if nats.abs() < 999.95 { format!("{nats:.1}") } else { format!("{nats:.0}") }
}

fn cost(summary: &RunSummary, glyphs: Glyphs) -> String {
    const PHASES: [(&str, &str); 6] = [
        ("sampled", "sampling"),
        ("rated", "rating"),
        ("scored", "scoring"),
        ("trained", "training"),
        ("evaluated", "evaluating"),
        ("published", "publishing"),
    ];
    // Not every run rates.
    let was_done = |name: &str| summary.iterations.iter().any(|i| i.seconds.contains_key(name));
    let phases: Vec<_> =
        PHASES.into_iter().filter(|(name, _)| *name != "rated" || was_done(name)).collect();
    let fixed = ["iter", "tokens", "tokens/s", "pairs/s"];
    let header: Vec<_> = fixed.into_iter().chain(phases.iter().map(|(_, doing)| *doing)).collect();
    let mut table = table(glyphs, &header);
    for iteration in &summary.iterations {
        let phase = |name: &str| match iteration.seconds.get(name) {
            Some(seconds) => format::clock(*seconds),
            None => "-".to_owned(),
        };
        let head = [
            iteration.iteration.to_string(),
            format::count(iteration.sampled_tokens),
            iteration.sampled_tokens_per_second.map_or_else(|| "-".to_owned(), format::rate),
            format::rate(iteration.trained_pairs_per_second),
        ];
        table.add_row(right(head.into_iter().chain(phases.iter().map(|(name, _)| phase(name)))));
    }
    table.trim_fmt()
}

fn table(glyphs: Glyphs, header: &[&str]) -> Table {
    let rule = glyphs.rule();
    let under_header = LineStyle::none().fill(rule).junction(rule);
    let mut table = Table::new();
    table.load_style(presets::NOTHING.header_separator(under_header));
    table.set_header(right(header.iter().map(|name| (*name).to_owned())));
    for column in table.column_iter_mut() {
        column.set_padding((1, 0));
    }
    table
}

fn right(cells: impl IntoIterator<Item = String>) -> Vec<Cell> {
    cells.into_iter().map(|cell| Cell::new(cell).set_alignment(CellAlignment::Right)).collect()
}

/// Where the checkpoint is, and three lines of Python to paste.
pub fn how_to_load(checkpoint: &Path) -> String {
    let path = checkpoint.display().to_string();
    let quoted = python_string(&path);
    format!(
        "checkpoint: {path}\n\
         load it with transformers:\n\
         \n    from transformers import AutoModelForCausalLM, AutoTokenizer\
         \n    tokenizer = AutoTokenizer.from_pretrained({quoted})\
         \n    model = AutoModelForCausalLM.from_pretrained({quoted}, dtype=\"auto\")\n"
    )
}

/// A literal of Python; JSON's escapes are among Python's.
fn python_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
