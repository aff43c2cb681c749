//! From hidden states to log-probabilities of response tokens, and back.
//!
//! Logits exist for response tokens only, and for a bounded number of them at a
//! time; there is never a tensor of all tokens by the vocabulary.

use std::ops::Range;

use tch::{Kind, TchError, Tensor};

use super::error::TrainError;
use super::packing::{Packed, Rows};
use crate::host;
use crate::model::Decoder;
use crate::model::ops::{operand, product_kind};

/// Logits in existence at once, in bytes of the kind that matrices are multiplied in.
const LOGITS_BYTES: i64 = 64 << 20;

/// fp32 logits in existence at once, in bytes: few enough to stay in cache
/// while the softmax passes over them.
const SOFTMAX_BYTES: i64 = 4 << 20;

/// Words of the vocabulary at once, where the head's weight is made into anything else.
const WORDS: i64 = 1 << 13;

/// What the head says of each row (see [`Packed`]).
#[derive(Debug, Default)]
pub(super) struct RowScores {
    /// Log-probability of the row's token, in nats.
    pub(super) logps: Vec<f32>,
    /// Mean of the row's logits over the vocabulary.
    pub(super) mean_logits: Vec<f32>,
}

/// The head over one micro-batch's rows.
///
/// With e = exp(logit − m), m the largest of a row and Σ the sum of its e's:
///
/// ```text
/// log π(t) = logit(t) − m − ln Σ        ∂ log π(t) / ∂ logits = onehot(t) − e/Σ = −(e − Σ onehot(t)) / Σ
/// ```
///
/// So a row's e's, of which the target's is less by Σ, are its gradient but for one factor, −c/Σ with
/// c that by log π(t). c is known when all of a pair is scored. Pairs are taken together as
/// long as e's of all their rows may exist at once, and nothing is computed twice; of a
/// longer pair all chunks but the last are computed again.
pub(super) struct Head<'a> {
    policy: &'a Decoder,
    packed: &'a Packed,
    stop: &'a dyn Fn() -> bool,
    /// Rows whose logits may exist at once.
    pub(super) most_rows: i64,
}

/// Pairs that follow one another, and their rows.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    pairs: Range<usize>,
    rows: Rows,
}

impl<'a> Head<'a> {
    pub(super) fn new(policy: &'a Decoder, packed: &'a Packed, stop: &'a dyn Fn() -> bool) -> Self {
        let weight = policy.head_weight();
        let kind = product_kind(weight.kind(), weight.device());
        let row_bytes = weight.size()[0] * kind.elt_size_in_bytes() as i64;
        Self { policy, packed, stop, most_rows: LOGITS_BYTES / row_bytes }
    }

    /// The hidden states that predict rows: `[tokens, hidden]` → `[rows, hidden]`.
    pub(super) fn select(&self, hidden: &Tensor) -> Result<Tensor, TchError> {
        hidden.f_index_select(0, &self.packed.predictors)
    }

    /// Gradient by all hidden states, given that by the selected ones.
    pub(super) fn spread(&self, gradient: &Tensor) -> Result<Tensor, TchError> {
        let shape = [self.packed.tokens, gradient.size()[1]];
        Tensor::f_zeros(shape, (gradient.kind(), gradient.device()))?
            // The prompt's last token stands twice: it predicts both replies.
            .f_index_add_(0, &self.packed.predictors, gradient)
    }

    /// Scores of all rows, given their normed hidden states, `[rows, hidden]`.
    pub(super) fn scores(&self, normed: &Tensor) -> Result<RowScores, TrainError> {
        let weight = self.policy.head_weight().f_detach()?;
        let mut logps = Vec::new();
        for group in self.groups() {
            for chunk in self.chunks(&group) {
                self.check_stop()?;
                let logits = logits(&chunk.of(normed)?, &weight)?;
                let targets = chunk.of(&self.packed.targets)?;
                for rows in pieces(&logits) {
                    logps.push(Softmax::of(&rows.of(&logits)?, &rows.of(&targets)?)?.logps);
                }
            }
        }
        row_scores(&logps, normed, &mean_row(&weight)?)
    }

