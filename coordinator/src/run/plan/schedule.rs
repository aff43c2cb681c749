//! The learning rate of each step.

use crate::config::{Schedule, TrainingSettings};

/// Rate of `step` (from 0) of `total`, as `transformers` schedules it: warm-up
/// over ⌈ratio × total⌉ steps from 0, then down to 0 just after the last step.
pub fn learning_rate(settings: &TrainingSettings, step: u64, total: u64) -> f64 {
    let warmup = (settings.warmup_ratio * total as f64).ceil() as u64;
    let factor = if step < warmup {
        step as f64 / warmup as f64
    } else {
        let left = total.saturating_sub(step) as f64;
        let span = (total - warmup).max(1) as f64;
        match settings.schedule {
            Schedule::Linear => left / span,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left / span)).cos()),
            Schedule::Constant => 1.0,
        }
    };
    settings.learning_rate * factor
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule, warmup_ratio: f64, total: u64) -> Vec<f64> {
        let settings = TrainingSettings {
            learning_rate: 1.0,
            schedule,
            warmup_ratio,
            ..TrainingSettings::default()
        };
        (0..total).map(|step| learning_rate(&settings, step, total)).collect()
    }

    #[test]
    fn linear_is_that_of_transformers() {
        // get_linear_schedule_with_warmup(num_warmup_steps=2, num_training_steps=6)
        assert_eq!(rates(Schedule::Linear, 0.3, 6), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(rates(Schedule::Linear, 0.0, 4), [1.0, 0.75, 0.5, 0.25]);
    }

    /// Values of `transformers` 4.57.6.
    #[test]
    fn cosine_and_constant_are_those_of_transformers() {
        let equal = |rates: Vec<f64>, expected: &[f64]| {
            assert_eq!(rates.len(), expected.len());
            for (step, (rate, expected)) in rates.iter().zip(expected).enumerate() {
                assert!((rate - expected).abs() < 1e-15, "step {step}: {rate}, not {expected}");
            }
        };
        // get_cosine_schedule_with_warmup(num_warmup_steps=3, num_training_steps=10)
        let warmed = [
            0.0,
            0.3333333333333333,
            0.6666666666666666,
            1.0,
            0.9504844339512095,
            0.8117449009293668,
            0.6112604669781572,
            0.38873953302184283,
            0.18825509907063326,
            0.04951556604879048,
        ];
        equal(rates(Schedule::Cosine, 0.3, 10), &warmed);
        // … with num_warmup_steps=0, num_training_steps=5
        let cold =
            [1.0, 0.9045084971874737, 0.6545084971874737, 0.34549150281252633, 0.09549150281252633];
        equal(rates(Schedule::Cosine, 0.0, 5), &cold);
        // get_constant_schedule_with_warmup(num_warmup_steps=3)
        let constant = [0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 1.0, 1.0, 1.0, 1.0];
        equal(rates(Schedule::Constant, 0.3, 8), &constant);
        assert_eq!(rates(Schedule::Constant, 1.0, 2), [0.0, 0.5], "nothing but warm-up");
    }
}
