//! What training takes of memory: measured in processes of their own, whose peak
//! is nobody else's.

use std::path::{Path, PathBuf};
use std::process::Command;

use drift_coordinator::config::Sharding;
use drift_coordinator::estimate::memory::{Keep, Place};
use drift_coordinator::estimate::{Footprint, Shape, Work};
use drift_worker::model::product_kind;
use drift_worker::train::{
    Algorithm, EngineSettings, Objective, OptimizerSettings, PreferenceLoss, ReferenceLogps,
    TokenPair, TrainStep, TrainingSettings,
};
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::support::python;
use crate::support::training::{load, micro_batches, pair, random_pairs};

/// What may come with a vocabulary of 152,064 instead of 32,000, apart from what
/// holds a number for each weight.
const BY_VOCABULARY: i64 = 64_000_000;
/// What may come from step 10 to step 200.
const BY_STEPS: i64 = 8_000_000;

/// bf16 weight; fp32 gradient, master, and RMSprop's mean of squares.
const BYTES_PER_WEIGHT: i64 = 2 + 4 + 4 + 4;
const BATCH: usize = 4;

/// Where a measuring process finds its load, as JSON.
const LOAD: &str = "DRIFT_TEST_LOAD";

#[test]
fn vocabulary_costs_no_more_than_its_weights() {
    let dir = tempfile::tempdir().unwrap();
    for tied in [true, false] {
        let [small, large] = [32_000, 152_064].map(|vocabulary| {
            let (model, weights) = create(
                &dir.path().join(format!("{vocabulary}-{tied}")),
                json!({
                    "family": "llama",
                    "vocab_size": vocabulary,
                    "hidden_size": 576,
                    "intermediate_size": 1536,
                    "num_attention_heads": 9,
                    "num_key_value_heads": 3,
                    "num_hidden_layers": 2,
                    "tie_word_embeddings": tied,
                }),
            );
            // 4 pairs of a chat's usual lengths: 976 response tokens.
            let pairs: Vec<_> =
                (0..BATCH as u64).map(|id| pair(id, [305, 122, 122], 32_000)).collect();
            let steps = measure(&model, &pairs, 2);
            (weights, steps.last().unwrap().peak)
        });
        let own = (large.0 - small.0) * BYTES_PER_WEIGHT;
        let rest = large.1 - small.1 - own;
        eprintln!(
            "tied: {tied}; peak of {} and {} MB; of the growth {} MB are weights and what trains \
             them, {} MB the rest",
            mega(small.1),
            mega(large.1),
            mega(own),
            mega(rest)
        );
        assert!(rest < BY_VOCABULARY, "{} MB", mega(rest));
    }
}

/// `coordinator plan` counts from `config.json` what a worker then takes, within a tenth.
#[test]
fn a_plan_is_what_training_takes() {
    let dir = tempfile::tempdir().unwrap();
    let mut ratios = Vec::new();
    for (hidden, intermediate, layers, heads) in
        [(512, 1_408, 6, 8), (576, 1_536, 14, 9), (1_024, 2_816, 8, 16)]
    {
        let (model, weights) = create(
            &dir.path().join(hidden.to_string()),
            json!({
                "family": "llama",
                "vocab_size": 32_000,
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": layers,
                "tie_word_embeddings": true,
            }),
        );
        let config = std::fs::read_to_string(model.join("config.json")).unwrap();
        let shape = Shape::parse(&config).unwrap();
        assert_eq!(shape.parameters() as i64, weights);
        let lengths = [305, 122, 122];
        let pairs: Vec<_> = (0..BATCH as u64).map(|id| pair(id, lengths, 32_000)).collect();
        let measured = measure(&model, &pairs, 2).last().unwrap().peak;
        let batch = BATCH as u64;
        let footprint = Footprint::of(
            &shape,
            &Work {
                ranks: 1,
                place: Place::Cpu {
                    bf16: product_kind(Kind::BFloat16, Device::Cpu) == Kind::BFloat16,
                },
                weight: 2,
                moments: 1,
                sharding: Sharding::None,
                keep: Keep::All,
                tokens: batch * 549,
                responses: batch * 244,
                cache: 0,
                rows: 0,
                row_tokens: 0,
            },
        );
        let training = footprint.phases.last().unwrap();
        let ratio = training.total() as f64 / measured as f64;
        eprintln!(
            "{} million weights: {} MB measured, {} MB planned: {:?}",
            weights / 1_000_000,
            mega(measured),
            mega(training.total() as i64),
            training.items.iter().map(|(item, bytes)| (item, bytes >> 20)).collect::<Vec<_>>()
        );
        ratios.push(ratio);
    }
    assert!(ratios.iter().all(|ratio| (0.9..=1.1).contains(ratio)), "{ratios:.3?}");
}

