//! An iteration's pairs, made from its samples; the same rows whenever they are made.

use anyhow::{Context, Result};

use super::Prepared;
use crate::domain::{Iteration, PairRow};
use crate::method::{Drawn, candidates};
use crate::store::Journal;
use crate::text::{self, PairCounts};

impl Prepared {
    /// The samples that an iteration's pairs are made of: its own, and those of as many
    /// iterations before it as the settings say.
    ///
    /// # Errors
    /// A journal that cannot be read.
    pub fn drawn(&self, journal: &Journal, k: Iteration) -> Result<Vec<Drawn>> {
        let first = (k.0 + 1).saturating_sub(self.pair_iterations).max(1);
        (first..=k.0)
            .map(Iteration)
            .map(|iteration| {
                let of = |what| format!("{what} of iteration {iteration}");
                let samples = journal.samples(iteration).with_context(|| of("samples"))?;
                let ratings = journal.ratings(iteration).with_context(|| of("ratings"))?;
                Ok(Drawn { iteration, samples, ratings })
            })
            .collect()
    }

    /// The pairs of an iteration: the warm start's from the seeds, later ones from samples
    /// as the method says.
    ///
    /// # Errors
    /// Text that the tokenizer or the chat template refuses.
    pub fn pairs(&self, k: Iteration, drawn: Vec<Drawn>) -> Result<(Vec<PairRow>, PairCounts)> {
        if k.0 == 0 {
            return Ok(text::seed_pairs(&self.text, &self.seeds, self.lengths, &self.held_out)?);
        }
        let cut = |drawn: Drawn| -> Result<Drawn> {
            let samples = text::cut_at_stops(&self.text, drawn.samples, &self.stop_strings)?;
            Ok(Drawn { samples, ..drawn })
        };
        let drawn: Vec<Drawn> = drawn.into_iter().map(cut).collect::<Result<_>>()?;
        let (rules, guidance) = (self.rules(), self.guidance);
        let candidates = candidates(rules, guidance, &self.cases, &drawn, &self.held_out)?;
        Ok(text::build_pairs(&self.text, &candidates, self.lengths, &self.held_out)?)
    }
}
