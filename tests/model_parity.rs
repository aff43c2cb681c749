//! Logits and checkpoints equal those of `transformers`, live.

use std::path::Path;

use drift_worker::model::Decoder;
use drift_worker::sample::SamplingEngine;
use drift_worker::train::{
    Algorithm, EngineSettings, Objective, OptimizerSettings, PreferenceLoss, ReferenceLogps,
    TrainStep, TrainingSettings,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::support::model::{greedy, logits, tensors, text, token_lists};
use crate::support::training::{load, micro_batches, random_pairs};
use crate::support::{self, data, demo_model};

/// Bounds on |ours − theirs| in fp32, over all logits.
const RANDOM_MODELS: f64 = 1e-4;
const DEMO_MODEL: f64 = 1e-3;

#[test]
fn random_models_have_the_logits_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let reply = ask(&["random", dir.path().to_str().unwrap()]);
    let cases = reply["cases"].as_array().unwrap();
    assert!(cases.len() >= 16, "{reply}");
    for case in cases {
        let case = case.as_str().unwrap();
        let case_dir = dir.path().join(case);
        let model = Decoder::load(&case_dir, Kind::Float, Device::Cpu).unwrap();
        assert_logits(case, &model, &case_dir);
        let saved_dir = dir.path().join(format!("{case}-saved"));
        std::fs::create_dir(&saved_dir).unwrap();
        model.save(&saved_dir).unwrap();
        assert_same_weights(&case_dir, &saved_dir);
    }
}

/// Trained in its text part; the rest is carried along.
#[test]
fn a_multimodal_model_stays_whole() {
    let dir = tempfile::tempdir().unwrap();
    let original = dir.path().join("original");
    ask(&["multimodal", text(&original)]);
    let model = Decoder::load(&original, Kind::Float, Device::Cpu).unwrap();
    assert_logits("multimodal", &model, &original);
    let unchanged = dir.path().join("unchanged");
    std::fs::create_dir(&unchanged).unwrap();
    model.save(&unchanged).unwrap();
    assert_same_weights(&original, &unchanged);

    let settings = TrainingSettings {
        objective: Objective { loss: PreferenceLoss::Sigmoid, beta: 0.1, rpo_alpha: 0.0 },
        optimizer: OptimizerSettings {
            algorithm: Algorithm::RmsProp { alpha: 0.99, epsilon: 1e-8 },
            max_grad_norm: 1.0,
        },
        engine: EngineSettings::default(),
    };
    let mut pairs = random_pairs(4, 128);
    for pair in &mut pairs {
        pair.reference = Some(ReferenceLogps { chosen: -50.0, rejected: -50.0 });
    }
    let step = TrainStep {
        step: 0,
        learning_rate: 1e-3,
        global_pairs: 4,
        micro_batches: micro_batches(&pairs, 4),
    };
    // In bf16 the file holds two kinds: what is beside the text part stays fp32.
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut trainer = load(&original, kind);
        trainer.begin(settings, None).unwrap();
        trainer.step(&step, None, &|| false).unwrap();
        let trained = dir.path().join(format!("{kind:?}"));
        std::fs::create_dir(&trained).unwrap();
        std::fs::copy(original.join("config.json"), trained.join("config.json")).unwrap();
        trainer.policy().save(&trained).unwrap();

        let reply = ask(&["whole", text(&original), text(&trained)]);
        assert_eq!(reply["problems"], json!([]), "{kind:?}");
        assert_eq!(reply["class"], "Gemma3ForConditionalGeneration");
        let model = Decoder::load(&trained, Kind::Float, Device::Cpu).unwrap();
        assert_logits(&format!("trained in {kind:?}"), &model, &trained);
        eprintln!("{} tensors trained, {} carried along", reply["trained"], reply["beside"]);
    }
}

