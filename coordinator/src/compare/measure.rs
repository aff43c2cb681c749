//! One run's quantities, from its files.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use crate::config::Settings;
use crate::domain::{Iteration, PairRow, Side};
use crate::store::{metrics, names, pairs::read_pairs};
use crate::text::diversity::{distinct, self_bleu, words};

/// Something that is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantity {
    /// Its name, with its unit.
    pub name: &'static str,
    /// Digits behind the point.
    pub digits: usize,
}

/// All of them, in the order of [`Measured::values`].
pub const QUANTITIES: [Quantity; 15] = [
    Quantity { name: "pairs that train", digits: 1 },
    Quantity { name: "loss", digits: 4 },
    Quantity { name: "held-out loss", digits: 4 },
    Quantity { name: "held-out accuracy", digits: 3 },
    Quantity { name: "held-out margin", digits: 4 },
    Quantity { name: "log p drift, chosen (nats)", digits: 2 },
    Quantity { name: "log p drift, rejected (nats)", digits: 2 },
    Quantity { name: "mean σ(−s)", digits: 4 },
    Quantity { name: "share with a signal, p₀", digits: 3 },
    Quantity { name: "Var(s)", digits: 4 },
    Quantity { name: "gradient norm", digits: 3 },
    Quantity { name: "sample length (tokens)", digits: 1 },
    Quantity { name: "distinct-1", digits: 3 },
    Quantity { name: "distinct-2", digits: 3 },
    Quantity { name: "self-BLEU", digits: 3 },
];

/// What one iteration came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// 0 is the warm start.
    pub iteration: Iteration,
    /// In the order of [`QUANTITIES`], or of those that it is shown with; none where the
    /// run has no such thing.
    ///
    /// Pairs are those of the iteration's file that are not held out.
    /// Loss, signal, variance and gradient norm are means over the iteration's steps. What
    /// is held out is of the last evaluation; drift is since the iteration's reference, over
    /// held-out pairs, or over the last step's where none are held out. Length and diversity
    /// are of the iteration's samples that made pairs.
    pub values: Vec<Option<f64>>,
}

/// What one run came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunMeasures {
    /// The run's folder, by its name.
    pub name: String,
    /// How replies are preferred.
    pub method: String,
    /// The model it began with.
    pub model: String,
    /// In order, as far as the run has come.
    pub iterations: Vec<Measured>,
}

/// Measures the run in `dir`.
///
/// # Errors
/// No run there, one without a step yet, or a file that cannot be read.
pub fn measure(dir: &Path) -> Result<RunMeasures> {
    let config = dir.join(names::CONFIG);
    if !config.is_file() {
        bail!("no run in {}: {} is missing; name run directories", dir.display(), names::CONFIG);
    }
    let settings = Settings::frozen(&config)?;
    let mut iterations = Vec::new();
    for k in (0..=settings.training.iterations).map(Iteration) {
        let folder = dir.join(names::ITERATIONS).join(format!("{:02}", k.0));
        let path = folder.join("metrics.jsonl");
        if !path.is_file() {
            continue; // The warm start was left out, or the run is not there yet.
        }
        let lines = metrics::read(&path)?;
        let rows = read_pairs(&folder.join("pairs.parquet"))
            .with_context(|| format!("pairs of iteration {k}"))?;
        iterations.push(Measured { iteration: k, values: values(k, &lines, &rows) });
    }
    if iterations.is_empty() {
        bail!("{}: no iteration has trained a step yet", dir.display());
    }
    let name = dir.canonicalize()?.file_name().map(|name| name.to_string_lossy().into_owned());
    Ok(RunMeasures {
        name: name.unwrap_or_else(|| dir.display().to_string()),
        method: settings.method.to_string(),
        model: settings.model,
        iterations,
    })
}

