//! One line for each training step, for those who ask for it.

use serde_json::Value;

use super::format;
use crate::domain::{Iteration, Step};

/// What a step's line shows.
#[derive(Debug, Clone, PartialEq)]
pub struct StepLine {
    /// Which iteration.
    pub iteration: Iteration,
    /// Counts from 0.
    pub step: Step,
    /// Steps of the iteration.
    pub steps: u64,
    /// Mean loss of the step's pairs.
    pub loss: f64,
    /// Mean reward margin, β already in it.
    pub margin: f64,
    /// Share of pairs whose chosen reply has the larger reward.
    pub accuracy: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// Over all workers.
    pub pairs_per_second: f64,
    /// Seconds in which gradients were being summed over workers, and seconds of
    /// these in which workers only waited; none with one worker.
    pub reduction: Option<(f64, f64)>,
}

impl StepLine {
    /// From a step's metrics under TRL's names. A value that is missing shows as `NaN`.
    pub fn from_metrics(
        iteration: Iteration,
        step: Step,
        steps: u64,
        metrics: &Value,
        pairs_per_second: f64,
    ) -> Self {
        let value = |name: &str| metrics.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN);
        Self {
            iteration,
            step,
            steps,
            loss: value("loss"),
            margin: value("rewards/margins"),
            accuracy: value("rewards/accuracies"),
            learning_rate: value("learning_rate"),
            grad_norm: value("grad_norm"),
            pairs_per_second,
            reduction: Some((value("reduce_seconds"), value("exposed_seconds")))
                .filter(|(busy, _)| *busy > 0.0),
        }
    }
}

/// One line of fixed columns, counting steps from 1 as people do. A loss that
/// has not moved yet shows as `0.693147`: ln 2.
pub fn step_line(line: &StepLine) -> String {
    let digits = line.steps.to_string().len();
    let reduction = line.reduction.map_or_else(String::new, |(busy, exposed)| {
        format!("  reduction {busy:.2} s, {:.0} % hidden", (1.0 - exposed / busy) * 100.0)
    });
    format!(
        "iteration {} step {:>digits$}/{}  loss {:.6}  margin {:+.5}  accuracy {:.3}  lr {:.3e}  grad norm {:.3}  {} pairs/s{reduction}",
        line.iteration,
        line.step.0 + 1,
        line.steps,
        line.loss,
        line.margin,
        line.accuracy,
        line.learning_rate,
        line.grad_norm,
        format::rate(line.pairs_per_second),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_step_is_one_line_of_fixed_columns() {
        let metrics = json!({
            "loss": std::f64::consts::LN_2, "rewards/margins": 0.0, "rewards/accuracies": 0.0,
            "learning_rate": 5e-8, "grad_norm": 14.218_75
        });
        let line = StepLine::from_metrics(Iteration(1), Step(0), 120, &metrics, 3.127);
        assert_eq!(
            step_line(&line),
            "iteration 1 step   1/120  loss 0.693147  margin +0.00000  accuracy 0.000  lr 5.000e-8  grad norm 14.219  3.13 pairs/s"
        );
    }

    #[test]
    fn what_of_a_reduction_ran_beside_the_step_is_told() {
        let metrics = json!({ "reduce_seconds": 0.5, "exposed_seconds": 0.125 });
        let line = StepLine::from_metrics(Iteration(1), Step(0), 1, &metrics, 1.0);
        assert!(step_line(&line).ends_with(" pairs/s  reduction 0.50 s, 75 % hidden"));
    }

    #[test]
    fn a_missing_value_is_seen() {
        let line = StepLine::from_metrics(Iteration(0), Step(8), 9, &json!({}), 0.5);
        assert!(step_line(&line).starts_with("iteration 0 step 9/9  loss NaN  margin NaN"));
    }
}
