//! What both sides are given, and what TRL makes of it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use drift_worker::train::{Algorithm, Objective, PreferenceLoss, TokenPair};
use serde_json::{Value, json};
use tch::Tensor;

use crate::support::{demo_model, python};

pub(super) const MAX_GRAD_NORM: f64 = 1.0;
/// What TRL runs by `optim="rmsprop"`.
pub(super) const RMS_PROP: Algorithm = Algorithm::RmsProp { alpha: 0.99, epsilon: 1e-8 };

/// A few steps of training.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) name: String,
    pub(super) policy: PathBuf,
    pub(super) reference: PathBuf,
    pub(super) pairs: Vec<TokenPair>,
    /// Pairs of one device in one step.
    pub(super) batch: usize,
    /// Devices that share a step: our ranks. TRL has one after the other.
    pub(super) devices: usize,
    pub(super) objective: Objective,
    pub(super) algorithm: Algorithm,
    pub(super) learning_rate: f64,
}

/// What TRL says of a job.
pub(super) struct Theirs {
    /// What each step logged.
    pub(super) steps: Vec<Value>,
    /// The first step's gradients, clipped.
    pub(super) gradients: HashMap<String, Tensor>,
    /// After the last step.
    pub(super) weights: HashMap<String, Tensor>,
}

impl Job {
    /// Pairs of one step over all devices.
    pub(super) fn step_pairs(&self) -> usize {
        self.batch * self.devices
    }

    fn describe(&self, dir: &Path) -> Value {
        let ids = |pair: &TokenPair| json!({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected});
        let (loss, label_smoothing) = match self.objective.loss {
            PreferenceLoss::Sigmoid => ("sigmoid", 0.0),
            PreferenceLoss::Hinge => ("hinge", 0.0),
            PreferenceLoss::Ipo => ("ipo", 0.0),
            PreferenceLoss::Robust { label_smoothing } => ("robust", label_smoothing),
            PreferenceLoss::SigmoidNorm => ("sigmoid_norm", 0.0),
        };
        let Objective { beta, rpo_alpha, .. } = self.objective;
        json!({
            "policy": self.policy,
            "reference": self.reference,
            "dtype": "float32",
            "tokenizer": demo_model(),
            "pairs": self.pairs.iter().map(ids).collect::<Vec<_>>(),
            "objective": {
                "loss": loss,
                "beta": beta,
                "label_smoothing": label_smoothing,
                "rpo_alpha": rpo_alpha,
            },
            "optimizer": match self.algorithm {
                Algorithm::RmsProp { .. } => json!({"optim": "rmsprop"}),
                Algorithm::AdamW { beta1, beta2, epsilon, weight_decay } => json!({
                    "optim": "adamw_torch",
                    "adam_beta1": beta1,
                    "adam_beta2": beta2,
                    "adam_epsilon": epsilon,
                    "weight_decay": weight_decay,
                }),
            },
            "learning_rate": self.learning_rate,
            "max_grad_norm": MAX_GRAD_NORM,
            "batch": self.batch,
            "devices": self.devices,
            "gradients": dir.join("gradients.st"),
            "weights": dir.join("weights.st"),
        })
    }

    /// The optimiser that TRL ran is the one that ours is told to be.
    fn check_optimizer(&self, theirs: &Value) {
        // Groups of weights differ in how they decay.
        let (class, settings, decays) = match self.algorithm {
            Algorithm::RmsProp { alpha, epsilon } => (
                "RMSprop",
                json!({"alpha": alpha, "eps": epsilon, "momentum": 0.0, "centered": false}),
                vec![0.0],
            ),
            Algorithm::AdamW { beta1, beta2, epsilon, weight_decay } => (
                "AdamW",
                json!({"betas": [beta1, beta2], "eps": epsilon, "amsgrad": false}),
                vec![weight_decay, 0.0],
            ),
        };
        assert_eq!(theirs["class"], class, "{theirs}");
        let groups = theirs["groups"].as_array().unwrap();
        for group in groups {
            assert_eq!(group["lr"].as_f64(), Some(self.learning_rate), "{theirs}");
            for (key, value) in settings.as_object().unwrap() {
                let number = |value: &Value| value.as_f64().map_or(value.clone(), Value::from);
                assert_eq!(number(&group[key]), number(value), "{key} of {theirs}");
            }
        }
        let mut found: Vec<f64> =
            groups.iter().map(|group| group["weight_decay"].as_f64().unwrap()).collect();
        found.dedup();
        assert_eq!(found, decays, "{theirs}");
    }
}

/// Has TRL train `jobs`, all in one process.
pub(super) fn train(jobs: &[Job]) -> Vec<Theirs> {
    let dir = tempfile::tempdir().unwrap();
    let place = |index: usize| dir.path().join(index.to_string());
    let describe = |(index, job): (usize, &Job)| {
        std::fs::create_dir(place(index)).unwrap();
        job.describe(&place(index))
    };
    let path = dir.path().join("jobs.json");
    let described: Vec<Value> = jobs.iter().enumerate().map(describe).collect();
    std::fs::write(&path, json!(described).to_string()).unwrap();
    let replies: Vec<Value> =
        serde_json::from_str(&python("train_reference.py", &[text(&path)])).unwrap();
    assert_eq!(replies.len(), jobs.len());
    eprintln!("against {}", replies[0]["versions"]);
    let read = |(index, (job, reply)): (usize, (&Job, &Value))| {
        job.check_optimizer(&reply["optimizer"]);
        let steps = reply["steps"].as_array().unwrap().clone();
        assert_eq!(steps.len(), job.pairs.len() / job.step_pairs(), "{reply}");
        Theirs {
            steps,
            gradients: tensors(&place(index).join("gradients.st")),
            weights: tensors(&place(index).join("weights.st")),
        }
    };
    jobs.iter().zip(&replies).enumerate().map(read).collect()
}

/// Small random models in `dir`, by name; a policy and a reference of each.
pub(super) fn random_models(dir: &Path) -> Vec<String> {
    let reply: Value =
        serde_json::from_str(&python("train_inputs.py", &["models", text(dir)])).unwrap();
    serde_json::from_value(reply["cases"].clone()).unwrap()
}

pub(super) fn tensors(path: &Path) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
