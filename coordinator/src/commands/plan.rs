//! `coordinator plan`: memory and time of a run, before a GPU is booked.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use super::model::Named;
use super::run::base;
use crate::cli::{PlanArguments, SettingsArguments};
use crate::config::{ByteSize, DType, Layers, OptimizerChoice, Recompute, Settings, Sharding};
use crate::estimate::memory::{Keep, Place};
use crate::estimate::{Amounts, Fit, Footprint, Rates, Shape, Times, Work};
use crate::ui::format;

/// Shapes of the recipe's models, for planning without having them.
const KNOWN: [(&str, &str); 3] = [
    ("Qwen2.5-7B-Instruct", include_str!("../../../configs/models/Qwen2.5-7B-Instruct.json")),
    ("Qwen2.5-14B-Instruct", include_str!("../../../configs/models/Qwen2.5-14B-Instruct.json")),
    ("gemma-3-12b-it", include_str!("../../../configs/models/gemma-3-12b-it.json")),
];

/// What is told of a run.
#[derive(Debug, Serialize)]
struct Plan {
    model: String,
    parameters: u64,
    workers: u32,
    /// Bytes of each worker's device.
    memory: u64,
    /// As the settings are.
    set: Footprint,
    fits: bool,
    /// Settings that fit and cost least, if there are any.
    best: Option<Best>,
    /// Of an iteration, with the best settings, else as they are set.
    times: Times,
    amounts: Amounts,
    rates: Rates,
    /// What rates samples; it is not counted.
    reward_model: Option<String>,
}

#[derive(Debug, Serialize)]
struct Best {
    #[serde(flatten)]
    fit: Fit,
    footprint: Footprint,
}

/// Prints the plan. It is no error if nothing fits: the plan says so.
///
/// # Errors
/// Settings that cannot run, a model whose `config.json` is not here, and rates or sizes
/// that are none.
pub fn plan(arguments: &PlanArguments) -> Result<()> {
    let settings = Layers {
        base: base(&arguments.settings)?,
        overrides: arguments.settings.overrides(),
        ignore_environment: false,
    };
    let settings = settings.load()?;
    settings.check()?;
    let plan = made(arguments, &settings)?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, &plan).context("write the plan")?;
        writeln!(out)?;
    } else {
        out.write_all(render(&plan, &arguments.settings).as_bytes())?;
    }
    Ok(())
}

fn made(arguments: &PlanArguments, settings: &Settings) -> Result<Plan> {
    let text = config_json(settings)?;
    let shape = Shape::parse(&text).with_context(|| format!("plan for {}", settings.model))?;
    let memory = arguments.gpu_memory;
    let rates = Rates {
        matrix: arguments.matrix_tflops * 1e12,
        memory: arguments.memory_gb * 1e9,
        link: arguments.link_gb * 1e9,
    };
    if [rates.matrix, rates.memory, rates.link].iter().any(|rate| rate.is_nan() || *rate <= 0.0) {
        bail!("rates are numbers above 0");
    }
    let (training, sampling) = (&settings.training, &settings.sampling);
    let reply = settings.text.max_length.saturating_sub(settings.text.max_prompt_tokens) as u64;
    let reply = arguments.reply_tokens.unwrap_or(u64::from(sampling.max_new_tokens).min(reply));
    let prompt = settings.text.max_prompt_tokens as u64;
    let prompt = arguments.prompt_tokens.map_or(prompt, |tokens| tokens.min(prompt));
    // A step's pairs at their longest; what is longer than `max_tokens` goes in several passes.
    let pairs = training.pairs_per_worker as u64;
    let pair = settings.text.max_length as u64 + reply;
    let tokens = (pairs * pair).min(training.max_tokens as u64).max(pair);
    let work = Work {
        ranks: u64::from(settings.workers),
        place: Place::Gpu,
        weight: if training.dtype == DType::F32 { 4 } else { 2 },
        moments: if training.optimizer == OptimizerChoice::AdamW { 2 } else { 1 },
        sharding: training.sharding,
        keep: match training.recompute {
            Recompute::None => Keep::All,
            Recompute::All => Keep::Inputs,
            Recompute::Auto => Keep::Budget(training.activation_budget.0),
        },
        tokens,
        responses: tokens * 2 * reply / pair,
        cache: sampling.cache_budget.0,
        rows: u64::from(sampling.max_rows),
        row_tokens: sampling.max_prompt_tokens as u64 + u64::from(sampling.max_new_tokens),
    };
    let set = Footprint::of(&shape, &work);
    let found = Fit::find(&shape, &work, memory, pair);
    let amounts = Amounts {
        pairs: arguments.pairs,
        prompt,
        sampling_prompt: (sampling.max_prompt_tokens as u64).min(prompt + reply),
        reply,
        batch: pairs * work.ranks,
    };
    let timed = found.as_ref().map_or(&work, |(_, work)| work);
    Ok(Plan {
        model: settings.model.clone(),
        parameters: shape.parameters(),
        workers: settings.workers,
        memory,
        fits: set.peak() <= memory,
        times: Times::of(&shape, timed, &amounts, &rates),
        best: found.map(|(fit, work)| Best { fit, footprint: Footprint::of(&shape, &work) }),
        set,
        amounts,
        rates,
        reward_model: Some(settings.reward.model.clone()).filter(|name| !name.is_empty()),
    })
}

