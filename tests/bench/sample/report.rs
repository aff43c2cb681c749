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
    guesses: Vec<String>,
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
        let (settings, versions) = (Map::new(), BTreeMap::new());
        Ok(Self { head, settings, versions, rows: Vec::new(), guesses: Vec::new(), dtype })
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
        let guesses = Guesses::of(&runs[&Side::Ours]);
        let plain = &runs[&Side::WithoutDrafting];
        let alike = runs[&Side::Ours].iter().zip(plain).filter(|(a, b)| a.replies == b.replies);
        let alike = alike.count();
        self.guesses.push(format!(
            "{}: {guesses}, and replies as without in {alike} of {} rounds",
            setting.name(),
            plain.len()
        ));
        let mut described = json!({
            "fraction_of_floor": of_floor,
            "guessed": guesses.all,
            "guessed_right": guesses.right,
            "rounds_with_equal_replies": alike,
            "floors": floors,
            "prompt_tokens": job.prompts.iter().map(Vec::len).sum::<usize>(),
        });
        for (side, theirs) in &figures {
            let ratio = match side {
                Side::WithoutDrafting => by_round(&runs[&Side::Ours], &runs[side])
                    .context("ours was not run without drafting")?,
                _ => ours.tokens_per_s / theirs.tokens_per_s,
            };
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
             bandwidth, whichever is longer, over the time taken. ours is at: medians of \
             tokens/s over one another; without drafting, the median of each round's. {}.",
            table(&header, &self.rows),
            self.dtype.name(),
            self.guesses.join("; ")
        )
    }
}

/// How many times as fast `ours` was as `theirs`, each round by itself: the median. A round's
/// two runs draw by the same uniforms, and in fp32 the same tokens.
fn by_round(ours: &[SampleRun], theirs: &[SampleRun]) -> Option<f64> {
    let rounds = ours.iter().zip(theirs);
    median(rounds.map(|(ours, theirs)| ours.tokens_per_s() / theirs.tokens_per_s()))
}

/// Tokens that were guessed.
struct Guesses {
    all: u64,
    right: u64,
    /// Of all rounds' replies.
    tokens: usize,
}

impl Guesses {
    fn of(runs: &[SampleRun]) -> Self {
        let sum = |key: &str| {
            let works = runs.iter().filter_map(|run| run.work.as_ref());
            works.filter_map(|work| work[key].as_u64()).sum()
        };
        let tokens = runs.iter().map(SampleRun::tokens).sum();
        Self { all: sum("guessed"), right: sum("guessed_right"), tokens }
    }
}

impl std::fmt::Display for Guesses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { all, right, tokens } = self;
        write!(f, "{all} tokens guessed, {right} of them right, for {tokens} drawn")
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
