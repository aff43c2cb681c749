//! From rows' log-probabilities to pairs' outcomes, and back to rows' coefficients.

use std::ops::Range;

use super::error::TrainError;
use super::head::RowScores;
use super::objective::{Scored, Share};
use super::types::{Objective, PairLogps, PairOutcome, TokenPair};

/// Outcomes of `pairs`, and for each of their rows the derivative of the
/// step's loss by its log-probability.
pub(super) fn evaluate(
    objective: &Objective,
    share: &Share,
    pairs: &[TokenPair],
    scores: &RowScores,
) -> Result<(Vec<PairOutcome>, Vec<f32>), TrainError> {
    let mut outcomes = Vec::with_capacity(pairs.len());
    let mut by_row = Vec::with_capacity(scores.logps.len());
    let logps = pair_logps(pairs, scores);
    for ((pair, logps), (chosen, rejected)) in pairs.iter().zip(logps).zip(replies(pairs)) {
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
pub(super) fn pair_logps(pairs: &[TokenPair], scores: &RowScores) -> Vec<PairLogps> {
    let one = |(pair, (chosen, rejected)): (&TokenPair, (Range<usize>, Range<usize>))| PairLogps {
        pair: pair.pair,
        chosen: sum(&scores.logps[chosen]),
        rejected: sum(&scores.logps[rejected]),
    };
    pairs.iter().zip(replies(pairs)).map(one).collect()
}

/// Rows of each pair's y⁺ and y⁻.
fn replies(pairs: &[TokenPair]) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
    pairs.iter().scan(0, |next, pair| {
        let start = *next;
        let middle = start + pair.chosen.len();
        *next = middle + pair.rejected.len();
        Some((start..middle, middle..*next))
    })
}

fn sum(values: &[f32]) -> f64 {
    values.iter().copied().map(f64::from).sum()
}

fn mean(values: &[f32]) -> f64 {
    sum(values) / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_of_pairs_one_after_another() {
        let pair = |chosen: usize, rejected: usize| TokenPair {
            pair: 3,
            prompt: vec![10],
            chosen: vec![20; chosen],
            rejected: vec![30; rejected],
            reference: None,
        };
        let rows: Vec<_> = replies(&[pair(3, 1), pair(1, 2)]).collect();
        assert_eq!(rows, [(0..3, 3..4), (4..5, 5..7)]);
    }
}
