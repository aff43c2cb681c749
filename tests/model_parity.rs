//! Logits and checkpoints equal those of `transformers`, live.

use drift_worker::model::Decoder;
use drift_worker::sample::SamplingEngine;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::support::model::{greedy, logits, tensors, text, token_lists};
use crate::support::{self, data, demo_model};

/// Bounds on |ours − theirs| in fp32, over all logits.
const RANDOM_MODELS: f64 = 1e-4;
const DEMO_MODEL: f64 = 1e-3;

#[test]
fn random_models_have_the_logits_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let reply = ask(&["random", dir.path().to_str().unwrap()]);
    let cases = reply["cases"].as_array().unwrap();
    assert!(cases.len() >= 8, "{reply}");
    for case in cases {
        let case = case.as_str().unwrap();
        let case_dir = dir.path().join(case);
        let reference = tensors(&case_dir.join("reference.st"));
        let model = Decoder::load(&case_dir, Kind::Float, Device::Cpu).unwrap();
        let difference = max_difference(&logits(&model, &reference["ids"]), &reference["logits"]);
        eprintln!("{case}: logits within {difference:.1e} (bound {RANDOM_MODELS:.0e})");
        assert!(difference < RANDOM_MODELS, "{case}: logits differ by up to {difference:e}");
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
    let original = std::fs::read(model_dir.join("model.safetensors")).unwrap();
    let ours = std::fs::read(single.join("model.safetensors")).unwrap();
    assert!(original == ours, "an unchanged model is not saved as the bytes of save_pretrained");

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

fn max_difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    (ours - theirs).abs().max().double_value(&[])
}
