//! From samples, and what a reward model says of them, to pairs to be.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::{Case, PreferenceMethod, Source};
use crate::config::Guidance;
use crate::domain::{Iteration, PromptId, Ratings, Sample};
use crate::text::{Candidate, DropReason, HeldOutSet, Reply, TextError};

/// What was drawn in one iteration.
#[derive(Debug, Clone, Default)]
pub struct Drawn {
    /// Which.
    pub iteration: Iteration,
    /// Its samples, in any order.
    pub samples: Vec<Sample>,
    /// What a reward model says of them, where the method asks for it.
    pub ratings: Ratings,
}

/// The pairs to be of the last of the iterations in `drawn`, in order of iteration and
/// case, whatever the order of samples. Pairs of the iterations before it are only for
/// training: those that are held out are left away. So is a case without all its samples,
/// whose shard was set aside.
///
/// # Errors
/// [`TextError::UnknownPrompt`] and [`TextError::DuplicateSample`] for samples that do not
/// belong to `cases`.
pub fn candidates<'a>(
    method: &dyn PreferenceMethod,
    guidance: Guidance,
    cases: &'a [Case],
    drawn: &'a [Drawn],
    held_out: &HeldOutSet,
) -> Result<Vec<Candidate<'a>>, TextError> {
    let own = drawn.last().map(|drawn| drawn.iteration);
    let sides = (method.chosen(guidance), method.rejected(guidance));
    let mut candidates = Vec::new();
    for Drawn { iteration, samples, ratings } in drawn {
        for (prompt, samples) in by_case(samples, cases.len())? {
            let case = &cases[prompt];
            if Some(*iteration) != own && held_out.contains(&case.context) {
                continue;
            }
            let rated = method.is_rated(guidance).then(|| by_rating(&samples, ratings));
            let flaw = rated.and_then(Result::err);
            let [better, worse] = rated.and_then(Result::ok).unwrap_or([0, 1]);
            let sample = |index| {
                let sample = samples.get(&index).copied()?;
                Some(Reply::Drawn { iteration: *iteration, sample })
            };
            let reply = |from| match from {
                Source::Corpus => Some(Reply::Corpus { text: &case.reply, origin: &case.origin }),
                Source::Sample(index) => sample(index),
                Source::Better => sample(better),
                Source::Worse => sample(worse),
            };
            if let (Some(chosen), Some(rejected)) = (reply(sides.0), reply(sides.1)) {
                candidates.push(Candidate { context: &case.context, chosen, rejected, flaw });
            }
        }
    }
    Ok(candidates)
}

/// Indices of a case's two samples, the better one first.
///
/// # Errors
/// Why neither is.
fn by_rating(samples: &BTreeMap<u32, &Sample>, ratings: &Ratings) -> Result<[u32; 2], DropReason> {
    let rating = |index: u32| {
        let sample = samples.get(&index).ok_or(DropReason::NotRated)?;
        ratings.get(&(sample.prompt, index)).copied().ok_or(DropReason::NotRated)
    };
    match rating(0)?.partial_cmp(&rating(1)?) {
        Some(Ordering::Greater) => Ok([0, 1]),
        Some(Ordering::Less) => Ok([1, 0]),
        Some(Ordering::Equal) | None => Err(DropReason::EqualRatings),
    }
}

/// Samples by the number of their case, and by their index.
fn by_case(
    samples: &[Sample],
    cases: usize,
) -> Result<BTreeMap<usize, BTreeMap<u32, &Sample>>, TextError> {
    let mut sorted: BTreeMap<usize, BTreeMap<u32, &Sample>> = BTreeMap::new();
    for sample in samples {
        let Sample { prompt, index, .. } = *sample;
        let PromptId(number) = prompt;
        let case = usize::try_from(number).ok().filter(|case| *case < cases);
        let case = case.ok_or(TextError::UnknownPrompt { prompt, index, prompts: cases })?;
        if sorted.entry(case).or_default().insert(index, sample).is_some() {
            return Err(TextError::DuplicateSample { prompt, index });
        }
    }
    Ok(sorted)
}
