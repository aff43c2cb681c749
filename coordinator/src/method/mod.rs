//! Preference methods: what replies are drawn from, and which reply is preferred.
//!
//! | | drawn from | chosen | rejected |
//! |---|---|---|---|
//! | `Drift` | the whole conversation with the complaint and an instruction; unguided: x | the sample | the reply that disappointed |
//! | `Spin` | x | the reply that satisfied | the sample |
//! | `IterDpo` | the same as DRIFT, and x | the guided sample | the unguided one |
//!
//! x is the conversation before the corpus's reply, and what training conditions on. A
//! corpus of pairs (UltraFeedback's shape) has no complaints: there replies are drawn from
//! x, and the corpus's reply is the pair's rejected one for DRIFT, its chosen one for SPIN.

mod drift;
mod iter_dpo;
mod spin;

use std::collections::BTreeMap;

use serde::Serialize;

use self::drift::Drift;
use self::iter_dpo::IterDpo;
use self::spin::Spin;
use crate::config::{Guidance, Method};
use crate::corpus::Record;
use crate::domain::{Iteration, Message, Origin, PromptId, Sample, SeedPair};
use crate::text::{Candidate, HeldOutSet, Reply, TextError, guided_messages};

/// A prompt that replies are drawn for in every iteration, and the corpus's own reply to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Case {
    /// x.
    pub context: Vec<Message>,
    /// What the corpus has as the reply to it.
    pub reply: String,
    /// What the user said to that; none in a corpus of pairs.
    pub feedback: Option<String>,
    /// Where it stands.
    pub origin: Origin,
}

/// What a reply is drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prompt {
    /// x alone.
    Bare,
    /// The conversation on to the complaint, and the instruction to do better; x where
    /// nobody complained.
    Guided,
}

/// Where a side of a pair comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The corpus's reply.
    Corpus,
    /// The sample of this index.
    Sample(u32),
}

/// One method.
pub trait PreferenceMethod: Sync {
    /// The case that a record of a conversation makes, if this method learns from such.
    fn of_conversation(&self, record: &Record) -> Option<Case>;

    /// The case that a pair of a corpus of pairs makes; none if the method needs more
    /// than a pair to tell which reply is better.
    fn of_pair(&self, pair: &SeedPair) -> Option<Case>;

    /// What the samples of a case are drawn from, by their index.
    fn prompts(&self, guidance: Guidance) -> &'static [Prompt];

    /// y⁺.
    fn chosen(&self) -> Source;

    /// y⁻.
    fn rejected(&self) -> Source;

    /// What a corpus of conversations must hold, and why, for whoever lacks it.
    fn needs(&self) -> (&'static str, &'static str);
}

/// The method of that name.
pub fn of(method: Method) -> &'static dyn PreferenceMethod {
    match method {
        Method::Drift => &Drift,
        Method::Spin => &Spin,
        Method::IterDpo => &IterDpo,
    }
}

impl Case {
    /// The conversation that a prompt of this kind shows.
    pub fn messages(&self, prompt: Prompt, instruction: &str) -> Vec<Message> {
        match (&self.feedback, prompt) {
            (Some(feedback), Prompt::Guided) => {
                guided_messages(&self.context, &self.reply, feedback, instruction)
            }
            _ => self.context.clone(),
        }
    }
}

/// Samples of one iteration.
pub type Drawn = (Iteration, Vec<Sample>);

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
    cases: &'a [Case],
    drawn: &'a [Drawn],
    held_out: &HeldOutSet,
) -> Result<Vec<Candidate<'a>>, TextError> {
    let own = drawn.last().map(|(iteration, _)| *iteration);
    let mut candidates = Vec::new();
    for (iteration, samples) in drawn {
        for (prompt, samples) in by_case(samples, cases.len())? {
            let case = &cases[prompt];
            let reply = |from| match from {
                Source::Corpus => Some(Reply::Corpus { text: &case.reply, origin: &case.origin }),
                Source::Sample(index) => {
                    let sample = samples.get(&index).copied()?;
                    Some(Reply::Drawn { iteration: *iteration, sample })
                }
            };
            if Some(*iteration) != own && held_out.contains(&case.context) {
                continue;
            }
            if let (Some(chosen), Some(rejected)) =
                (reply(method.chosen()), reply(method.rejected()))
            {
                candidates.push(Candidate { context: &case.context, chosen, rejected });
            }
        }
    }
    Ok(candidates)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
