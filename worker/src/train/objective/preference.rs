//! From a pair's log-ratios to its loss and the derivatives.

use crate::train::types::PreferenceLoss;

/// A pair's log-ratios Δ = log π − log π_ref: sums over response tokens, in
/// nats, and over how many tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogRatios {
    /// Δ⁺, of y⁺.
    pub(super) chosen: f64,
    /// Δ⁻, of y⁻.
    pub(super) rejected: f64,
    /// |y⁺|.
    pub(super) chosen_tokens: usize,
    /// |y⁻|.
    pub(super) rejected_tokens: usize,
}

/// A pair's loss, and its derivatives by the log-probabilities of the replies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct PairLoss {
    /// The loss itself.
    pub(super) value: f64,
    /// By log π(y⁺|x).
    pub(super) by_chosen: f64,
    /// By log π(y⁻|x).
    pub(super) by_rejected: f64,
}

impl PreferenceLoss {
    /// The loss of a pair. Each of the losses is a function of one difference,
    /// w⁺Δ⁺ − w⁻Δ⁻, where the weights are 1, or 1/|y| where tokens are averaged.
    pub(super) fn of(self, beta: f64, ratios: &LogRatios) -> PairLoss {
        let [chosen_weight, rejected_weight] = match self {
            Self::Sigmoid | Self::Hinge | Self::Robust { .. } => [1.0, 1.0],
            Self::Ipo | Self::SigmoidNorm => {
                [ratios.chosen_tokens, ratios.rejected_tokens].map(|tokens| 1.0 / tokens as f64)
            }
        };
        let difference = chosen_weight * ratios.chosen - rejected_weight * ratios.rejected;
        let (value, slope) = self.at(beta, difference);
        PairLoss { value, by_chosen: slope * chosen_weight, by_rejected: -slope * rejected_weight }
    }

    /// Loss and slope at a difference of log-ratios.
    fn at(self, beta: f64, difference: f64) -> (f64, f64) {
        let s = beta * difference;
        match self {
            Self::Sigmoid | Self::SigmoidNorm => (softplus(-s), -beta * sigmoid(-s)),
            Self::Hinge => hinge(beta, s),
            Self::Ipo => {
                let miss = difference - 1.0 / (2.0 * beta);
                (miss * miss, 2.0 * miss)
            }
            Self::Robust { label_smoothing } => {
                let (kept, flipped) = (1.0 - label_smoothing, label_smoothing);
                let unbias = 1.0 / (kept - flipped);
                let value = kept * softplus(-s) - flipped * softplus(s);
                let slope = -beta * (kept * sigmoid(-s) + flipped * sigmoid(s));
                (value * unbias, slope * unbias)
            }
        }
    }
}

