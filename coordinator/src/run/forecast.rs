//! What a run will do, as far as settings, corpora and the tokenizer tell it before it begins.

use serde::Serialize;

use super::driver::{Corpora, Prepared};
use super::plan::learning_rate;
use crate::config::{Guidance, Method, Settings};
use crate::domain::Iteration;
use crate::method;
use crate::text::{PairCounts, TextError, seed_pairs};

/// One iteration to come.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct IterationForecast {
    /// 0 is the warm start.
    pub iteration: Iteration,
    /// Replies that are drawn.
    pub replies: usize,
    /// Pairs that train, unless replies come out empty or equal.
    pub pairs: usize,
    /// Pairs that are evaluated.
    pub held_out: usize,
    /// Passes over the pairs.
    pub epochs: u32,
    /// Optimiser steps, all epochs together.
    pub steps: u64,
    /// Learning rate of some steps, the first and the last among them: (step, rate).
    pub learning_rates: Vec<(u64, f64)>,
}

/// How long some sequences are, in tokens, before anything is cut.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LengthForecast {
    /// Which sequences.
    pub what: String,
    /// How many.
    pub count: usize,
    /// Half of them are no longer.
    pub median: usize,
    /// 95 of 100 are no longer.
    pub p95: usize,
    /// The longest.
    pub longest: usize,
}

/// Pairs of an optimiser step.
pub fn global_batch(settings: &Settings) -> usize {
    settings.training.pairs_per_worker * settings.workers as usize
}

/// How many prompts train, and how many are held out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amounts {
    /// Cases that train.
    pub cases: usize,
    /// Cases that are evaluated.
    pub cases_held_out: usize,
    /// Seed pairs that train.
    pub seeds: usize,
    /// Seed pairs that are evaluated.
    pub seeds_held_out: usize,
}

impl Amounts {
    /// Of what was read, before a pair is dropped.
    pub fn of(corpora: &Corpora) -> Self {
        let is_out = |context: &Vec<_>| corpora.held_out.contains(context);
        let cases_held_out = corpora.cases.iter().filter(|case| is_out(&case.context)).count();
        let seeds_held_out = corpora.seeds.iter().filter(|pair| is_out(&pair.context)).count();
        Self {
            cases: corpora.cases.len() - cases_held_out,
            cases_held_out,
            seeds: corpora.seeds.len() - seeds_held_out,
            seeds_held_out,
        }
    }
}

/// The iterations of a run on so much.
pub fn iterations(settings: &Settings, amounts: Amounts) -> Vec<IterationForecast> {
    let training = &settings.training;
    let drawn = method::of(settings.method).prompts(settings.sampling.guidance).len();
    let of = |k: u32, replies, pairs: usize, held_out, epochs: u32| {
        let steps = pairs.div_ceil(global_batch(settings)) as u64 * u64::from(epochs);
        let rate = |step| (step, learning_rate(training, step, steps));
        let learning_rates = shown(steps, training.warmup_ratio).into_iter().map(rate).collect();
        let iteration = Iteration(k);
        IterationForecast { iteration, replies, pairs, held_out, epochs, steps, learning_rates }
    };
    let Amounts { cases, cases_held_out, seeds, seeds_held_out } = amounts;
    let warm_start = (training.warm_start_epochs > 0)
        .then(|| of(0, 0, seeds, seeds_held_out, training.warm_start_epochs));
    let later = (1..=training.iterations).map(|k| {
        let pairs = cases * training.pair_iterations.min(k) as usize;
        of(k, (cases + cases_held_out) * drawn, pairs, cases_held_out, training.epochs)
    });
    warm_start.into_iter().chain(later).collect()
}

