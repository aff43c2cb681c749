//! An iteration's pairs, made from its samples; the same rows whenever they are made.

use anyhow::Result;

use super::Prepared;
use crate::domain::{Iteration, PairRow, Sample};
use crate::text::{self, PairCounts};

impl Prepared {
    /// The pairs of an iteration: the warm start's from the seeds, later ones from
    /// `samples` and the replies that disappointed.
    ///
    /// # Errors
    /// Text that the tokenizer or the chat template refuses.
    pub fn pairs(&self, k: Iteration, samples: &[Sample]) -> Result<(Vec<PairRow>, PairCounts)> {
        let built = if k.0 == 0 {
            text::seed_pairs(&self.text, &self.seeds, self.lengths, &self.held_out)?
        } else {
            let samples = text::cut_at_stops(&self.text, samples.to_vec(), &self.stop_strings)?;
            text::drift_pairs(&self.text, &self.dsat, &samples, self.lengths, &self.held_out)?
        };
        Ok(built)
    }
}
