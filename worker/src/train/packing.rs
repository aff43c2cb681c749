//! A micro-batch laid out for computing: `[x, y⁺, y⁻]` of each pair after one another.

use tch::{Device, Kind, TchError, Tensor};

use super::error::TrainError;
use super::masks::PairMasks;
use super::types::{MicroBatch, TokenPair};
use crate::host;
use crate::model::ops::product_kind;

/// Where a pair's tokens stand among the packed ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// Packed index of x's first token.
    pub(super) start: i64,
    /// Length of x.
    pub(super) prompt: i64,
    /// Length of y⁺.
    pub(super) chosen: i64,
    /// Length of y⁻.
    pub(super) rejected: i64,
}

/// Rows that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rows {
    /// The first.
    pub(super) start: i64,
    /// How many.
    pub(super) length: i64,
}

impl Rows {
    /// `rows` in as few pieces of at most `length` as can be, about equally long.
    pub(super) fn cover(rows: i64, length: i64) -> impl Iterator<Item = Self> {
        let pieces = (rows as u64).div_ceil(length.max(1) as u64).max(1);
        let length = (rows as u64).div_ceil(pieces).max(1) as i64;
        (0..rows)
            .step_by(length as usize)
            .map(move |start| Self { start, length: length.min(rows - start) })
    }

    /// These rows of `tensor`: a view.
    pub(super) fn of(self, tensor: &Tensor) -> Result<Tensor, TchError> {
        tensor.f_narrow(0, self.start, self.length)
    }
}

impl Span {
    /// x.
    pub(super) fn prompt(&self) -> Rows {
        Rows { start: self.start, length: self.prompt }
    }

    /// x and y⁺.
    pub(super) fn with_chosen(&self) -> Rows {
        Rows { start: self.start, length: self.prompt + self.chosen }
    }

    /// y⁻.
    pub(super) fn rejected(&self) -> Rows {
        Rows { start: self.start + self.prompt + self.chosen, length: self.rejected }
    }
}

/// The tensors and index lists of one micro-batch.
///
/// "Rows" are response tokens: of each pair, y⁺'s and then y⁻'s. Row r stands
/// for the prediction of `targets[r]` from the hidden state at `predictors[r]`.
#[derive(Debug)]
pub(super) struct Packed {
    /// Each pair's place.
    pub(super) spans: Vec<Span>,
    /// Token ids, `[tokens]`, i64.
    pub(super) ids: Tensor,
    /// Positions, `[tokens]`, i64; those of y⁻ continue from x.
    pub(super) positions: Tensor,
    /// What each pair's queries may not see.
    pub(super) masks: Vec<PairMasks>,
    /// Packed index of the hidden state that predicts a row, `[rows]`, i64.
    pub(super) predictors: Tensor,
    /// Token id to be predicted, `[rows]`, i64.
    pub(super) targets: Tensor,
    /// Packed tokens.
    pub(super) tokens: i64,
    /// Ids again, on the host.
    pub(super) host_ids: Vec<i64>,
}

impl Packed {
    /// Lays `batch` out on `device`, for computing in `kind`. `window` is that of the model's
    /// blocks that have one.
    pub(super) fn new(
        batch: &MicroBatch,
        window: Option<i64>,
        kind: Kind,
        device: Device,
    ) -> Result<Self, TchError> {
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let (mut predictors, mut targets) = (Vec::new(), Vec::new());
        let (mut spans, mut masks) = (Vec::new(), Vec::new());
        for pair in &batch.pairs {
            let span = Span {
                start: ids.len() as i64,
                prompt: pair.prompt.len() as i64,
                chosen: pair.chosen.len() as i64,
                rejected: pair.rejected.len() as i64,
            };
            positions.extend(0..span.prompt + span.chosen);
            positions.extend(span.prompt..span.prompt + span.rejected);
            for tokens in [&pair.prompt, &pair.chosen, &pair.rejected] {
                ids.extend(tokens.iter().copied().map(i64::from));
            }
            let last_of_prompt = span.start + span.prompt - 1;
            let rejected_start = last_of_prompt + 1 + span.chosen;
            predictors.extend(last_of_prompt..last_of_prompt + span.chosen);
            if span.rejected > 0 {
                predictors.push(last_of_prompt);
                predictors.extend(rejected_start..rejected_start + span.rejected - 1);
            }
            targets.extend(pair.chosen.iter().chain(&pair.rejected).copied().map(i64::from));
            masks.push(PairMasks::new(&span, window, product_kind(kind, device), device)?);
            spans.push(span);
        }
        let tensor = |values: &[i64]| host::upload(values, device);
        Ok(Self {
            ids: tensor(&ids)?,
            positions: tensor(&positions)?,
            predictors: tensor(&predictors)?,
            targets: tensor(&targets)?,
            tokens: ids.len() as i64,
            host_ids: ids,
            spans,
            masks,
        })
    }
}