/// Steps that show a schedule's course: its ends, the peak, and some between.
fn shown(steps: u64, warmup_ratio: f64) -> Vec<u64> {
    let Some(last) = steps.checked_sub(1) else { return Vec::new() };
    let peak = (warmup_ratio * steps as f64).ceil() as u64;
    let mut shown: Vec<u64> = [0, 1, peak / 2, peak, steps / 4, steps / 2, steps * 3 / 4, last]
        .into_iter()
        .filter(|step| *step <= last)
        .collect();
    shown.sort_unstable();
    shown.dedup();
    shown
}

/// Lengths of what is sampled from, and of the warm start's pairs; and what becomes of those.
///
/// # Errors
/// The tokenizer's, and the chat template's.
pub fn lengths(prepared: &Prepared) -> Result<(Vec<LengthForecast>, PairCounts), TextError> {
    let mut lengths = Vec::new();
    let draws = prepared.prompts.samples();
    // Unguided, all samples of a case are drawn from the same prompt.
    let is_guided = prepared.guidance == Guidance::On && prepared.method == Method::IterDpo;
    for index in 0..if is_guided { draws } else { 1 } {
        let what = match (is_guided, index) {
            (true, 0) => "sampling prompts, guided",
            (true, _) => "sampling prompts, unguided",
            (false, _) => "sampling prompts",
        };
        let of_index = prepared.prompts.iter().skip(index).step_by(draws);
        lengths.extend(spread(what, of_index.map(|ids| ids.len()).collect()));
    }
    let (rows, counts) =
        seed_pairs(&prepared.text, &prepared.seeds, prepared.lengths, &prepared.held_out)?;
    for (what, of) in [
        ("seed pairs: prompts", (|row| row.prompt.len()) as fn(&crate::domain::TokenPair) -> usize),
        ("seed pairs: chosen replies", |row| row.chosen.len()),
        ("seed pairs: rejected replies", |row| row.rejected.len()),
    ] {
        lengths.extend(spread(what, rows.iter().map(|row| of(&row.tokens)).collect()));
    }
    Ok((lengths, counts))
}

fn spread(what: &str, mut lengths: Vec<usize>) -> Option<LengthForecast> {
    lengths.sort_unstable();
    let longest = *lengths.last()?;
    let at = |share: f64| lengths[((lengths.len() - 1) as f64 * share).round() as usize];
    let (count, median, p95) = (lengths.len(), at(0.5), at(0.95));
    Some(LengthForecast { what: what.to_owned(), count, median, p95, longest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_shown_are_the_ends_the_peak_and_some_between() {
        assert!(shown(0, 0.1).is_empty());
        assert_eq!(shown(1, 0.1), [0]);
        assert_eq!(shown(100, 0.1), [0, 1, 5, 10, 25, 50, 75, 99]);
        assert_eq!(shown(2, 1.0), [0, 1]);
    }

    #[test]
    fn steps_are_those_of_the_batch_and_pairs_of_the_iterations_that_make_them() {
        let mut settings = Settings { workers: 8, method: Method::IterDpo, ..Settings::default() };
        settings.training.pair_iterations = 2;
        let amounts = Amounts { cases: 100, cases_held_out: 10, seeds: 33, seeds_held_out: 4 };
        let forecast = iterations(&settings, amounts);
        let told: Vec<_> =
            forecast.iter().map(|i| (i.replies, i.pairs, i.held_out, i.steps)).collect();
        assert_eq!(told, [(0, 33, 4, 6), (220, 100, 10, 4), (220, 200, 10, 7)]);
        assert_eq!(forecast[0].learning_rates[0], (0, 0.0), "the warm-up begins at 0");
        settings.training.warm_start_epochs = 0;
        assert_eq!(iterations(&settings, amounts)[0].iteration, Iteration(1));
    }

    #[test]
    fn a_spread_counts_its_middle_and_its_tail() {
        let of = spread("x", (1..=101).rev().collect()).map(|s| (s.median, s.p95, s.longest));
        assert_eq!(of, Some((51, 96, 101)));
        assert_eq!(spread("x", Vec::new()), None);
    }
}