#[test]
fn steps_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (model, _) = create(&dir.path().join("tiny"), json!({"family": "llama"}));
    // Ten batches of other lengths each, over and over.
    let steps = measure(&model, &random_pairs(10 * BATCH, 131), 200);
    let (early, late) = (steps[9], steps[199]);
    for (what, growth) in
        [("peak", late.peak - early.peak), ("resident", late.resident - early.resident)]
    {
        eprintln!("{what} memory grew by {:.1} MB from step 10 to step 200", growth as f64 / 1e6);
        assert!(growth < BY_STEPS, "{what}: {growth} bytes");
    }
}

/// A random model in bf16 of the given configuration, and how many weights it has.
fn create(dir: &Path, settings: Value) -> (PathBuf, i64) {
    let args = ["model", dir.to_str().unwrap(), &settings.to_string()];
    let reply: Value = serde_json::from_str(&python("train_inputs.py", &args)).unwrap();
    (dir.to_path_buf(), reply["parameters"].as_i64().unwrap())
}

/// Memory after a step, in bytes.
#[derive(Debug, Clone, Copy)]
struct Memory {
    resident: i64,
    /// The most that was ever resident.
    peak: i64,
}

/// Trains for `steps` steps on `pairs`, over and over, in a process of its own.
fn measure(model: &Path, pairs: &[TokenPair], steps: usize) -> Vec<Memory> {
    let result = tempfile::NamedTempFile::new().unwrap();
    let ids = |pair: &TokenPair| json!([pair.prompt, pair.chosen, pair.rejected]);
    let load = json!({
        "model": model,
        "pairs": pairs.iter().map(ids).collect::<Vec<_>>(),
        "steps": steps,
        "result": result.path(),
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), load.to_string()).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "train_memory::measured", "--ignored", "--nocapture"])
        .env(LOAD, file.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let measured: Vec<[i64; 2]> =
        serde_json::from_slice(&std::fs::read(result.path()).unwrap()).unwrap();
    assert_eq!(measured.len(), steps);
    measured.into_iter().map(|[resident, peak]| Memory { resident, peak }).collect()
}

#[test]
#[ignore = "a process of its own, which the tests of this module start"]
fn measured() {
    let path = std::env::var(LOAD).expect("started by the tests of this module");
    let load_file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let field = |name: &str| load_file[name].clone();
    let text = |name: &str| load_file[name].as_str().unwrap().to_owned();
    let pairs: Vec<[Vec<u32>; 3]> = serde_json::from_value(field("pairs")).unwrap();
    let pairs: Vec<TokenPair> = (0..)
        .zip(pairs)
        .map(|(pair, [prompt, chosen, rejected])| {
            let reference = Some(ReferenceLogps { chosen: -100.0, rejected: -100.0 });
            TokenPair { pair, prompt, chosen, rejected, reference }
        })
        .collect();

    tch::set_num_threads(2);
    let mut trainer = load(Path::new(&text("model")), Kind::BFloat16);
    trainer.begin(settings(), None).unwrap();
    let mut measured = Vec::new();
    let steps = field("steps").as_u64().unwrap() as usize;
    let batches = micro_batches(&pairs, BATCH).into_iter().cycle().take(steps);
    for (number, batch) in batches.enumerate() {
        let step = TrainStep {
            step: number as u64,
            learning_rate: 5e-7,
            global_pairs: BATCH as u32,
            micro_batches: vec![batch],
        };
        trainer.step(&step, None, &|| false).unwrap();
        measured.push([status("VmRSS"), status("VmHWM")]);
    }
    std::fs::write(text("result"), json!(measured).to_string()).unwrap();
}

fn settings() -> TrainingSettings {
    TrainingSettings {
        objective: Objective { loss: PreferenceLoss::Sigmoid, beta: 0.1, rpo_alpha: 0.0 },
        optimizer: OptimizerSettings {
            algorithm: Algorithm::RmsProp { alpha: 0.99, epsilon: 1e-8 },
            max_grad_norm: 1.0,
        },
        engine: EngineSettings::default(),
    }
}

/// A figure of this process's memory, in bytes.
fn status(name: &str) -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    let kibibytes: i64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kibibytes * 1024
}

fn mega(bytes: i64) -> i64 {
    bytes / 1_000_000
}
