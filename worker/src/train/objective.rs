//! The step's loss and its gradient, given log-probabilities: plain numbers, no tensors.

mod preference;

use self::preference::LogRatios;
use super::types::{Objective, PairLogps, PairOutcome, ReferenceLogps, TrainStep};

/// A pair's log-probabilities with what else its outcome tells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scored {
    /// Sums over response tokens under the current weights.
    pub(super) logps: PairLogps,
    /// The same under π_ref.
    pub(super) reference: ReferenceLogps,
    /// Length of y⁺.
    pub(super) chosen_tokens: usize,
    /// Length of y⁻.
    pub(super) rejected_tokens: usize,
    /// Means of the logits over y⁺'s tokens and the vocabulary.
    pub(super) logits_chosen: f64,
    /// The same over y⁻'s.
    pub(super) logits_rejected: f64,
}

/// Derivatives of the step's loss by each token's log-probability: the same for
/// all tokens of a reply (DRIFT paper, Eq. 4).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Coefficients {
    /// For the tokens of y⁺.
    pub(super) chosen: f64,
    /// For the tokens of y⁻.
    pub(super) rejected: f64,
}

/// What the step's means are taken over: this rank's share as a whole, so that
/// it does not matter in how many passes it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    /// Pairs of the step over all ranks.
    pub(super) global_pairs: u32,
    /// Pairs of this rank's share.
    pub(super) pairs: usize,
    /// Tokens of the share's chosen replies.
    pub(super) chosen_tokens: usize,
}

impl Share {
    /// The share that `step` gives this rank.
    pub(super) fn of(step: &TrainStep) -> Self {
        let pairs = || step.micro_batches.iter().flat_map(|batch| &batch.pairs);
        Self {
            global_pairs: step.global_pairs,
            pairs: pairs().count(),
            chosen_tokens: pairs().map(|pair| pair.chosen.len()).sum(),
        }
    }
}

