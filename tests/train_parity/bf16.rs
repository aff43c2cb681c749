//! bf16 against fp32, on a real model and real pairs.

use std::collections::HashMap;

use drift_worker::train::{EngineSettings, PreferenceLoss, StepReport, TrainStep};
use tch::{Kind, Tensor};

use super::engine::{copied_gradients, settings};
use super::trl::{Job, RMS_PROP};
use super::{objective, pairs};
use crate::support::demo_model;
use crate::support::training::{load, micro_batches};

/// |loss in bf16 − loss in fp32|, the mean over a step.
const LOSS: f64 = 2e-3;
/// |log π in bf16 − log π in fp32| of all replies, by their tokens. `transformers`'
/// own bf16 is 0.006 from its fp32 on these pairs.
const LOGP_PER_TOKEN: f64 = 0.02;
/// Cosine of the angle between the two gradients, of all weights together.
const COSINE: f64 = 0.99;
/// By how much each pair's log-ratios are moved away from 0, in nats.
const SHIFTS: [f64; 4] = [12.0, -9.0, 4.0, -2.0];

#[test]
fn bf16_loses_what_fp32_does() {
    let job = Job {
        name: "SmolLM2-135M-Instruct in bf16".to_owned(),
        policy: demo_model(),
        reference: demo_model(),
        pairs: pairs::real(SHIFTS.len(), 200, 100),
        batch: SHIFTS.len(),
        devices: 1,
        objective: objective(PreferenceLoss::Sigmoid, 0.0),
        algorithm: RMS_PROP,
        learning_rate: 5e-7,
    };
    let (fp32, exact) = first_step(&job, Kind::Float);
    let (bf16, rounded) = first_step(&job, Kind::BFloat16);
    let (mut apart, mut tokens) = (0.0, 0);
    for (pair, (a, b)) in job.pairs.iter().zip(fp32.pairs.iter().zip(&bf16.pairs)) {
        apart += (a.logp_chosen - b.logp_chosen).abs();
        apart += (a.logp_rejected - b.logp_rejected).abs();
        tokens += pair.chosen.len() + pair.rejected.len();
    }
    let apart = apart / tokens as f64;
    let cosine = cosine(&exact, &rounded);
    let difference = (loss(&fp32) - loss(&bf16)).abs();
    eprintln!(
        "bf16 against fp32: loss within {difference:.1e}, log-probs {apart:.1e} nats a token, \
         gradients' cosine {cosine:.5}"
    );
    assert!(difference < LOSS, "{} {}", loss(&fp32), loss(&bf16));
    assert!(apart < LOGP_PER_TOKEN, "{apart}");
    assert!(cosine > COSINE, "{cosine}");
}

/// The first step's report and gradients, in `kind`. Later ones would compare
/// weights: updates smaller than half of bf16's spacing show in the masters alone.
fn first_step(job: &Job, kind: Kind) -> (StepReport, HashMap<String, Tensor>) {
    let mut trainer = load(&job.policy, kind);
    trainer.begin(settings(job, EngineSettings::default()), None).unwrap();
    // The reference is scored in the same kind, as a run does it, so that what bf16 does to
    // log-probabilities cancels; and moved, so that losses are not all ln 2.
    let mut pairs = pairs::with_reference(&trainer, job.pairs.clone(), job.batch);
    for (pair, shift) in pairs.iter_mut().zip(SHIFTS) {
        let reference = pair.reference.as_mut().unwrap();
        reference.chosen -= shift;
        reference.rejected += shift / 2.0;
    }
    let step = TrainStep {
        step: 0,
        learning_rate: job.learning_rate,
        global_pairs: pairs.len() as u32,
        micro_batches: micro_batches(&pairs, job.batch),
    };
    let report = trainer.step(&step, None, &|| false).unwrap();
    (report, copied_gradients(&trainer))
}

fn loss(report: &StepReport) -> f64 {
    report.pairs.iter().map(|pair| pair.loss).sum::<f64>() / report.pairs.len() as f64
}

fn cosine(a: &HashMap<String, Tensor>, b: &HashMap<String, Tensor>) -> f64 {
    let dot = |a: &HashMap<String, Tensor>, b: &HashMap<String, Tensor>| -> f64 {
        let product = |(name, a): (&String, &Tensor)| {
            (a.to_kind(Kind::Double) * b[name].to_kind(Kind::Double)).sum(Kind::Double)
        };
        a.iter().map(|entry| product(entry).double_value(&[])).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