/// The model's own, where it is; else what is known of its namesake.
fn config_json(settings: &Settings) -> Result<String> {
    if let Some(folder) = Named::model(settings).find_here()? {
        let path = folder.join("config.json");
        return std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()));
    }
    let name = Path::new(&settings.model).file_name().unwrap_or_default().to_string_lossy();
    let known = KNOWN.iter().find(|(known, _)| known.eq_ignore_ascii_case(&name));
    known.map(|(_, text)| (*text).to_owned()).with_context(|| {
        let names: Vec<_> = KNOWN.iter().map(|(name, _)| *name).collect();
        format!(
            "no config.json of {} on this machine: name a folder that holds it with --model, or one of {}",
            settings.model,
            names.join(", ")
        )
    })
}

fn render(plan: &Plan, arguments: &SettingsArguments) -> String {
    let mut text = String::new();
    let gib = |bytes: u64| format!("{:.1}", bytes as f64 / (1u64 << 30) as f64);
    let billions = plan.parameters as f64 / 1e9;
    let memory = ByteSize(plan.memory);
    let mut line = |words: String| {
        text.push_str(&words);
        text.push('\n');
    };
    line(format!(
        "{}, {billions:.2} billion weights, on {} GPUs of {memory}",
        plan.model, plan.workers
    ));
    line(String::new());
    line("GiB on each GPU, as set:".to_owned());
    line(phases(&plan.set, gib));
    line(match plan.fits {
        true => format!("It fits: {} of {} GiB at most.", gib(plan.set.peak()), gib(plan.memory)),
        false => format!("It does not fit: {} of {} GiB.", gib(plan.set.peak()), gib(plan.memory)),
    });
    line(String::new());
    match &plan.best {
        None => line(
            "No setting fits: take more GPUs, GPUs with more memory, or a smaller model."
                .to_owned(),
        ),
        Some(Best { fit, footprint }) => {
            let sharding = match fit.sharding {
                Sharding::None => "none",
                Sharding::Zero2 => "zero2",
            };
            let mut set = vec![
                format!("training.sharding={sharding}"),
                format!("training.recompute={}", fit.recompute),
                format!("training.max_tokens={}", fit.max_tokens),
                format!("sampling.cache_budget={}MiB", fit.cache_budget >> 20),
            ];
            if let Some(budget) = fit.activation_budget {
                set.insert(2, format!("training.activation_budget={}MiB", budget >> 20));
            }
            line(format!("Fastest settings that fit, {} GiB at most:", gib(footprint.peak())));
            let flags = set.iter().map(|set| format!("--set {set}")).collect::<Vec<_>>();
            line(format!("    {}", flags.join(" \\\n    ")));
            line(String::new());
            line("GiB on each GPU with these:".to_owned());
            line(phases(footprint, gib));
        }
    }
    let Times { sampling, scoring, training, steps } = plan.times;
    let clock = |seconds: f64| format::seconds(seconds);
    line(format!(
        "An iteration of {} pairs: sampling {}, scoring {}, training {} in {steps} steps.",
        format::count(plan.amounts.pairs),
        clock(sampling),
        clock(scoring),
        clock(training)
    ));
    line(format!(
        "Counted with prompts of {} tokens and replies of {}, all of them, and for each GPU {:.0} TFLOP/s of\n\
         products, {:.1} TB/s of memory and {:.0} GB/s between GPUs. Nothing of it was measured on a GPU.",
        plan.amounts.prompt,
        plan.amounts.reply,
        plan.rates.matrix / 1e12,
        plan.rates.memory / 1e12,
        plan.rates.link / 1e9
    ));
    if let Some(name) = &plan.reward_model {
        line(format!(
            "Not counted: the memory of {name}, which stands beside the weights while it rates replies, and its time."
        ));
    }
    if arguments.workers.is_none() {
        line("--gpus says how many GPUs; --gpu-memory how large they are.".to_owned());
    }
    text
}

/// Items in rows, phases in columns.
fn phases(footprint: &Footprint, gib: impl Fn(u64) -> String) -> String {
    let mut items: Vec<&str> = Vec::new();
    for (item, _) in footprint.phases.iter().flat_map(|phase| &phase.items) {
        if !items.contains(item) {
            items.push(item);
        }
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut row = |name: &str, cells: Vec<String>| {
        let cells =
            cells.into_iter().map(|cell| Cell::new(cell).set_alignment(CellAlignment::Right));
        table.add_row(std::iter::once(Cell::new(name)).chain(cells));
    };
    row("", footprint.phases.iter().map(|phase| phase.name.to_owned()).collect());
    for item in items {
        let of = |phase: &crate::estimate::Phase| {
            let found = phase.items.iter().find(|(name, _)| *name == item);
            found.map_or_else(String::new, |(_, bytes)| gib(*bytes))
        };
        row(item, footprint.phases.iter().map(of).collect());
    }
    row("in all", footprint.phases.iter().map(|phase| gib(phase.total())).collect());
    table.trim_fmt()
}
