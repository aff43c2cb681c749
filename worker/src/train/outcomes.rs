//! From rows' log-probabilities to pairs' outcomes, and back to rows' coefficients.

use std::ops::Range;

use super::error::TrainError;
use super::head::RowScores;
use super::objective::{Scored, Share};
use super::packing::Packed;
use super::types::{MicroBatch, Objective, PairLogps, PairOutcome, TokenPair};

/// Outcomes of a micro-batch's pairs, and for each row the derivative of the
/// step's loss by its log-probability.
pub(super) fn evaluate(
    objective: &Objective,
    share: &Share,
    packed: &Packed,
    batch: &MicroBatch,
    scores: &RowScores,
) -> Result<(Vec<PairOutcome>, Vec<f32>), TrainError> {
    let mut outcomes = Vec::with_capacity(batch.pairs.len());
    let mut by_row = Vec::with_capacity(scores.logps.len());
    let logps = pair_logps(packed, batch, scores);
    for ((pair, logps), (chosen, rejected)) in batch.pairs.iter().zip(logps).zip(packed.replies()) {
        let reason = "it has no reference log-probabilities; score it before training";
        let missing = TrainError::Pair { pair: pair.pair, reason };
        let scored = Scored {
            logps,
            reference: pair.reference.ok_or(missing)?,
            chosen_tokens: chosen.len(),
            rejected_tokens: rejected.len(),
            logits_chosen: mean(&scores.mean_logits[chosen.clone()]),
            logits_rejected: mean(&scores.mean_logits[rejected.clone()]),
        };
        let (outcome, coefficients) = objective.evaluate(&scored, share);
        by_row.extend(chosen.map(|_| coefficients.chosen as f32));
        by_row.extend(rejected.map(|_| coefficients.rejected as f32));
        outcomes.push(outcome);
    }
    Ok((outcomes, by_row))
}

/// Log-probabilities of each pair's replies: sums over their rows.
pub(super) fn pair_logps(
    packed: &Packed,
    batch: &MicroBatch,
    scores: &RowScores,
) -> Vec<PairLogps> {
    let one = |(pair, (chosen, rejected)): (&TokenPair, (Range<usize>, Range<usize>))| PairLogps {
        pair: pair.pair,
        chosen: sum(&scores.logps[chosen]),
        rejected: sum(&scores.logps[rejected]),
    };
    batch.pairs.iter().zip(packed.replies()).map(one).collect()
}

fn sum(values: &[f32]) -> f64 {
    values.iter().copied().map(f64::from).sum()
}

fn mean(values: &[f32]) -> f64 {
    sum(values) / values.len() as f64
}