fn values(k: Iteration, lines: &[Value], rows: &[PairRow]) -> Vec<Option<f64>> {
    let number = |line: &Value, name: &str| line.get(name).and_then(Value::as_f64);
    let steps: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    let mean = |name: &str| {
        let values: Vec<f64> = steps.iter().filter_map(|line| number(line, name)).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let evaluation = lines.iter().rfind(|line| line.get("eval_loss").is_some());
    let held_out = |name: &str| evaluation.and_then(|line| number(line, name));
    let drift = |side: &str| {
        let evaluated = held_out(&format!("eval_logps/{side}"));
        let since = held_out(&format!("eval_ref_logps/{side}"));
        let last = || steps.last().and_then(|line| number(line, &format!("logps/{side}_drift")));
        evaluated.zip(since).map(|(now, then)| now - then).or_else(last)
    };
    let drawn = drawn(k, rows);
    let says: Vec<Vec<String>> = drawn.iter().map(|(text, _)| words(text)).collect();
    let tokens: usize = drawn.iter().map(|(_, tokens)| tokens).sum();
    vec![
        Some(rows.iter().filter(|row| !row.held_out).count() as f64),
        mean("loss"),
        held_out("eval_loss"),
        held_out("eval_rewards/accuracies"),
        held_out("eval_rewards/margins"),
        drift("chosen"),
        drift("rejected"),
        mean("signal/mean"),
        mean("signal/p0"),
        mean("margins/var"),
        mean("grad_norm"),
        (!drawn.is_empty()).then(|| tokens as f64 / drawn.len() as f64),
        distinct(&says, 1),
        distinct(&says, 2),
        self_bleu(&says),
    ]
}

/// Texts and lengths of what the iteration drew.
fn drawn(k: Iteration, rows: &[PairRow]) -> Vec<(&str, usize)> {
    let is_drawn = |side: &Side| matches!(side, Side::Sample { iteration, .. } if *iteration == k);
    rows.iter()
        .flat_map(|row| {
            [
                (&row.chosen_from, row.chosen.as_str(), row.tokens.chosen.len()),
                (&row.rejected_from, row.rejected.as_str(), row.tokens.rejected.len()),
            ]
        })
        .filter(|(from, ..)| is_drawn(from))
        .map(|(_, text, tokens)| (text, tokens))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::{FinishReason, Origin, PairId, PromptId, TokenPair};

    fn row(n: u64, iteration: u32, reply: &str) -> PairRow {
        PairRow {
            context: Vec::new(),
            chosen: reply.to_owned(),
            rejected: "from the corpus".to_owned(),
            tokens: TokenPair {
                id: PairId(n),
                prompt: vec![1],
                chosen: vec![1; 4],
                rejected: vec![1; 9],
            },
            chosen_from: Side::Sample {
                iteration: Iteration(iteration),
                prompt: PromptId(n),
                index: 0,
                finish: FinishReason::Stop,
            },
            rejected_from: Side::Corpus { origin: Origin { file: "a".into(), record: n } },
            held_out: false,
        }
    }

    fn of(values: &[Option<f64>], name: &str) -> Option<f64> {
        values[QUANTITIES.iter().position(|quantity| quantity.name == name).unwrap()]
    }

    #[test]
    fn steps_are_averaged_and_the_last_evaluation_counts() {
        let lines = [
            json!({ "loss": 0.7, "grad_norm": 2.0, "signal/mean": 0.5, "logps/chosen_drift": 1.0 }),
            json!({ "eval_loss": 0.6, "eval_logps/chosen": -9.0, "eval_ref_logps/chosen": -10.0 }),
            json!({ "loss": 0.5, "grad_norm": 4.0, "signal/mean": 0.3, "logps/rejected_drift": -3.0 }),
            json!({ "eval_loss": 0.4, "eval_logps/chosen": -8.0, "eval_ref_logps/chosen": -10.0 }),
        ];
        let held_out = PairRow { held_out: true, ..row(3, 1, "of before") };
        let rows = [row(0, 2, "one two"), row(1, 2, "one three"), row(2, 1, "of before"), held_out];
        let values = values(Iteration(2), &lines, &rows);
        assert_eq!(values.len(), QUANTITIES.len());
        assert_eq!(of(&values, "pairs that train"), Some(3.0));
        assert_eq!(of(&values, "loss"), Some(0.6));
        assert_eq!(of(&values, "held-out loss"), Some(0.4));
        assert_eq!(of(&values, "log p drift, chosen (nats)"), Some(2.0));
        assert_eq!(of(&values, "log p drift, rejected (nats)"), Some(-3.0));
        assert_eq!(of(&values, "gradient norm"), Some(3.0));
        assert_eq!(of(&values, "sample length (tokens)"), Some(4.0));
        assert_eq!(of(&values, "distinct-1"), Some(0.75), "what was drawn before is left out");
        assert_eq!(of(&values, "Var(s)"), None);
    }
}
