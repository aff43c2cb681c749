//! From hidden states to log-probabilities of response tokens, and back.
//!
//! Logits exist for response tokens only, and for a bounded number of them at a
//! time; there is never a tensor of all tokens by the vocabulary.

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
pub(super) struct Head<'a> {
    policy: &'a Decoder,
    packed: &'a Packed,
    stop: &'a dyn Fn() -> bool,
}

impl<'a> Head<'a> {
    pub(super) fn new(policy: &'a Decoder, packed: &'a Packed, stop: &'a dyn Fn() -> bool) -> Self {
        Self { policy, packed, stop }
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
        let mean_weight = mean_row(&weight)?;
        let mean_logits = normed.f_to_kind(Kind::Float)?.f_mv(&mean_weight)?;
        let mut logps = Vec::new();
        for chunk in self.chunks() {
            self.check_stop()?;
            let logits = logits(&chunk.of(normed)?, &weight)?;
            let targets = chunk.of(&self.packed.targets)?;
            for rows in pieces(&logits) {
                logps.push(log_probabilities(&rows.of(&logits)?, &rows.of(&targets)?)?);
            }
        }
        let logps = Tensor::f_cat(&logps, 0)?.f_view([-1])?;
        let mut logps = host::read(&Tensor::f_cat(&[&logps, &mean_logits], 0)?)?;
        let mean_logits = logps.split_off(self.packed.rows as usize);
        Ok(RowScores { logps, mean_logits })
    }

    /// Gradient by the normed hidden states, `[rows, hidden]`, given that by each
    /// row's log-probability, `coefficients` (`[rows]`, fp32).
    ///
    /// The gradient by the head's weight goes to `add_to_weight` chunk by chunk and
    /// a few words at a time, as factors: for the words given, it is the product of
    /// `[words, rows of the chunk]` with `[rows of the chunk, hidden]`.
    pub(super) fn backward(
        &self,
        normed: &Tensor,
        coefficients: &Tensor,
        mut add_to_weight: impl FnMut(Rows, &Tensor, &Tensor) -> Result<(), TchError>,
    ) -> Result<Tensor, TrainError> {
        let weight = self.policy.head_weight().f_detach()?;
        let gradient = normed.f_empty_like()?;
        for chunk in self.chunks() {
            self.check_stop()?;
            let normed = chunk.of(normed)?;
            let logits = logits(&normed, &weight)?;
            let targets = chunk.of(&self.packed.targets)?;
            let coefficients = chunk.of(coefficients)?;
            for rows in pieces(&logits) {
                let piece = rows.of(&logits)?;
                let (targets, coefficients) = (rows.of(&targets)?, rows.of(&coefficients)?);
                // In place: from here on `logits` holds the gradient by them.
                rows.of(&logits)?.f_copy_(&by_logits(&piece, &targets, &coefficients)?)?;
            }
            chunk.of(&gradient)?.f_copy_(&by_normed(&logits, &weight)?)?;
            let by_word = logits.f_tr()?;
            for words in Rows::cover(by_word.size()[0], WORDS) {
                add_to_weight(words, &words.of(&by_word)?, &normed)?;
            }
        }
        Ok(gradient)
    }

    fn chunks(&self) -> impl Iterator<Item = Rows> + use<> {
        let weight = self.policy.head_weight();
        let kind = product_kind(weight.kind(), weight.device());
        let row_bytes = weight.size()[0] * kind.elt_size_in_bytes() as i64;
        Rows::cover(self.packed.rows, LOGITS_BYTES / row_bytes)
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

// `log_softmax` would do for both functions below, but on CPU it adds a row's
// exponentials up in a few running sums of fp32, where those of a large
// vocabulary's many unlikely tokens vanish: over SmolLM2's 49,152 the softmax sums
// to 1 + 7e-6, and gradients in which chosen and rejected nearly cancel are 1e-4
// off. `logsumexp` and `sum` add pairwise.

/// log π(target) of each row, `[rows, 1]`, in fp32.
fn log_probabilities(logits: &Tensor, targets: &Tensor) -> Result<Tensor, TchError> {
    let logits = logits.f_to_kind(Kind::Float)?;
    logits.f_gather(1, &targets.f_unsqueeze(1)?, false)?.f_sub(&logits.f_logsumexp(1, true)?)
}

/// c · (onehot(target) − softmax(logits)): the gradient of c · log π(target) by
/// the logits, in fp32.
fn by_logits(logits: &Tensor, targets: &Tensor, coefficients: &Tensor) -> Result<Tensor, TchError> {
    let logits = logits.f_to_kind(Kind::Float)?;
    let coefficients = coefficients.f_unsqueeze(1)?;
    let mut exponentials = logits.f_sub(&logits.f_amax(1, true)?)?.f_exp_()?;
    let sums = exponentials.f_sum_dim_intlist(1, true, Kind::Float)?;
    exponentials.f_mul_(&coefficients.f_neg()?.f_div_(&sums)?)?.f_scatter_add_(
        1,
        &targets.f_unsqueeze(1)?,
        &coefficients,
    )
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

        let logp = log_probabilities(&logits, &target).unwrap().double_value(&[0, 0]);
        // fp32 has steps of 1.9e-6 near 17.
        assert!((logp - expected).abs() < 2e-6, "{logp} {expected}");

        let gradient = by_logits(&logits, &target, &Tensor::from_slice(&[1f32])).unwrap();
        let by_target = gradient.double_value(&[0, 0]);
        assert!((by_target - -expected.exp_m1()).abs() < 1e-6, "{by_target} {expected}");
        let sum = gradient.sum(Kind::Double).double_value(&[]);
        assert!(sum.abs() < 1e-6, "probabilities sum to 1 - {sum:e}");
    }
}
