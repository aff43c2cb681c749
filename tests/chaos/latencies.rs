//! How long things took, and where faults fell.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Over all runs.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    /// From SIGKILL of a worker to the line that tells of it.
    pub(crate) noticed: Vec<Duration>,
    /// From SIGSTOP, or from the cable's pulling.
    pub(crate) silence: Vec<Duration>,
    /// From the line that tells of a loss between two steps to the next step.
    pub(crate) trained_again: Vec<Duration>,
    /// From SIGTERM of a coordinator to its end.
    pub(crate) stopped: Vec<Duration>,
    /// Faults by the phase they fell into.
    pub(crate) by_phase: BTreeMap<String, usize>,
}

impl Latencies {
    pub(crate) fn extend(&mut self, other: Self) {
        self.noticed.extend(other.noticed);
        self.silence.extend(other.silence);
        self.trained_again.extend(other.trained_again);
        self.stopped.extend(other.stopped);
        for (phase, count) in other.by_phase {
            *self.by_phase.entry(phase).or_default() += count;
        }
    }
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases: Vec<_> =
            self.by_phase.iter().map(|(phase, count)| format!("{phase} {count}")).collect();
        writeln!(f, "faults by phase: {}", phases.join(", "))?;
        for (what, values) in [
            ("a killed worker was noticed after", &self.noticed),
            ("a stopped or cut-off worker was noticed after", &self.silence),
            ("a step followed a loss in training after", &self.trained_again),
            ("a coordinator obeyed SIGTERM after", &self.stopped),
        ] {
            let mut values = values.clone();
            values.sort_unstable();
            if let Some(longest) = values.last() {
                let median = values[values.len() / 2].as_secs_f64();
                let (longest, count) = (longest.as_secs_f64(), values.len());
                writeln!(f, "{what} {median:.3} s (median of {count}), at most {longest:.3} s")?;
            }
        }
        Ok(())
    }
}
