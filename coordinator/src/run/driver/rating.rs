//! What a reward model is to read of an iteration's samples, in batches; the same ones
//! whenever they are made.

use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::thread;

use anyhow::{Context, Result};
use tracing::warn;

use super::Prepared;
use crate::domain::{PromptId, Sample};
use crate::text::{self, RewardText, TextError};

/// A sample as the reward model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ratable {
    /// Of which prompt.
    pub prompt: PromptId,
    /// Which of its samples.
    pub index: u32,
    /// In the reward model's ids.
    pub tokens: Vec<u32>,
}

impl Prepared {
    /// Batches of at most `size` samples. The longest come first, so that workers end
    /// together, and those of a batch are of like length. What the reward model's chat
    /// template refuses is left out.
    ///
    /// # Errors
    /// Text that a tokenizer refuses, and samples of no prompt.
    pub fn rating_batches(&self, samples: Vec<Sample>, size: usize) -> Result<Vec<Vec<Ratable>>> {
        let reward = self.reward.as_ref().context("no reward model is loaded")?;
        let samples = text::cut_at_stops(&self.text, samples, &self.stop_strings)?;
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let part = |samples: &[Sample]| -> Result<Vec<Ratable>> {
            let ratable = samples.iter().map(|sample| self.ratable(reward, sample));
            ratable.filter_map(Result::transpose).collect()
        };
        let part = &part;
        let mut all = Vec::with_capacity(samples.len());
        thread::scope(|scope| -> Result<()> {
            let parts = samples.chunks(samples.len().div_ceil(threads).max(1));
            let parts: Vec<_> = parts.map(|samples| scope.spawn(move || part(samples))).collect();
            for made in parts {
                all.extend(made.join().unwrap_or_else(|panic| resume_unwind(panic))?);
            }
            Ok(())
        })?;
        if all.len() < samples.len() {
            let refused = samples.len() - all.len();
            warn!(refused, "replies that the reward model's chat template refuses are not rated");
        }
        all.sort_by_key(|one| (std::cmp::Reverse(one.tokens.len()), one.prompt, one.index));
        Ok(all.chunks(size).map(<[_]>::to_vec).collect())
    }

    fn ratable(&self, reward: &RewardText, sample: &Sample) -> Result<Option<Ratable>> {
        let Sample { prompt, index, .. } = *sample;
        let case = usize::try_from(prompt.0).ok().and_then(|case| self.cases.get(case));
        let prompts = self.cases.len();
        let case = case.ok_or(TextError::UnknownPrompt { prompt, index, prompts })?;
        let reply = self.text.decode(&self.text.sampled_response(sample, usize::MAX))?;
        match reward.sequence(&case.context, &reply) {
            Ok(tokens) => Ok(Some(Ratable { prompt, index, tokens })),
            Err(error) if error.is_refusal() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