/// max(0, 1 − s) and its slope: 0 at the kink, as `torch.relu` has it.
fn hinge(beta: f64, s: f64) -> (f64, f64) {
    let slack = 1.0 - s;
    if slack.is_nan() {
        // The bounds below would turn a broken pair into one that has nothing to learn.
        (slack, slack)
    } else if slack > 0.0 {
        (slack, -beta)
    } else {
        (0.0, 0.0)
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// log(1 + eˣ), without overflow; exactly ln 2 at 0.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use std::f64::consts::LN_2;

    use super::*;

    const LOSSES: [PreferenceLoss; 6] = [
        PreferenceLoss::Sigmoid,
        PreferenceLoss::Hinge,
        PreferenceLoss::Ipo,
        PreferenceLoss::Robust { label_smoothing: 0.0 },
        PreferenceLoss::Robust { label_smoothing: 0.2 },
        PreferenceLoss::SigmoidNorm,
    ];

    fn ratios(chosen: f64, rejected: f64) -> LogRatios {
        LogRatios { chosen, rejected, chosen_tokens: 4, rejected_tokens: 7 }
    }

    #[test]
    fn derivatives_are_the_losss() {
        let h = 1e-5;
        // On both sides of hinge's kink, which s = 0.3 (Δ⁺ − Δ⁻) reaches at 10/3.
        for (chosen, rejected) in [(0.0, 0.0), (2.0, -3.0), (-6.0, 1.5), (3.0, 0.5), (9.0, -8.0)] {
            for loss in LOSSES {
                let value = |c: f64, r: f64| loss.of(0.3, &ratios(c, r)).value;
                let by_chosen =
                    (value(chosen + h, rejected) - value(chosen - h, rejected)) / (2.0 * h);
                let by_rejected =
                    (value(chosen, rejected + h) - value(chosen, rejected - h)) / (2.0 * h);
                let given = loss.of(0.3, &ratios(chosen, rejected));
                for (given, measured) in
                    [(given.by_chosen, by_chosen), (given.by_rejected, by_rejected)]
                {
                    assert!((given - measured).abs() < 1e-8, "{loss:?} {given} {measured}");
                }
            }
        }
    }

    #[test]
    fn losses_are_those_of_the_papers() {
        // Δ⁺ − Δ⁻ = 5, so s = 1/2; by means over tokens 2/4 + 3/7.
        let (beta, pair) = (0.1, ratios(2.0, -3.0));
        let value = |loss: PreferenceLoss| loss.of(beta, &pair).value;
        let log_sigmoid = |s: f64| -(1.0 + (-s).exp()).ln();
        let by_means = 2.0 / 4.0 + 3.0 / 7.0;
        let smoothed = (-0.8 * log_sigmoid(0.5) + 0.2 * log_sigmoid(-0.5)) / 0.6;
        for (loss, expected) in [
            (PreferenceLoss::Sigmoid, -log_sigmoid(0.5)),
            (PreferenceLoss::Hinge, 0.5),
            (PreferenceLoss::Ipo, (by_means - 5.0_f64).powi(2)),
            (PreferenceLoss::Robust { label_smoothing: 0.2 }, smoothed),
            (PreferenceLoss::SigmoidNorm, -log_sigmoid(0.1 * by_means)),
        ] {
            assert!((value(loss) - expected).abs() < 1e-14, "{loss:?} {} {expected}", value(loss));
        }
        let unsmoothed = PreferenceLoss::Robust { label_smoothing: 0.0 };
        assert_eq!(unsmoothed.of(beta, &pair), PreferenceLoss::Sigmoid.of(beta, &pair));
    }

    #[test]
    fn equal_policies_lose_exactly_ln_2() {
        for loss in [PreferenceLoss::Sigmoid, PreferenceLoss::SigmoidNorm] {
            assert_eq!(loss.of(0.1, &ratios(0.0, 0.0)).value.to_bits(), LN_2.to_bits());
        }
    }

    #[test]
    fn hinge_is_flat_from_its_kink_on() {
        let at = |difference| PreferenceLoss::Hinge.of(0.5, &ratios(difference, 0.0));
        let flat = PairLoss { value: 0.0, by_chosen: 0.0, by_rejected: 0.0 };
        // As numbers: the sign of a zero is no matter.
        assert_eq!((at(2.0), at(3.0)), (flat, flat));
        let steep = at(2.0 - 1e-9);
        assert_eq!((steep.by_chosen, steep.by_rejected), (-0.5, 0.5));
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for loss in LOSSES {
            let PairLoss { value, by_chosen, by_rejected } = loss.of(0.1, &ratios(f64::NAN, 0.0));
            assert!(value.is_nan() && by_chosen.is_nan() && by_rejected.is_nan(), "{loss:?}");
        }
    }

    #[test]
    fn large_margins_neither_overflow_nor_vanish() {
        assert_eq!(softplus(1000.0), 1000.0);
        assert_eq!(softplus(-1000.0), 0.0);
        assert!((softplus(-30.0) - 9.357622968840175e-14).abs() < 1e-26);
        assert_eq!(sigmoid(-1000.0), 0.0);
        assert_eq!(sigmoid(1000.0), 1.0);
    }
}
