//! Losses of a pair from its log-probabilities, for evaluations; training's are
//! the workers'.

use super::plan::PairSize;
use crate::config::{Loss, TrainingSettings};
use crate::domain::ReferenceLogps;

/// A preference loss with its constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// Which.
    pub loss: Loss,
    /// β; IPO's τ.
    pub beta: f64,
    /// Robust DPO's ε.
    pub label_smoothing: f64,
}

impl From<&TrainingSettings> for Objective {
    fn from(training: &TrainingSettings) -> Self {
        let TrainingSettings { loss, beta, label_smoothing, .. } = *training;
        Self { loss, beta, label_smoothing }
    }
}

impl Objective {
    /// The margin s that the loss sees. With the log-ratios Δ = log π − log π_ref
    /// it is β(Δ⁺ − Δ⁻); for the losses by means over tokens, `ipo` and
    /// `sigmoid_norm`, each Δ is divided by its reply's tokens.
    pub fn margin(
        &self,
        policy: &ReferenceLogps,
        reference: &ReferenceLogps,
        size: &PairSize,
    ) -> f64 {
        let chosen = policy.chosen - reference.chosen;
        let rejected = policy.rejected - reference.rejected;
        match self.loss {
            Loss::Sigmoid | Loss::Hinge | Loss::Robust => self.beta * (chosen - rejected),
            Loss::Ipo | Loss::SigmoidNorm => {
                self.beta * (chosen / size.chosen as f64 - rejected / size.rejected as f64)
            }
        }
    }

    /// The loss at a margin, as TRL's `DPOTrainer` has it for the name.
    pub fn loss_at(&self, s: f64) -> f64 {
        match self.loss {
            Loss::Sigmoid | Loss::SigmoidNorm => softplus(-s),
            Loss::Hinge => (1.0 - s).max(0.0),
            Loss::Ipo => (s / self.beta - 0.5 / self.beta).powi(2),
            // [−(1 − ε) log σ(s) + ε log σ(−s)] / (1 − 2ε), with log σ(−s) = log σ(s) − s.
            Loss::Robust => {
                let flipped = self.label_smoothing;
                softplus(-s) - s * flipped / (1.0 - 2.0 * flipped)
            }
        }
    }
}

/// σ(x).
pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// log(1 + eˣ), which is −log σ(−x), without overflow; exactly ln 2 at 0.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::PairId;

    /// By the formulas of TRL 1.16.0's `DPOTrainer`, in float64 on PyTorch 2.13.0.
    #[test]
    fn losses_are_trls() {
        let cases = [
            (
                [-10.0, -20.0, -12.5, -17.0],
                [5, 8],
                [
                    (Loss::Sigmoid, 0.4554924814633376),
                    (Loss::Hinge, 0.44999999999999996),
                    (Loss::Ipo, 17.015625),
                    (Loss::Robust, 0.2721591481300043),
                    (Loss::SigmoidNorm, 0.6503539066627487),
                ],
            ),
            (
                [-40.25, -33.5, -39.0, -36.0],
                [3, 11],
                [
                    (Loss::Sigmoid, 0.8981232641398401),
                    (Loss::Hinge, 1.375),
                    (Loss::Ipo, 31.85405188246097),
                    (Loss::Robust, 1.02312326413984),
                    (Loss::SigmoidNorm, 0.7258623831577835),
                ],
            ),
        ];
        for ([chosen, rejected, ref_chosen, ref_rejected], [long, short], losses) in cases {
            let policy = ReferenceLogps { chosen, rejected };
            let reference = ReferenceLogps { chosen: ref_chosen, rejected: ref_rejected };
            let size = PairSize { id: PairId(0), tokens: 40, chosen: long, rejected: short };
            for (loss, expected) in losses {
                let objective = Objective { loss, beta: 0.1, label_smoothing: 0.2 };
                let value = objective.loss_at(objective.margin(&policy, &reference, &size));
                assert!(
                    (value - expected).abs() < 1e-12 * expected,
                    "{loss:?}: {value}, not {expected}"
                );
            }
        }
    }

    #[test]
    fn equal_policies_lose_what_the_loss_has_at_no_margin() {
        let at_0 = |loss| Objective { loss, beta: 0.1, label_smoothing: 0.25 }.loss_at(0.0);
        assert_eq!(at_0(Loss::Sigmoid), std::f64::consts::LN_2);
        assert_eq!(at_0(Loss::SigmoidNorm), std::f64::consts::LN_2);
        assert_eq!(at_0(Loss::Robust), std::f64::consts::LN_2);
        assert_eq!(at_0(Loss::Hinge), 1.0);
        assert_eq!(at_0(Loss::Ipo), 25.0);
    }

    #[test]
    fn large_margins_neither_overflow_nor_vanish() {
        let dpo = Objective { loss: Loss::Sigmoid, beta: 0.1, label_smoothing: 0.0 };
        assert_eq!(dpo.loss_at(-1e5), 1e5);
        assert!(dpo.loss_at(30.0) > 0.0 && dpo.loss_at(30.0) < 1e-12);
        assert_eq!(sigmoid(-1000.0), 0.0);
        assert_eq!(sigmoid(1000.0), 1.0);
    }
}
