//! Sampling prompts as token ids, of all cases one behind the other.

use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::thread;

use anyhow::Result;

use crate::domain::PromptId;

/// Cases whose prompts are made together.
const BLOCK: usize = 16 << 10;

/// What replies are drawn from. Four bytes a token and eight a prompt: of a million
/// prompts, whatever more each had would be what fills the memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompts {
    ids: Vec<u32>,
    /// Where each prompt ends among them: of a case in the order of samples.
    ends: Vec<usize>,
    /// Samples that are drawn for a case, each from a prompt of its own.
    samples: usize,
}

impl Prompts {
    /// `samples` prompts of each of `cases`, made on all cores.
    ///
    /// # Errors
    /// The first of `prompt`'s, in the order of cases.
    pub(super) fn make<C: Sync>(
        cases: &[C],
        samples: usize,
        prompt: impl Fn(&C, usize) -> Result<Vec<u32>> + Sync,
    ) -> Result<Self> {
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let part = |cases: &[C]| -> Result<Self> {
            let mut part = Self { samples, ..Self::default() };
            for case in cases {
                for index in 0..samples {
                    part.ids.extend(prompt(case, index)?);
                    part.ends.push(part.ids.len());
                }
            }
            Ok(part)
        };
        let part = &part;
        let mut all = Self { samples, ..Self::default() };
        // A block at a time, so that nothing is in memory twice.
        for block in cases.chunks(BLOCK) {
            thread::scope(|scope| -> Result<()> {
                let parts = block.chunks(block.len().div_ceil(threads));
                let parts: Vec<_> = parts.map(|cases| scope.spawn(move || part(cases))).collect();
                for made in parts {
                    let made = made.join().unwrap_or_else(|panic| resume_unwind(panic))?;
                    let before = all.ids.len();
                    all.ids.extend(made.ids);
                    all.ends.extend(made.ends.iter().map(|end| before + end));
                }
                Ok(())
            })?;
        }
        all.ids.shrink_to_fit();
        Ok(all)
    }

    /// How many cases there are.
    pub fn cases(&self) -> usize {
        self.ends.len() / self.samples.max(1)
    }

    /// How many samples are drawn for each of them.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// What a sample of a case is drawn from.
    ///
    /// # Panics
    /// Where there is no such case, or sample.
    pub fn of(&self, case: PromptId, sample: usize) -> &[u32] {
        assert!(sample < self.samples, "{} samples are drawn for a case", self.samples);
        let at = case.0 as usize * self.samples + sample;
        let begin = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.ids[begin..self.ends[at]]
    }

    /// All prompts, in the order of cases and samples.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins.zip(&self.ends).map(|(begin, &end)| &self.ids[begin..end])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn prompt(case: &u32, sample: usize) -> Result<Vec<u32>> {
        anyhow::ensure!(*case < 1_000, "case {case}");
        Ok((0..case % 4).map(|n| 100 * case + 10 * sample as u32 + n).collect())
    }

    #[test]
    fn every_prompt_is_found_by_its_case_and_sample() {
        for count in [0, 1, 2, 7, 100] {
            let cases: Vec<u32> = (0..count).collect();
            let prompts = Prompts::make(&cases, 2, prompt).unwrap();
            assert_eq!((prompts.cases(), prompts.samples()), (cases.len(), 2));
            let expected: Vec<_> =
                cases.iter().flat_map(|c| [0, 1].map(|s| prompt(c, s).unwrap())).collect();
            assert_eq!(prompts.iter().collect::<Vec<_>>(), expected);
            for (at, expected) in expected.iter().enumerate() {
                assert_eq!(prompts.of(PromptId(at as u64 / 2), at % 2), expected);
            }
        }
    }

    #[test]
    fn of_several_errors_the_first_is_told() {
        let cases: Vec<u32> = (990..1_100).collect();
        let error = Prompts::make(&cases, 1, prompt).unwrap_err();
        assert_eq!(error.to_string(), "case 1000");
    }
}