#[test]
fn demo_model_has_the_logits_of_transformers() {
    let (model_dir, dir) = (demo_model(), tempfile::tempdir().unwrap());
    let logits_file = dir.path().join("logits.st");
    let corpus = data("dsat_data.jsonl");
    let reply = ask(&["demo", text(&model_dir), text(&corpus), text(&logits_file)]);
    let model = Decoder::load(&model_dir, Kind::Float, Device::Cpu).unwrap();
    let (prompts, references) = (token_lists(&reply["prompts"]), tensors(&logits_file));
    for (at, prompt) in prompts.iter().enumerate() {
        let ids: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
        let ours = logits(&model, &Tensor::from_slice(&ids));
        let difference = max_difference(&ours, &references[&format!("logits.{at}")]);
        let length = prompt.len();
        eprintln!("{length} tokens: logits within {difference:.1e} (bound {DEMO_MODEL:.0e})");
        assert!(difference < DEMO_MODEL, "{length} tokens: logits differ by {difference:e}");
    }
}

#[test]
fn saved_checkpoints_load_in_transformers() {
    let (model_dir, dir) = (demo_model(), tempfile::tempdir().unwrap());
    let model = Decoder::load(&model_dir, Kind::BFloat16, Device::Cpu).unwrap();
    let (single, sharded) = (dir.path().join("single"), dir.path().join("sharded"));

    for (saved_dir, limit) in [(&single, usize::MAX), (&sharded, 100_000_000)] {
        std::fs::create_dir(saved_dir).unwrap();
        for file in ["config.json", "generation_config.json"] {
            std::fs::copy(model_dir.join(file), saved_dir.join(file)).unwrap();
        }
        let files = model.save_sharded(saved_dir, limit).unwrap();
        for file in &files {
            let content = std::fs::read(saved_dir.join(&file.name)).unwrap();
            assert_eq!(content.len() as u64, file.bytes, "{}", file.name);
            assert_eq!(<[u8; 32]>::from(Sha256::digest(&content)), file.sha256, "{}", file.name);
        }
        eprintln!("saved {:?}", files.iter().map(|file| &file.name).collect::<Vec<_>>());
    }
    assert_same_weights(&model_dir, &single);

    let prompts = vec![vec![1, 4093, 198, 28120, 2, 198, 1, 520, 9531, 198]];
    let asked = dir.path().join("prompts.json");
    let question = json!({"prompts": prompts, "stop_ids": [2], "max_new_tokens": 64});
    std::fs::write(&asked, question.to_string()).unwrap();
    for saved_dir in [&single, &sharded] {
        let reply = ask(&["reload", text(&model_dir), text(saved_dir), text(&asked)]);
        assert_eq!(reply["problems"], json!([]), "{}", saved_dir.display());
        let reloaded = Decoder::load(saved_dir, Kind::Float, Device::Cpu).unwrap();
        let engine = SamplingEngine::default();
        let replies = greedy(&reloaded, &prompts, 64, &[2], engine).replies;
        assert_eq!(replies, token_lists(&reply["replies"]));
        eprintln!("{}: {} tensors identical", saved_dir.display(), reply["tensors"]);
    }
}

fn ask(arguments: &[&str]) -> Value {
    support::ask("model_reference.py", arguments)
}

/// Logits on the ids in `dir` are those that transformers left there.
fn assert_logits(name: &str, model: &Decoder, dir: &Path) {
    let reference = tensors(&dir.join("reference.st"));
    let difference = max_difference(&logits(model, &reference["ids"]), &reference["logits"]);
    eprintln!("{name}: logits within {difference:.1e} (bound {RANDOM_MODELS:.0e})");
    assert!(difference < RANDOM_MODELS, "{name}: logits differ by up to {difference:e}");
}

/// An unchanged model is saved as the bytes of `save_pretrained`.
fn assert_same_weights(theirs: &Path, ours: &Path) {
    let [theirs, ours] = [theirs, ours].map(|dir| dir.join("model.safetensors"));
    let same = std::fs::read(&theirs).unwrap() == std::fs::read(&ours).unwrap();
    assert!(same, "{} is not {}", ours.display(), theirs.display());
}

fn max_difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    (ours - theirs).abs().max().double_value(&[])
}
