//! `coordinator check`: what a run would do. Nothing is fetched, started or written.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use super::model::Named;
use super::reading::ReadingBar;
use super::run::base;
use crate::cli::CheckArguments;
use crate::config::{Base, Guidance, Layers, Method, Overlong, Settings};
use crate::corpus::{Counts, Kind};
use crate::hub::DatasetFile;
use crate::run::driver::{Corpora, reward_text, text_model, tokenise};
use crate::run::forecast::{
    Amounts, IterationForecast, LengthForecast, global_batch, iterations, lengths,
};
use crate::text::PairCounts;
use crate::ui::{LogFormat, Progress, format, logging};

/// What is known of a run before it begins.
#[derive(Debug, Serialize)]
struct Plan {
    settings: String,
    method: Method,
    guidance: Guidance,
    model: String,
    /// Where it lies, if it is on this machine.
    model_dir: Option<PathBuf>,
    /// What rates samples, where that is asked for.
    reward: Option<RewardPlan>,
    workers: u32,
    pairs_per_step: usize,
    /// Corpora on the hub that are not in its cache: counts are then not known.
    not_here: Vec<String>,
    corpora: Vec<Counts>,
    iterations: Vec<IterationForecast>,
    lengths: Vec<LengthForecast>,
    /// What became of the seed pairs, if the tokenizer is here.
    seed_pairs: Option<PairCounts>,
}

#[derive(Debug, Serialize)]
struct RewardPlan {
    model: String,
    /// Where it lies, if it is on this machine.
    model_dir: Option<PathBuf>,
    /// Tokens that it reads of a prompt and a reply at most, if it is.
    max_length: Option<usize>,
}

impl RewardPlan {
    fn of(settings: &Settings) -> Result<Option<Self>> {
        let Some(named) = Named::reward(settings) else { return Ok(None) };
        let model_dir = named.find_here()?;
        let text = model_dir.as_ref().map(|folder| reward_text(settings, folder)).transpose()?;
        let max_length = text.map(|text| text.max_length());
        Ok(Some(Self { model: settings.reward.model.clone(), model_dir, max_length }))
    }
}

/// Prints the plan.
///
/// # Errors
/// Settings that cannot run, and corpora that hold nothing for the method.
pub fn check(arguments: &CheckArguments) -> Result<()> {
    let base = base(&arguments.settings)?;
    let name = match &base {
        Base::Demo => "demo".to_owned(),
        Base::Recipe => "the recipe".to_owned(),
        Base::Preset(name) => name.clone(),
        Base::File(path) => path.display().to_string(),
    };
    let overrides = arguments.settings.overrides();
    let mut settings = Layers { base, overrides, ignore_environment: false }.load()?;
    settings.check()?;
    if settings.text.today.is_empty() {
        let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
        settings.text.today = now.date().to_string();
    }
    let progress = Progress::stderr();
    logging::init(&progress, LogFormat::Text, "warn")?;
    let plan = plan(name, &settings, &progress)?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, &plan).context("write the plan")?;
        writeln!(out)?;
    } else {
        out.write_all(render(&plan, &settings).as_bytes())?;
    }
    Ok(())
}

fn plan(name: String, settings: &Settings, progress: &Progress) -> Result<Plan> {
    let mut plan = Plan {
        settings: name,
        method: settings.method,
        guidance: settings.sampling.guidance,
        model: settings.model.clone(),
        model_dir: Named::model(settings).find_here()?,
        reward: RewardPlan::of(settings)?,
        workers: settings.workers,
        pairs_per_step: global_batch(settings),
        not_here: Vec::new(),
        corpora: Vec::new(),
        iterations: Vec::new(),
        lengths: Vec::new(),
        seed_pairs: None,
    };
    for name in settings.corpus.0.iter().chain(&settings.seeds.0) {
        if DatasetFile::parse(name)?.is_some_and(|file| file.cached().is_none()) {
            plan.not_here.push(name.clone());
        }
    }
    if !plan.not_here.is_empty() {
        return Ok(plan);
    }
    let mut bar = ReadingBar::new(progress);
    let corpora = Corpora::read(settings, &mut |path, size, bytes| bar.update(path, size, bytes))?;
    bar.close();
    plan.corpora.clone_from(&corpora.counts);
    let mut amounts = Amounts::of(&corpora);
    if let Some(folder) = &plan.model_dir {
        let prepared = tokenise(settings, text_model(settings, folder)?, corpora)?;
        let (lengths, counts) = lengths(&prepared)?;
        amounts.seeds = (counts.pairs - counts.held_out) as usize;
        amounts.seeds_held_out = counts.held_out as usize;
        (plan.lengths, plan.seed_pairs) = (lengths, Some(counts));
    }
    plan.iterations = iterations(settings, amounts);
    Ok(plan)
}