/// What pairs are computed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Log-probabilities alone: without y⁻ they are those of one reply.
    Scoring,
    /// Gradients, which need both replies.
    Training,
}

/// Checks what the engine takes for granted: replies and prompts that are not
/// empty, and ids within the vocabulary.
pub(super) fn check(
    batches: &[MicroBatch],
    vocabulary: i64,
    purpose: Purpose,
) -> Result<(), TrainError> {
    for (index, batch) in batches.iter().enumerate() {
        if batch.pairs.is_empty() {
            return Err(TrainError::EmptyMicroBatch { index });
        }
        for pair in &batch.pairs {
            check_pair(pair, vocabulary, purpose)?;
        }
    }
    Ok(())
}

fn check_pair(pair: &TokenPair, vocabulary: i64, purpose: Purpose) -> Result<(), TrainError> {
    let empty = |reason| Err(TrainError::Pair { pair: pair.pair, reason });
    if pair.prompt.is_empty() {
        return empty("the prompt is empty, so nothing predicts the replies' first tokens");
    }
    if pair.chosen.is_empty() {
        return empty("the chosen reply is empty; leave the pair out");
    }
    if pair.rejected.is_empty() && purpose == Purpose::Training {
        return empty("the rejected reply is empty; leave the pair out");
    }
    let mut ids = pair.prompt.iter().chain(&pair.chosen).chain(&pair.rejected);
    match ids.find(|&&id| i64::from(id) >= vocabulary) {
        Some(&id) => Err(TrainError::TokenId { pair: pair.pair, id, vocabulary }),
        None => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> TokenPair {
        let [prompt, chosen, rejected] = [prompt, chosen, rejected].map(<[u32]>::to_vec);
        TokenPair { pair: 3, prompt, chosen, rejected, reference: None }
    }

    fn host(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn two_pairs_are_laid_out_without_padding() {
        let batch = MicroBatch {
            pairs: vec![pair(&[10, 11], &[20, 21, 22], &[30]), pair(&[12], &[23], &[31, 32])],
        };
        let packed = Packed::new(&batch, None, Kind::Float, Device::Cpu).unwrap();
        assert_eq!(host(&packed.ids), [10, 11, 20, 21, 22, 30, 12, 23, 31, 32]);
        assert_eq!(packed.host_ids, host(&packed.ids));
        assert_eq!(host(&packed.positions), [0, 1, 2, 3, 4, 2, 0, 1, 1, 2]);
        assert_eq!(host(&packed.targets), [20, 21, 22, 30, 23, 31, 32]);
        // Both replies' first tokens come from the prompt's last.
        assert_eq!(host(&packed.predictors), [1, 2, 3, 1, 6, 6, 8]);
        assert_eq!(packed.tokens, 10);
    }

    #[test]
    fn what_cannot_be_computed_is_refused_by_name() {
        let batch = |pair| [MicroBatch { pairs: vec![pair] }];
        let (scoring, training) = (Purpose::Scoring, Purpose::Training);
        let reason = |pair| check(&batch(pair), 40, training).unwrap_err().to_string();
        assert!(reason(pair(&[], &[1], &[1])).starts_with("pair 3: the prompt is empty"));
        assert!(reason(pair(&[1], &[], &[1])).starts_with("pair 3: the chosen reply is empty"));
        assert!(reason(pair(&[1], &[1], &[])).starts_with("pair 3: the rejected reply is empty"));
        assert!(reason(pair(&[1], &[40], &[1])).contains("token id 40 is outside"));
        check(&batch(pair(&[1], &[39], &[1])), 40, training).unwrap();
        check(&batch(pair(&[1], &[39], &[])), 40, scoring).unwrap();
        let none = check(&[MicroBatch::default()], 40, scoring).unwrap_err();
        assert!(matches!(none, TrainError::EmptyMicroBatch { index: 0 }));
    }
}
