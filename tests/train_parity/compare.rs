//! Every figure of ours held against the same one of theirs.

use std::collections::{BTreeMap, HashMap};

use drift_worker::train::{PairOutcome, StepReport, TokenPair};
use tch::{Kind, Tensor};

use super::engine::Ours;
use super::trl::{Job, Theirs};

/// Bounds, all in fp32.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Losses and metrics: |ours − theirs| / max(1, |theirs|).
    pub(super) metrics: f64,
    /// Each tensor's gradient: ‖ours − theirs‖ / ‖theirs‖.
    pub(super) gradients: f64,
    /// Each tensor's weights after the last step: ‖ours − theirs‖ / ‖theirs‖.
    pub(super) weights: f64,
}

pub(super) const BOUNDS: Bounds = Bounds { metrics: 1e-5, gradients: 1e-4, weights: 1e-5 };

/// The norm that TRL logs, as metrics. PyTorch adds up squares in long runs of
/// fp32, so that this norm is up to 4e-5 short of the fp64 norm of the same
/// gradients, to which ours is held as the other metrics are.
const LOGGED_NORM: f64 = 1e-4;

/// The largest difference of each kind of figure.
#[derive(Debug, Default)]
pub(super) struct Worst(BTreeMap<&'static str, f64>);

impl Worst {
    fn note(&mut self, name: &'static str, difference: f64) {
        let entry = self.0.entry(name).or_default();
        *entry = entry.max(difference);
    }

    /// On one line: what is bound, and how close it came.
    pub(super) fn summary(&self) -> String {
        let of = |name: &str| {
            self.0.get(name).map_or("not compared".to_owned(), |worst| format!("{worst:.1e}"))
        };
        let [loss, gradient, weights] = ["loss", "gradient", "weights"].map(of);
        format!("loss within {loss}, gradients {gradient}, weights {weights}")
    }

    /// One line for each kind of figure.
    pub(super) fn print(&self) {
        for (name, difference) in &self.0 {
            eprintln!("  {name:20} within {difference:.1e}");
        }
    }
}

/// Fails where a figure is out of bounds; `pairs` are the job's.
pub(super) fn compare(job: &Job, ours: &Ours, theirs: &Theirs, bounds: Bounds) -> Worst {
    let mut worst = Worst::default();
    let name = &job.name;
    assert_eq!(ours.reports.len(), theirs.steps.len());
    let steps = job.pairs.chunks(job.step_pairs()).zip(&ours.reports).zip(&theirs.steps);
    for (number, ((pairs, reports), theirs)) in steps.enumerate() {
        for (metric, ours) in metrics(job, pairs, reports) {
            let theirs = theirs[metric].as_f64().unwrap_or_else(|| panic!("{metric}: {theirs}"));
            let difference = (ours - theirs).abs() / theirs.abs().max(1.0);
            let bound = if metric == "grad_norm" { LOGGED_NORM } else { bounds.metrics };
            let place = format!("{name}, step {number}");
            assert!(difference < bound, "{place}: {metric} is {ours}, TRL's is {theirs}");
            worst.note(metric, difference);
        }
    }
    if let Some(gradients) = &ours.gradients {
        let bound = bounds.gradients;
        compare_tensors(name, "gradient", gradients, &theirs.gradients, bound, &mut worst);
    }
    compare_tensors(name, "weights", &ours.weights, &theirs.weights, bounds.weights, &mut worst);
    note_updates(job, ours, theirs, &mut worst);
    worst
}

/// TRL's metrics of a step, from what each rank reports of it. TRL takes means
/// over devices, and all have equally many pairs.
fn metrics(job: &Job, pairs: &[TokenPair], reports: &[StepReport]) -> Vec<(&'static str, f64)> {
    assert_eq!(reports.len(), job.devices);
    let by_device: Vec<_> = pairs
        .chunks(job.batch)
        .zip(reports)
        .map(|(pairs, report)| device_metrics(pairs, report))
        .collect();
    let mean = |at: usize| {
        let sum: f64 = by_device.iter().map(|metrics| metrics[at].1).sum();
        (by_device[0][at].0, sum / by_device.len() as f64)
    };
    (0..by_device[0].len()).map(mean).collect()
}

fn device_metrics(pairs: &[TokenPair], report: &StepReport) -> Vec<(&'static str, f64)> {
    assert_eq!(pairs.len(), report.pairs.len());
    let mean = |value: &dyn Fn(&PairOutcome) -> f64| {
        report.pairs.iter().map(value).sum::<f64>() / report.pairs.len() as f64
    };
    // Logits are averaged over tokens, not pairs.
    let by_token = |values: Vec<(f64, usize)>| {
        let tokens: usize = values.iter().map(|(_, tokens)| tokens).sum();
        values.iter().map(|&(mean, tokens)| mean * tokens as f64).sum::<f64>() / tokens as f64
    };
    let outcomes = || pairs.iter().zip(&report.pairs);
    vec![
        ("loss", mean(&|p| p.loss)),
        ("grad_norm", report.grad_norm),
        ("grad_norm/fp64", report.grad_norm),
        ("rewards/chosen", mean(&|p| p.reward_chosen)),
        ("rewards/rejected", mean(&|p| p.reward_rejected)),
        ("rewards/margins", mean(&|p| p.reward_chosen - p.reward_rejected)),
        ("rewards/accuracies", mean(&|p| f64::from(p.reward_chosen > p.reward_rejected))),
        ("logps/chosen", mean(&|p| p.logp_chosen)),
        ("logps/rejected", mean(&|p| p.logp_rejected)),
        (
            "logits/chosen",
            by_token(outcomes().map(|(p, o)| (o.logits_chosen, p.chosen.len())).collect()),
        ),
        (
            "logits/rejected",
            by_token(outcomes().map(|(p, o)| (o.logits_rejected, p.rejected.len())).collect()),
        ),
    ]
}

fn compare_tensors(
    job: &str,
    what: &'static str,
    ours: &HashMap<String, Tensor>,
    theirs: &HashMap<String, Tensor>,
    bound: f64,
    worst: &mut Worst,
) {
    assert_eq!(ours.len(), theirs.len());
    for (name, ours) in ours {
        let difference = relative(ours, &theirs[name]);
        assert!(difference < bound, "{job}: {what} of {name} differs by {difference:.1e}");
        worst.note(what, difference);
    }
}

/// How far the sums of updates are apart: printed, not bound. An element whose
/// gradient is noise moves by as much as any other, since RMSprop divides by it.
fn note_updates(job: &Job, ours: &Ours, theirs: &Theirs, worst: &mut Worst) {
    let start = super::trl::tensors(&job.policy.join("model.safetensors"));
    for (name, ours) in &ours.weights {
        let start = start[name].to_kind(Kind::Float);
        let (ours, theirs) = (ours - &start, &theirs.weights[name] - &start);
        assert!(theirs.norm().double_value(&[]) > 0.0, "{}: {name} was not trained", job.name);
        worst.note("updates (unbound)", relative(&ours, &theirs));
    }
}

/// ‖ours − theirs‖ / ‖theirs‖.
pub(super) fn relative(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    let (ours, theirs) = (ours.to_kind(Kind::Double), theirs.to_kind(Kind::Double));
    (ours - &theirs).norm().double_value(&[]) / theirs.norm().double_value(&[])
}
