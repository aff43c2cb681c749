//! `bench scaling`: two workers with one thread each beside one.

use std::fs::{File, create_dir_all};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use drift_worker::collective::{ProcessGroup, Store};
use drift_worker::model::{Decoder, ModelConfig};
use drift_worker::train::{TokenPair, Trainer};
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};
use tch::{Device, Kind};

use crate::floor::{Rate, RateJob};
use crate::job::{Ids, Recipe, passes, token_pairs, train_step};
use crate::machine::{self, peak_bytes};
use crate::mix::{responses, tokens};
use crate::options::{DType, EngineOptions, Reduce, ScalingOptions, Sharding};
use crate::ours::score;
use crate::process::{Running, start_ours};
use crate::report::{median, table, write};

const HOST: &str = "127.0.0.1";
/// How long ranks wait for one another.
const PATIENCE: Duration = Duration::from_secs(600);

/// What one rank is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RankJob {
    model: PathBuf,
    rank: u32,
    world_size: u32,
    /// Where the store listens.
    port: u16,
    /// This rank's share.
    pairs: Vec<Ids>,
    global_pairs: usize,
    micro_batch: usize,
    /// Timed steps, after one that is not.
    steps: usize,
    recipe: Recipe,
    engine: EngineOptions,
    sharding: Sharding,
    reduce: Reduce,
    /// Where the trace of the timed steps goes.
    trace: Option<PathBuf>,
}

/// What one rank measured.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RankRun {
    /// Seconds of the timed steps together.
    seconds: f64,
    /// Seconds of each of them.
    step_seconds: Vec<f64>,
    /// Seconds during which a reduction was under way.
    busy: f64,
    /// Seconds of these in which the rank did nothing but wait for it.
    exposed: f64,
    peak_bytes: u64,
}

/// What several workers came to.
struct Scaled {
    sharding: Sharding,
    /// One for each round: what each rank measured.
    runs: Vec<Vec<RankRun>>,
}

pub(crate) fn run(options: &ScalingOptions) -> Result<()> {
    let config = ModelConfig::read(&options.model)?;
    let pairs = options.mix.pairs(options.pairs, config.vocab_size);
    let (mut ceilings, mut one) = (Vec::new(), Vec::new());
    let scaled = |&sharding| Scaled { sharding, runs: Vec::new() };
    let mut two: Vec<Scaled> = options.shardings().iter().map(scaled).collect();
    for round in 1..=options.rounds {
        let tell = |workers: &str, run: &[RankRun]| {
            eprintln!("{round}/{}: {workers}: {}", options.rounds, told(run));
        };
        ceilings.push(ceiling(options, &pairs)?);
        // Nothing is sharded over one.
        let run = measure(options, &pairs, 1, Sharding::None)?;
        tell("one worker", &run);
        one.push(run);
        for Scaled { sharding, runs } in &mut two {
            let run = measure(options, &pairs, 2, *sharding)?;
            tell(&format!("two, {}", sharding.name()), &run);
            runs.push(run);
        }
    }
    let ceiling = median(ceilings.into_iter()).unwrap_or(f64::NAN);
    report(options, ceiling, &one, &two)
}

/// Prints the medians, and writes everything to a file.
fn report(
    options: &ScalingOptions,
    ceiling: f64,
    one: &[Vec<RankRun>],
    two: &[Scaled],
) -> Result<()> {
    let step_seconds = |runs: &[Vec<RankRun>]| {
        median(runs.iter().map(|run| seconds(run) / options.steps as f64)).unwrap_or(f64::NAN)
    };
    let one_step = step_seconds(one);
    let row = |workers: &str, sharding: &str, seconds: f64, hidden: String| {
        [
            workers.to_owned(),
            sharding.to_owned(),
            format!("{seconds:.2}"),
            format!("{:.3}", options.pairs as f64 / seconds),
            format!("{:.2}", one_step / seconds),
            hidden,
        ]
    };
    let mut rows = vec![row("1", "", one_step, String::new())];
    let mut two_workers = Map::new();
    for Scaled { sharding, runs } in two {
        let step = step_seconds(runs);
        let hidden = median(runs.iter().filter_map(|run| hidden_share(run)));
        let shown = hidden
            .map_or_else(|| "not measured".to_owned(), |share| format!("{:.0} %", 100.0 * share));
        rows.push(row("2", sharding.name(), step, shown));
        let figures = json!({
            "step_seconds": step,
            "speed_up": one_step / step,
            "hidden_reduction_share": hidden,
            "runs": runs,
        });
        two_workers.insert(sharding.name().to_owned(), figures);
    }
    let figures = json!({
        "benchmark": "scaling",
        "date": jiff::Timestamp::now().to_string(),
        "machine": machine::describe()?,
        "mix": options.mix.name(),
        "global_pairs": options.pairs,
        "micro_batch": options.micro_batch,
        "reduce": options.reduce,
        "engine": options.engine,
        "speed_up_of_products_alone": ceiling,
        "one_worker": {"step_seconds": one_step, "runs": one},
        "two_workers": two_workers,
    });
    write(&options.output, &figures)?;
    let head = ["workers", "sharding", "s/step", "pairs/s", "speed-up", "sums hidden"];
    println!("\n{}", table(&head, &rows));
    println!(
        "\nmix {}; two processes that only multiply matrices: {ceiling:.2} times one",
        options.mix.name()
    );
    println!("written to {}", options.output.display());
    println!(
        "the last round's steps of two workers, for https://ui.perfetto.dev: {}",
        options.output.with_file_name("scaling-trace-*.json").display()
    );
    Ok(())
}