    /// Gradient by the normed hidden states, `[rows, hidden]`. `evaluate` is told pairs and the
    /// scores of their rows, as [`Self::scores`] has them, and answers with the derivatives of
    /// the loss by each row's log-probability.
    ///
    /// The gradient by the head's weight goes to `add_to_weight` chunk by chunk and
    /// a few words at a time, as factors: for the words given, it is the product of
    /// `[words, rows of the chunk]` with `[rows of the chunk, hidden]`, both of the kind in
    /// which matrices are multiplied.
    pub(super) fn backward(
        &self,
        normed: &Tensor,
        mut evaluate: impl FnMut(Range<usize>, &RowScores) -> Result<Vec<f32>, TrainError>,
        mut add_to_weight: impl FnMut(Rows, &Tensor, &Tensor) -> Result<(), TchError>,
    ) -> Result<Tensor, TrainError> {
        let weight = self.policy.head_weight().f_detach()?;
        let mean_weight = mean_row(&weight)?;
        let gradient = normed.f_empty_like()?;
        for group in self.groups() {
            let chunks = self.chunks(&group);
            let (mut logps, mut last) = (Vec::new(), None);
            for &chunk in &chunks {
                // The one before goes ahead of it.
                drop(last.take());
                let softmax = self.softmax(chunk, normed, &weight)?;
                logps.push(softmax.logps.shallow_clone());
                last = Some(softmax);
            }
            let scores = row_scores(&logps, &group.rows.of(normed)?, &mean_weight)?;
            let coefficients = evaluate(group.pairs, &scores)?;
            let coefficients = host::upload(&coefficients, normed.device())?.f_unsqueeze(1)?;
            for &chunk in chunks.iter().rev() {
                self.check_stop()?;
                let softmax = match last.take() {
                    Some(softmax) => softmax,
                    None => self.softmax(chunk, normed, &weight)?,
                };
                let in_group = Rows { start: chunk.start - group.rows.start, ..chunk };
                let factor = in_group.of(&coefficients)?.f_neg()?.f_div(&softmax.sums)?;
                let by_normed = by_normed(&softmax.exponentials, &weight)?.f_mul(&factor)?;
                chunk.of(&gradient)?.f_copy_(&by_normed)?;
                let by_word = softmax.exponentials.f_tr()?;
                let normed = chunk.of(normed)?.f_mul(&factor)?.f_to_kind(by_word.kind())?;
                for words in Rows::cover(by_word.size()[0], WORDS) {
                    add_to_weight(words, &words.of(&by_word)?, &normed)?;
                }
            }
        }
        Ok(gradient)
    }

    /// Of the rows `chunk`, with the targets' exponentials less the sums.
    fn softmax(
        &self,
        chunk: Rows,
        normed: &Tensor,
        weight: &Tensor,
    ) -> Result<Softmax, TrainError> {
        self.check_stop()?;
        let logits = logits(&chunk.of(normed)?, weight)?;
        let targets = chunk.of(&self.packed.targets)?;
        let (mut sums, mut logps) = (Vec::new(), Vec::new());
        for rows in pieces(&logits) {
            let (piece, targets) = (rows.of(&logits)?, rows.of(&targets)?);
            let softmax = Softmax::of(&piece, &targets)?;
            // In place: from here on `logits` holds exponentials.
            rows.of(&logits)?.f_copy_(&softmax.less_sums_at(&targets)?)?;
            sums.push(softmax.sums);
            logps.push(softmax.logps);
        }
        let [sums, logps] = [sums, logps].map(|parts| Tensor::f_cat(&parts, 0));
        Ok(Softmax { exponentials: logits, sums: sums?, logps: logps? })
    }

    /// As many pairs at once as have logits within the bound, and at least one.
    fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        let mut start = 0;
        for (pair, span) in self.packed.spans.iter().enumerate() {
            let length = span.chosen + span.rejected;
            match groups.last_mut() {
                Some(group) if group.rows.length + length <= self.most_rows => {
                    group.pairs.end += 1;
                    group.rows.length += length;
                }
                _ => groups.push(Group { pairs: pair..pair + 1, rows: Rows { start, length } }),
            }
            start += length;
        }
        groups
    }

    fn chunks(&self, group: &Group) -> Vec<Rows> {
        let Rows { start, length } = group.rows;
        let chunk = |rows: Rows| Rows { start: start + rows.start, ..rows };
        Rows::cover(length, self.most_rows).map(chunk).collect()
    }

    fn check_stop(&self) -> Result<(), TrainError> {
        if (self.stop)() { Err(TrainError::Stopped) } else { Ok(()) }
    }
}

/// `normed` (`[rows, hidden]`) times `weight`ᵀ (`[vocab, hidden]`), `[rows, vocab]`, in
/// the kind in which matrices are multiplied. A weight that must be widened for it is so
/// a few words at a time.
fn logits(normed: &Tensor, weight: &Tensor) -> Result<Tensor, TchError> {
    let kind = product_kind(weight.kind(), weight.device());
    if kind == weight.kind() {
        return normed.f_matmul(&weight.f_tr()?);
    }
    let normed = operand(normed)?;
    let words = weight.size()[0];
    let logits = Tensor::f_empty([normed.size()[0], words], (kind, weight.device()))?;
    for words in Rows::cover(words, WORDS) {
        let some = operand(&words.of(weight)?)?.f_tr()?;
        let _ = normed.f_matmul_out(&logits.f_narrow(1, words.start, words.length)?, &some)?;
    }
    Ok(logits)
}

/// `by_logits` (`[rows, vocab]`) times `weight` (`[vocab, hidden]`), `[rows, hidden]`.
fn by_normed(by_logits: &Tensor, weight: &Tensor) -> Result<Tensor, TchError> {
    if by_logits.kind() == weight.kind() {
        return by_logits.f_matmul(weight);
    }
    let shape = [by_logits.size()[0], weight.size()[1]];
    let mut sum = Tensor::f_zeros(shape, (by_logits.kind(), weight.device()))?;
    for words in Rows::cover(weight.size()[0], WORDS) {
        let some = by_logits.f_narrow(1, words.start, words.length)?;
        let _ = sum.f_addmm_(&some, &operand(&words.of(weight)?)?)?;
    }
    Ok(sum)
}