fn render(plan: &Plan, settings: &Settings) -> String {
    let mut text = String::new();
    let (training, sampling) = (&settings.training, &settings.sampling);
    let count = |n: usize| format::count(n as u64);
    let mut line = |name: &str, says: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<10} {says}");
    };
    line("settings", plan.settings.clone());
    line("method", method_line(settings));
    line(
        "model",
        match &plan.model_dir {
            Some(folder) => format!("{} in {}", plan.model, folder.display()),
            None => format!("{}, which the hub is asked for when the run begins", plan.model),
        },
    );
    let gpus = format!("{} workers, one GPU each", plan.workers);
    line(
        "workers",
        format!(
            "{gpus}; {} pairs each in a step, {} in all",
            training.pairs_per_worker, plan.pairs_per_step
        ),
    );
    line(
        "sampling",
        format!(
            "temperature {}, top-p {}, at most {} new tokens after a prompt of {}",
            sampling.temperature,
            sampling.top_p,
            count(sampling.max_new_tokens as usize),
            count(sampling.max_prompt_tokens)
        ),
    );
    if let Some(reward) = &plan.reward {
        let reads = reward.max_length.map(|n| format!(", reads {} tokens at most", count(n)));
        let lies = match &reward.model_dir {
            Some(folder) => format!("in {}", folder.display()),
            None => "which the hub is asked for when the run begins".to_owned(),
        };
        let (model, reads) = (&reward.model, reads.unwrap_or_default());
        line("rating", format!("both replies to a prompt by {model}, {lies}{reads}"));
    }
    let overlong = match settings.text.overlong {
        Overlong::Cut => "cut",
        Overlong::Drop => "dropped",
    };
    line(
        "lengths",
        format!(
            "a pair's prompt at most {} tokens, with a reply {}; longer ones are {overlong}",
            count(settings.text.max_prompt_tokens),
            count(settings.text.max_length)
        ),
    );
    line(
        "training",
        format!(
            "β {}, RPO {}, peak rate {:e} after {} % of an iteration's steps, gradient norm at most {}",
            training.beta,
            training.rpo_alpha,
            training.learning_rate,
            training.warmup_ratio * 100.0,
            training.max_grad_norm
        ),
    );
    for counts in &plan.corpora {
        let kept = [Kind::Dsat, Kind::Sat, Kind::Seed].map(|kind| format::count(counts.kept(kind)));
        line(
            "corpus",
            format!(
                "{}: {}, {} DSAT turns, {} SAT turns, {} pairs",
                counts.file, counts.format, kept[0], kept[1], kept[2]
            ),
        );
    }
    for name in &plan.not_here {
        line("corpus", format!("{name}, which is downloaded when the run begins"));
    }
    if !plan.not_here.is_empty() {
        text.push_str(&format!(
            "\nPairs and steps are not known before the corpus is here; --corpus FILE counts with another.\n\
             {} iterations of {} epochs follow a warm start of {} epochs.\n",
            training.iterations, training.epochs, training.warm_start_epochs
        ));
        return text;
    }
    text.push_str(&format!("\n{}\n", iteration_table(&plan.iterations)));
    if !plan.lengths.is_empty() {
        text.push_str(&format!("\n{}\n", length_table(&plan.lengths)));
    }
    if let Some(counts) = &plan.seed_pairs {
        text.push_str(&format!("seed pairs: {counts}\n"));
    }
    for forecast in &plan.iterations {
        let rates =
            forecast.learning_rates.iter().map(|(step, rate)| format!("{step}: {rate:.2e}"));
        let rates = rates.collect::<Vec<_>>().join(", ");
        text.push_str(&format!(
            "\nlearning rate in iteration {}, by step: {rates}",
            forecast.iteration
        ));
    }
    text.push('\n');
    text
}

fn method_line(settings: &Settings) -> String {
    let guided = match settings.sampling.guidance {
        Guidance::On => "guided by the complaint where there is one",
        Guidance::Off => "unguided",
    };
    match settings.method {
        Method::Drift => format!("drift: a fresh reply, {guided}, over the one that disappointed"),
        Method::Spin => "spin: the reply that satisfied over a fresh one".to_owned(),
        Method::IterDpo if !settings.reward.model.is_empty() => {
            "iter-dpo: of two fresh replies the one that is rated higher over the other".to_owned()
        }
        Method::IterDpo => {
            "iter-dpo: a fresh reply that was guided over one that was not".to_owned()
        }
    }
}

fn iteration_table(iterations: &[IterationForecast]) -> String {
    let header = ["iter", "replies", "pairs", "held out", "epochs", "steps"].map(str::to_owned);
    let rows = iterations.iter().map(|i| {
        let counts = [i.replies, i.pairs, i.held_out].map(|n| format::count(n as u64));
        let [replies, pairs, held_out] = counts;
        let (epochs, steps) = (i.epochs.to_string(), format::count(i.steps));
        [i.iteration.to_string(), replies, pairs, held_out, epochs, steps]
    });
    table(std::iter::once(header).chain(rows))
}

fn length_table(lengths: &[LengthForecast]) -> String {
    let header = ["tokens of", "count", "median", "95 %", "longest"].map(str::to_owned);
    let rows = lengths.iter().map(|l| {
        let counts = [l.count, l.median, l.p95, l.longest].map(|n| format::count(n as u64));
        let [count, median, p95, longest] = counts;
        [l.what.clone(), count, median, p95, longest]
    });
    table(std::iter::once(header).chain(rows))
}

/// Columns of numbers behind a first one of words.
fn table<const N: usize>(rows: impl Iterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for row in rows {
        table.add_row(row.into_iter().enumerate().map(|(at, text)| {
            let side = if at == 0 { CellAlignment::Left } else { CellAlignment::Right };
            Cell::new(text).set_alignment(side)
        }));
    }
    table.trim_fmt()
}
