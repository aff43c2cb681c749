//! Sampling prompts as token ids, of all cases one behind the other.

use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::thread;

use anyhow::Result;

use crate::domain::PromptId;

/// Cases whose prompts are made together.
const BLOCK: usize = 16 << 10;

/// What replies are drawn from. Of a million prompts each byte counts: ids are kept as
/// the wire has them, seven bits a byte, so that most take two.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompts {
    bytes: Vec<u8>,
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
                    prompt(case, index)?.into_iter().for_each(|id| put(&mut part.bytes, id));
                    part.ends.push(part.bytes.len());
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
                    let before = all.bytes.len();
                    all.bytes.extend(made.bytes);
                    all.ends.extend(made.ends.iter().map(|end| before + end));
                }
                Ok(())
            })?;
        }
        all.bytes.shrink_to_fit();
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
    pub fn of(&self, case: PromptId, sample: usize) -> Vec<u32> {
        assert!(sample < self.samples, "{} samples are drawn for a case", self.samples);
        let at = case.0 as usize * self.samples + sample;
        let begin = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        ids(&self.bytes[begin..self.ends[at]])
    }

    /// All prompts, in the order of cases and samples.
    pub fn iter(&self) -> impl Iterator<Item = Vec<u32>> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins.zip(&self.ends).map(|(begin, &end)| ids(&self.bytes[begin..end]))
    }
}

/// Writes an id, its lowest bits first; the eighth bit says that more follow.
fn put(bytes: &mut Vec<u8>, mut id: u32) {
    while id >= 0x80 {
        bytes.push(id as u8 | 0x80);
        id >>= 7;
    }
    bytes.push(id as u8);
}

/// Reads what [`put`] wrote.
fn ids(bytes: &[u8]) -> Vec<u32> {
    let mut ids = Vec::with_capacity(bytes.len());
    let (mut id, mut shift) = (0, 0);
    for byte in bytes {
        id |= u32::from(byte & 0x7F) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            ids.push(id);
            (id, shift) = (0, 0);
        }
    }
    ids
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
                assert_eq!(prompts.of(PromptId(at as u64 / 2), at % 2), *expected);
            }
        }
    }

    #[test]
    fn ids_of_any_size_are_read_as_they_were_written() {
        let all = [0, 1, 127, 128, 16_383, 16_384, 151_643, 1 << 28, u32::MAX];
        let mut bytes = Vec::new();
        all.into_iter().for_each(|id| put(&mut bytes, id));
        assert_eq!(ids(&bytes), all);
        assert_eq!(bytes.len(), 3 + 2 * 2 + 2 * 3 + 2 * 5);
    }

    #[test]
    fn of_several_errors_the_first_is_told() {
        let cases: Vec<u32> = (990..1_100).collect();
        let error = Prompts::make(&cases, 1, prompt).unwrap_err();
        assert_eq!(error.to_string(), "case 1000");
    }
}