/// Mean of `weight`'s rows, `[hidden]`, in fp32, without making all of it fp32.
fn mean_row(weight: &Tensor) -> Result<Tensor, TchError> {
    let (words, hidden) = weight.size2()?;
    let mut sum = Tensor::f_zeros([hidden], (Kind::Float, weight.device()))?;
    for rows in Rows::cover(words, WORDS) {
        let _ = sum.f_add_(&rows.of(weight)?.f_sum_dim_intlist(0, false, Kind::Float)?)?;
    }
    sum.f_div_scalar_(words as f64)
}

/// `logits` in pieces whose fp32 copy stays in cache.
fn pieces(logits: &Tensor) -> impl Iterator<Item = Rows> + use<> {
    let (rows, vocabulary) = (logits.size()[0], logits.size()[1]);
    Rows::cover(rows, SOFTMAX_BYTES / (4 * vocabulary))
}

/// Scores of rows whose log-probabilities are `logps`, in pieces, given their normed hidden
/// states and the mean row of the head's weight.
fn row_scores(
    logps: &[Tensor],
    normed: &Tensor,
    mean_weight: &Tensor,
) -> Result<RowScores, TrainError> {
    let mean_logits = normed.f_to_kind(Kind::Float)?.f_mv(mean_weight)?;
    let logps = Tensor::f_cat(logps, 0)?.f_view([-1])?;
    let mut logps = host::read(&Tensor::f_cat(&[&logps, &mean_logits], 0)?)?;
    let mean_logits = logps.split_off(normed.size()[0] as usize);
    Ok(RowScores { logps, mean_logits })
}

/// Rows' softmax, not divided yet, and what it says of their targets.
struct Softmax {
    /// e, `[rows, vocab]`.
    exponentials: Tensor,
    /// Σ, `[rows, 1]`, fp32.
    sums: Tensor,
    /// log π(target), `[rows, 1]`, fp32.
    logps: Tensor,
}

impl Softmax {
    // `log_softmax` would do, but on CPU it adds a row's exponentials up in a few running
    // sums of fp32, where those of a large vocabulary's many unlikely tokens vanish: over
    // SmolLM2's 49,152 the softmax sums to 1 + 7e-6, and gradients in which chosen and
    // rejected nearly cancel are 1e-4 off. `sum` adds pairwise.

    /// Of `logits` (`[rows, vocab]`), in fp32: where they are that already, in place.
    fn of(logits: &Tensor, targets: &Tensor) -> Result<Self, TchError> {
        let mut logits = logits.f_to_kind(Kind::Float)?;
        let of_targets = logits.f_gather(1, &targets.f_unsqueeze(1)?, false)?;
        let largest = logits.f_amax(1, true)?;
        let exponentials = logits.f_sub_(&largest)?.f_exp_()?;
        let sums = exponentials.f_sum_dim_intlist(1, true, Kind::Float)?;
        let logps = of_targets.f_sub(&largest)?.f_sub(&sums.f_log()?)?;
        Ok(Self { exponentials, sums, logps })
    }

    /// Its exponentials, those of `targets` (`[rows]`) less the sums: by what π(target)
    /// leaves to all others, so that a likely target costs no digits.
    fn less_sums_at(&self, targets: &Tensor) -> Result<Tensor, TchError> {
        let others = self.logps.f_expm1()?.f_mul_(&self.sums)?;
        self.exponentials.shallow_clone().f_scatter_(1, &targets.f_unsqueeze(1)?, &others)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn unlikely_tokens_of_a_large_vocabulary_count() {
        // One logit of 17 among zeros: each other token has 4e-8, all together 0.2 %.
        let vocabulary = 49_152;
        let logits = Tensor::zeros([1, vocabulary], (Kind::Float, tch::Device::Cpu));
        let _ = logits.narrow(1, 0, 1).fill_(17.0);
        let target = Tensor::from_slice(&[0i64]);
        let expected = -((vocabulary - 1) as f64 * (-17f64).exp()).ln_1p();

        let softmax = Softmax::of(&logits, &target).unwrap();
        let logp = softmax.logps.double_value(&[0, 0]);
        // fp32 has steps of 1.9e-6 near 17.
        assert!((logp - expected).abs() < 2e-6, "{logp} {expected}");

        let gradient = softmax.less_sums_at(&target).unwrap() / -softmax.sums;
        let by_target = gradient.double_value(&[0, 0]);
        assert!((by_target - -expected.exp_m1()).abs() < 1e-6, "{by_target} {expected}");
        let sum = gradient.sum(Kind::Double).double_value(&[]);
        assert!(sum.abs() < 1e-6, "probabilities sum to 1 - {sum:e}");
    }
}