/// What two processes at once gain over one where they do nothing but multiply matrices of
/// the model's shapes, with one thread each: two cores of a machine may share their
/// arithmetic or their power, and two workers gain no more than that.
fn ceiling(options: &ScalingOptions, pairs: &[TokenPair]) -> Result<f64> {
    let of_a_pass = |count: fn(&TokenPair) -> usize| {
        pairs.iter().map(count).sum::<usize>() * options.micro_batch / pairs.len()
    };
    let job = RateJob {
        model: options.model.clone(),
        threads: 1,
        dtype: DType::Bf16,
        tokens: of_a_pass(tokens),
        rows: of_a_pass(responses),
    };
    let start = || start_ours("run-rate", &job);
    let alone: Rate = start()?.answer()?;
    let (first, second) = (start()?, start()?);
    let (first, second): (Rate, Rate) = (first.answer()?, second.answer()?);
    Ok((first.model_shapes + second.model_shapes) / alone.model_shapes)
}

/// Where a rank's trace goes: beside the figures.
fn trace_file(options: &ScalingOptions, sharding: Sharding, rank: usize) -> PathBuf {
    options.output.with_file_name(format!("scaling-trace-{}-{rank}.json", sharding.name()))
}

/// One run of `world_size` workers, all of it with one thread each.
fn measure(
    options: &ScalingOptions,
    pairs: &[TokenPair],
    world_size: u32,
    sharding: Sharding,
) -> Result<Vec<RankRun>> {
    // The store outlives the ranks that meet at it.
    let (_store, port) = Store::listen(HOST)?;
    let start = |(rank, share): (usize, Vec<TokenPair>)| {
        let job = RankJob {
            model: options.model.clone(),
            rank: rank as u32,
            world_size,
            port,
            pairs: share.iter().map(Ids::from).collect(),
            global_pairs: pairs.len(),
            micro_batch: options.micro_batch,
            steps: options.steps,
            recipe: Recipe::default(),
            engine: options.engine.clone(),
            sharding,
            reduce: options.reduce,
            trace: (world_size > 1).then(|| trace_file(options, sharding, rank)),
        };
        start_ours("run-rank", &job)
    };
    let shares = deal(pairs, world_size as usize).into_iter().enumerate();
    let ranks = shares.map(start).collect::<Result<Vec<Running>>>()?;
    let (mut runs, mut failures) = (Vec::new(), Vec::new());
    for (rank, running) in ranks.into_iter().enumerate() {
        match running.answer() {
            Ok(run) => runs.push(run),
            Err(error) => failures.push(format!("rank {rank}: {error:#}")),
        }
    }
    // One rank's end is the others': which was first, only all of them tell.
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(runs)
}

/// Deals pairs to ranks as the coordinator does: heaviest first, each to the rank
/// with the fewest tokens that still has room.
fn deal(pairs: &[TokenPair], world_size: usize) -> Vec<Vec<TokenPair>> {
    let room = pairs.len().div_ceil(world_size);
    let mut heaviest_first = pairs.to_vec();
    heaviest_first.sort_by_key(|pair| std::cmp::Reverse(tokens(pair)));
    let mut shares: Vec<Vec<TokenPair>> = vec![Vec::new(); world_size];
    for pair in heaviest_first {
        let open = shares.iter_mut().filter(|share| share.len() < room);
        let lightest = open.min_by_key(|share| share.iter().map(tokens).sum::<usize>());
        if let Some(share) = lightest {
            share.push(pair);
        }
    }
    shares
}