impl Objective {
    /// Outcome and coefficients of one pair of `share`.
    ///
    /// The step's loss is the mean over its `global_pairs` of each pair's
    /// preference loss, plus, for each rank, `rpo_alpha` times the negative
    /// log-likelihood of its chosen tokens, weighted by the rank's part of the
    /// pairs. That NLL is a mean over tokens; a pair's own part of it, such that
    /// parts average to the whole, is its NLL over the share's tokens per pair.
    pub(super) fn evaluate(&self, scored: &Scored, share: &Share) -> (PairOutcome, Coefficients) {
        let Self { loss, beta, rpo_alpha } = *self;
        let Scored { logps, reference, chosen_tokens, rejected_tokens, .. } = *scored;
        let chosen = logps.chosen - reference.chosen;
        let rejected = logps.rejected - reference.rejected;
        let ratios = LogRatios { chosen, rejected, chosen_tokens, rejected_tokens };
        let preference = loss.of(beta, &ratios);
        let by_nll = rpo_alpha * share.pairs as f64 / share.chosen_tokens as f64;

        let outcome = PairOutcome {
            pair: logps.pair,
            loss: preference.value - by_nll * logps.chosen,
            logp_chosen: logps.chosen,
            logp_rejected: logps.rejected,
            reward_chosen: beta * chosen,
            reward_rejected: beta * rejected,
            logits_chosen: scored.logits_chosen,
            logits_rejected: scored.logits_rejected,
        };
        let pairs = f64::from(share.global_pairs);
        let coefficients = Coefficients {
            chosen: (preference.by_chosen - by_nll) / pairs,
            rejected: preference.by_rejected / pairs,
        };
        (outcome, coefficients)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{MicroBatch, PreferenceLoss, TokenPair};

    fn objective(rpo_alpha: f64) -> Objective {
        Objective { loss: PreferenceLoss::Sigmoid, beta: 0.3, rpo_alpha }
    }

    fn scored(pair: u64, chosen: f64, rejected: f64, chosen_tokens: usize) -> Scored {
        Scored {
            logps: PairLogps { pair, chosen, rejected },
            reference: ReferenceLogps { chosen: -40.0, rejected: -50.0 },
            chosen_tokens,
            rejected_tokens: 5,
            logits_chosen: 0.0,
            logits_rejected: 0.0,
        }
    }

    #[test]
    fn a_policy_equal_to_its_reference_loses_exactly_ln_2() {
        let share = Share { global_pairs: 1, pairs: 1, chosen_tokens: 3 };
        let (outcome, _) = objective(0.0).evaluate(&scored(7, -40.0, -50.0, 3), &share);
        assert_eq!(outcome.pair, 7);
        assert_eq!(outcome.loss.to_bits(), std::f64::consts::LN_2.to_bits());
        assert_eq!((outcome.reward_chosen, outcome.reward_rejected), (0.0, 0.0));
    }

    #[test]
    fn coefficients_are_the_steps_derivatives() {
        // Two of five pairs are this rank's; moving one chosen token's
        // log-probability moves its reply's sum by as much.
        let share = Share { global_pairs: 5, pairs: 2, chosen_tokens: 4 + 9 };
        let loss = |chosen: f64, rejected: f64| {
            [scored(0, chosen, rejected, 4), scored(1, -41.0, -48.0, 9)]
                .map(|pair| objective(0.25).evaluate(&pair, &share).0.loss)
                .iter()
                .sum::<f64>()
                / 5.0
        };
        let (_, coefficients) = objective(0.25).evaluate(&scored(0, -38.0, -52.0, 4), &share);
        let h = 1e-5;
        let by_chosen = (loss(-38.0 + h, -52.0) - loss(-38.0 - h, -52.0)) / (2.0 * h);
        let by_rejected = (loss(-38.0, -52.0 + h) - loss(-38.0, -52.0 - h)) / (2.0 * h);
        assert!((coefficients.chosen - by_chosen).abs() < 1e-9, "{coefficients:?} {by_chosen}");
        assert!((coefficients.rejected - by_rejected).abs() < 1e-9, "{coefficients:?}");
    }

    #[test]
    fn likelihood_is_a_mean_over_the_shares_chosen_tokens() {
        let share = Share { global_pairs: 2, pairs: 2, chosen_tokens: 4 + 12 };
        let pairs = [scored(0, -8.0, -50.0, 4), scored(1, -40.0, -50.0, 12)];
        let mean = |rpo_alpha| {
            pairs.iter().map(|p| objective(rpo_alpha).evaluate(p, &share).0.loss).sum::<f64>() / 2.0
        };
        assert!((mean(0.5) - mean(0.0) - 0.5 * 48.0 / 16.0).abs() < 1e-12);
        // Per token, and the same for both replies: less what preference pulls.
        let pull =
            |rpo_alpha, at: usize| objective(rpo_alpha).evaluate(&pairs[at], &share).1.chosen;
        for at in 0..2 {
            assert!((pull(0.5, at) - pull(0.0, at) + 0.5 / 16.0).abs() < 1e-12);
        }
    }

    #[test]
    fn a_share_is_the_same_however_it_is_split() {
        let pair = |chosen: usize| TokenPair {
            pair: 0,
            prompt: vec![1],
            chosen: vec![2; chosen],
            rejected: vec![3],
            reference: None,
        };
        let step = |micro_batches: Vec<MicroBatch>| TrainStep {
            step: 0,
            learning_rate: 0.0,
            global_pairs: 9,
            micro_batches,
        };
        let pairs = [pair(3), pair(4), pair(1)];
        let whole = step(vec![MicroBatch { pairs: pairs.to_vec() }]);
        let split = step(pairs.map(|pair| MicroBatch { pairs: vec![pair] }).to_vec());
        assert_eq!(Share::of(&whole), Share { global_pairs: 9, pairs: 3, chosen_tokens: 8 });
        assert_eq!(Share::of(&whole), Share::of(&split));
    }
}
