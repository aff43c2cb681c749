//! All runs, averaged over seeds: a table, plots, and the figures as JSON.

use std::path::Path;

use anyhow::{Context, Result};
use drift_coordinator::compare::{
    Measured, QUANTITIES, Quantity, RunMeasures, measure, plots, table,
};
use drift_coordinator::domain::Iteration;
use drift_coordinator::store::publish::write_file;
use serde_json::{Value, json};

use crate::evaluate::Success;

/// What the study alone knows of a run, ahead of what any run tells.
const OWN: [Quantity; 3] = [
    Quantity { name: "success, held-out questions", digits: 3 },
    Quantity { name: "its deviation among seeds", digits: 3 },
    Quantity { name: "words of a reply there", digits: 1 },
];

/// One run, and how its model did before it and after each iteration.
struct Run {
    before: Success,
    measures: RunMeasures,
    successes: Vec<Success>,
}

/// All runs so far.
pub(crate) struct Study {
    methods: Vec<(String, Vec<Run>)>,
    iterations: u32,
}

impl Study {
    pub(crate) fn begin(methods: &[String], iterations: u32) -> Self {
        Self {
            methods: methods.iter().map(|method| (method.clone(), Vec::new())).collect(),
            iterations,
        }
    }

    pub(crate) fn add(
        &mut self,
        method: &str,
        dir: &Path,
        before: Success,
        successes: Vec<Success>,
    ) -> Result<()> {
        let run = Run { measures: measure(dir)?, before, successes };
        let mut of = self.methods.iter_mut().filter(|(name, _)| name == method);
        of.next().context("a method of the study")?.1.push(run);
        Ok(())
    }

    fn quantities() -> Vec<Quantity> {
        OWN.iter().chain(&QUANTITIES).copied().collect()
    }

    /// A method's runs as one: means over seeds.
    fn means(&self) -> Vec<RunMeasures> {
        let begun = self.methods.iter().filter(|(_, runs)| !runs.is_empty());
        begun
            .map(|(method, runs)| RunMeasures {
                name: method.clone(),
                method: format!("{} seeds", runs.len()),
                model: runs[0].measures.model.clone(),
                iterations: (0..=self.iterations).map(|k| mean_of(runs, k)).collect(),
            })
            .collect()
    }

    /// Of the model before any training, on what the seeds held out.
    fn before(&self) -> Option<f64> {
        let runs = self.methods.iter().flat_map(|(_, runs)| runs);
        mean(&runs.map(|run| run.before.share).collect::<Vec<_>>())
    }

    pub(crate) fn table(&self) -> String {
        let before = self.before().unwrap_or(f64::NAN);
        let table = table::render(&Self::quantities(), &self.means());
        format!("success before any training: {before:.3}; iteration 0 is the warm start\n{table}")
    }

    /// Writes `study.txt`, `study.json` and the plots.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let (quantities, means) = (Self::quantities(), self.means());
        write_file(&folder.join("study.txt"), (self.table() + "\n").as_bytes())?;
        write_file(&folder.join("study.svg"), plots::svg(&quantities, &means)?.as_bytes())?;
        write_file(&folder.join("study.png"), &plots::png(&quantities, &means)?)?;
        let json = serde_json::to_vec_pretty(&self.json())?;
        write_file(&folder.join("study.json"), &json)?;
        Ok(())
    }

    fn json(&self) -> Value {
        let run = |run: &Run| {
            let successes = run.successes.iter();
            json!({
                "run": run.measures.name,
                "before": run.before.share,
                "success": successes.clone().map(|s| s.share).collect::<Vec<_>>(),
                "words": successes.map(|s| s.words).collect::<Vec<_>>(),
            })
        };
        let methods = self.methods.iter();
        methods.map(|(method, runs)| (method, runs.iter().map(run).collect::<Vec<_>>())).collect()
    }
}

fn mean_of(runs: &[Run], k: u32) -> Measured {
    let successes: Vec<Success> = runs.iter().map(|run| run.successes[k as usize]).collect();
    let shares: Vec<f64> = successes.iter().map(|success| success.share).collect();
    let own = [
        mean(&shares),
        deviation(&shares),
        mean(&successes.iter().map(|success| success.words).collect::<Vec<_>>()),
    ];
    let told = (0..QUANTITIES.len()).map(|at| {
        let of = |run: &Run| {
            run.measures.iterations.iter().find(|m| m.iteration.0 == k).and_then(|m| m.values[at])
        };
        mean(&runs.iter().filter_map(of).collect::<Vec<_>>())
    });
    Measured { iteration: Iteration(k), values: own.into_iter().chain(told).collect() }
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Of a sample; none of one value alone.
fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values).filter(|_| values.len() > 1)?;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    Some((squares / (values.len() - 1) as f64).sqrt())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn deviation_is_that_of_a_sample() {
        assert_eq!(deviation(&[0.5]), None);
        assert!((deviation(&[0.2, 0.4, 0.6]).unwrap() - 0.2).abs() < 1e-12);
    }
}