/// One rank's run, in a process of its own.
pub(crate) fn run_rank(job: &RankJob) -> Result<RankRun> {
    let RankJob { rank, world_size, recipe, engine, .. } = job;
    tch::set_num_threads(1);
    let store = Store::connect(HOST, job.port, PATIENCE)?;
    let group = (*world_size > 1)
        .then(|| ProcessGroup::gloo(&store, 1, *rank, *world_size, PATIENCE, HOST))
        .transpose()?;
    let mut trainer = Trainer::new(Decoder::load(&job.model, Kind::BFloat16, Device::Cpu)?);
    let mut pairs = token_pairs(&job.pairs);
    let mut settings = recipe.settings(engine);
    settings.engine.sharding = job.sharding.into();
    settings.engine.reduce = job.reduce.into();
    trainer.begin(settings, group.as_ref())?;
    score(&trainer, &mut pairs, job.micro_batch, engine.max_tokens)?;

    let passes = passes(&pairs, job.micro_batch, engine.max_tokens);
    let train = |trainer: &mut Trainer, number: usize| {
        let passes = passes.clone();
        let step = train_step(number as u64, recipe.learning_rate, job.global_pairs, passes);
        trainer.step(&step, group.as_ref(), &|| false)
    };
    // Not timed: its buffers and kernels are new, and the ranks have yet to come together.
    train(&mut trainer, 0)?;
    group.as_ref().map(ProcessGroup::barrier).transpose()?;
    trainer.record_trace(job.trace.is_some());
    let start = Instant::now();
    let (mut step_seconds, mut busy, mut exposed) = (Vec::new(), 0.0, 0.0);
    for number in 1..=job.steps {
        let begun = Instant::now();
        let report = train(&mut trainer, number)?;
        step_seconds.push(begun.elapsed().as_secs_f64());
        busy += report.reduction.busy;
        exposed += report.reduction.exposed;
    }
    let seconds = start.elapsed().as_secs_f64();
    if let Some(file) = &job.trace {
        let mut write = || {
            file.parent().map_or(Ok(()), create_dir_all)?;
            let mut out = BufWriter::new(File::create(file)?);
            trainer.take_trace().write_chrome(&mut out, *rank)?;
            out.flush()
        };
        write().with_context(|| format!("write {}", file.display()))?;
    }
    // Nobody leaves while another still reduces.
    group.as_ref().map(ProcessGroup::barrier).transpose()?;
    Ok(RankRun {
        seconds,
        step_seconds,
        busy,
        exposed,
        peak_bytes: peak_bytes(Path::new("/proc/self"))?,
    })
}

/// A run ends with its last rank.
fn seconds(run: &[RankRun]) -> f64 {
    run.iter().map(|rank| rank.seconds).fold(0.0, f64::max)
}

/// Of the time that reductions were under way, that in which ranks computed on.
fn hidden_share(run: &[RankRun]) -> Option<f64> {
    let busy: f64 = run.iter().map(|rank| rank.busy).sum();
    let exposed: f64 = run.iter().map(|rank| rank.exposed).sum();
    (busy > 0.0).then(|| 1.0 - exposed / busy)
}

fn told(run: &[RankRun]) -> String {
    let ranks: Vec<String> = run
        .iter()
        .map(|rank| {
            let RankRun { seconds, busy, exposed, .. } = rank;
            format!("{seconds:.2} s (reductions {busy:.2} s, {exposed:.2} s of them waited for)")
        })
        .collect();
    ranks.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mix::Mix;

    #[test]
    fn ranks_get_as_many_pairs_and_about_as_many_tokens() {
        let pairs = Mix::Even.pairs(8, 49_152);
        let shares = deal(&pairs, 2);
        let tokens_of = |share: &Vec<TokenPair>| share.iter().map(tokens).sum::<usize>() as f64;
        assert_eq!(shares.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4]);
        let (first, second) = (tokens_of(&shares[0]), tokens_of(&shares[1]));
        assert!((first / second - 1.0).abs() < 0.05, "{first} {second}");
        let mut ids: Vec<u64> = shares.iter().flatten().map(|pair| pair.pair).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn hidden_is_what_was_not_waited_for() {
        let rank = |busy, exposed| RankRun {
            seconds: 1.0,
            step_seconds: vec![1.0],
            busy,
            exposed,
            peak_bytes: 0,
        };
        assert_eq!(hidden_share(&[rank(3.0, 1.0), rank(1.0, 0.0)]), Some(0.75));
        assert_eq!(hidden_share(&[rank(0.0, 0.0)]), None);
    }
}
