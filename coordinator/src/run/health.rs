//! Two ways in which preference training goes wrong while its loss looks well,
//! told from the last steps alone.

use std::fmt;

use serde_json::Value;

use super::metrics::StepMetrics;

/// Steps that are looked at together; fewer are no trend.
pub const WINDOW: usize = 8;

/// Mean p₀ below which the signal counts as gone.
const VANISHING_P0: f64 = 0.05;

/// Nats by which both sides must have fallen, as means over a reply's sum.
const FALLEN: f64 = 1.0;

/// What a step tells of the training's health.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Signs {
    /// Share of pairs with a learning signal of at least the threshold.
    pub p0: f64,
    /// Mean log π − log π_ref of the chosen side, in nats.
    pub chosen_drift: f64,
    /// The same of the rejected side.
    pub rejected_drift: f64,
}

impl From<&StepMetrics> for Signs {
    fn from(metrics: &StepMetrics) -> Self {
        let StepMetrics { signal_p0, chosen_drift, rejected_drift, .. } = *metrics;
        Self { p0: signal_p0, chosen_drift, rejected_drift }
    }
}

impl Signs {
    /// From a step's record in the journal, if it has them.
    pub fn from_record(record: &Value) -> Option<Self> {
        let value = |name: &str| record.get(name)?.as_f64();
        Some(Self {
            p0: value("signal/p0")?,
            chosen_drift: value("logps/chosen_drift")?,
            rejected_drift: value("logps/rejected_drift")?,
        })
    }
}

/// Something that a user should look at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Concern {
    /// Nearly all pairs are told apart already: σ(−s), the weight of a pair's
    /// gradient, is small for nearly all of them.
    SignalVanishes {
        /// Mean share of pairs that still have a signal.
        p0: f64,
    },
    /// The margin grows because the rejected replies fall faster than the chosen
    /// ones do, and both become less likely than under the reference.
    BothLogpsFall {
        /// Mean drift of the chosen side, in nats.
        chosen: f64,
        /// Mean drift of the rejected side, in nats.
        rejected: f64,
    },
}

/// Names of the concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConcernName {
    /// See [`Concern::SignalVanishes`].
    SignalVanishes,
    /// See [`Concern::BothLogpsFall`].
    BothLogpsFall,
}

impl ConcernName {
    /// As `summary.json` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SignalVanishes => "signal_vanishes",
            Self::BothLogpsFall => "both_logps_fall",
        }
    }
}

impl Concern {
    /// Which it is, whatever its numbers.
    pub fn name(&self) -> ConcernName {
        match self {
            Self::SignalVanishes { .. } => ConcernName::SignalVanishes,
            Self::BothLogpsFall { .. } => ConcernName::BothLogpsFall,
        }
    }
}

impl fmt::Display for Concern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SignalVanishes { p0 } => write!(
                f,
                "the learning signal vanishes: over the last {WINDOW} steps {:.1} % of the pairs had σ(−s) of training.signal_threshold or more, so the others hardly move the model any more; consider fewer epochs, a lower training.learning_rate, a lower training.beta, or training.loss = \"ipo\", which stops at a margin",
                p0 * 100.0
            ),
            Self::BothLogpsFall { chosen, rejected } => write!(
                f,
                "both log-probabilities fall: over the last {WINDOW} steps chosen replies are {chosen:+.1} and rejected ones {rejected:+.1} nats from the reference, so the model unlearns what it should prefer too; consider training.rpo_alpha above 0, a lower training.learning_rate, a higher training.beta, or another training.loss"
            ),
        }
    }
}

/// What the last [`WINDOW`] steps of an iteration give rise to; nothing before
/// there are so many.
pub fn concerns(steps: &[Signs]) -> Vec<Concern> {
    let Some(start) = steps.len().checked_sub(WINDOW) else { return Vec::new() };
    let window = &steps[start..];
    let mean = |value: fn(&Signs) -> f64| window.iter().map(value).sum::<f64>() / WINDOW as f64;
    let p0 = mean(|step| step.p0);
    let (chosen, rejected) = (mean(|step| step.chosen_drift), mean(|step| step.rejected_drift));
    let vanishes = (p0 < VANISHING_P0).then_some(Concern::SignalVanishes { p0 });
    let fall = (chosen < -FALLEN && rejected < -FALLEN)
        .then_some(Concern::BothLogpsFall { chosen, rejected });
    vanishes.into_iter().chain(fall).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: Signs = Signs { p0: 1.0, chosen_drift: 0.2, rejected_drift: -3.0 };

    fn names(steps: &[Signs]) -> Vec<ConcernName> {
        concerns(steps).iter().map(Concern::name).collect()
    }

    #[test]
    fn training_that_goes_well_gives_no_concern() {
        assert_eq!(names(&[WELL; 20]), []);
        let few = Signs { p0: 0.0, chosen_drift: -9.0, rejected_drift: -9.0 };
        assert_eq!(names(&[few; WINDOW - 1]), [], "too few steps to tell");
        assert_eq!(names(&[]), []);
    }

    #[test]
    fn a_signal_that_nearly_no_pair_has_is_told() {
        let mut steps = vec![WELL; 20];
        steps.extend([Signs { p0: 0.0, ..WELL }; WINDOW - 1]);
        assert_eq!(names(&steps), [], "one step of the window still has it all");
        steps.push(Signs { p0: 0.25, ..WELL });
        assert_eq!(names(&steps), [ConcernName::SignalVanishes], "2 of 64 pairs");
        let Some(Concern::SignalVanishes { p0 }) = concerns(&steps).first().copied() else {
            panic!("no concern");
        };
        assert_eq!(p0, 0.25 / 8.0);
    }

    #[test]
    fn both_sides_falling_is_told_and_one_side_is_not() {
        let fall = |chosen_drift, rejected_drift| Signs { chosen_drift, rejected_drift, ..WELL };
        assert_eq!(names(&[fall(-1.5, -6.0); WINDOW]), [ConcernName::BothLogpsFall]);
        assert_eq!(names(&[fall(-0.5, -60.0); WINDOW]), [], "that is what training is for");
        assert_eq!(names(&[fall(-6.0, 2.0); WINDOW]), [], "that shows in the accuracy");
        let both = [Signs { p0: 0.0, ..fall(-2.0, -9.0) }; WINDOW];
        assert_eq!(names(&both), [ConcernName::SignalVanishes, ConcernName::BothLogpsFall]);
    }

    #[test]
    fn a_message_says_what_can_be_done() {
        for concern in concerns(&[Signs { p0: 0.0, chosen_drift: -2.0, rejected_drift: -9.0 }; 8]) {
            let message = concern.to_string();
            assert!(message.contains("training.learning_rate"), "{message}");
        }
        let fall = Concern::BothLogpsFall { chosen: -2.0, rejected: -9.0 }.to_string();
        assert!(fall.contains("-2.0") && fall.contains("training.rpo_alpha"), "{fall}");
    }

    #[test]
    fn the_journals_record_gives_the_same_signs() {
        let record = serde_json::json!({
            "signal/p0": 0.5, "logps/chosen_drift": -1.0, "logps/rejected_drift": -2.0
        });
        let signs = Signs { p0: 0.5, chosen_drift: -1.0, rejected_drift: -2.0 };
        assert_eq!(Signs::from_record(&record), Some(signs));
        assert_eq!(Signs::from_record(&serde_json::json!({ "loss": 1.0 })), None);
    }
}
