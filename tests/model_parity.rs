//! Logits and greedy tokens equal those of `transformers`, live.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use drift_worker::model::Decoder;
use drift_worker::sample::{Prompt, Sample, SamplingEngine, SamplingParams, Shard, sample_shard};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::support::{data, demo_model, python};

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
fn demo_model_answers_as_in_transformers() {
    let (model_dir, dir) = (demo_model(), tempfile::tempdir().unwrap());
    let logits_file = dir.path().join("logits.st");
    let corpus = data("dsat_data.jsonl");
    let reply = ask(&["demo", text(&model_dir), text(&corpus), text(&logits_file)]);
    let model = Decoder::load(&model_dir, Kind::Float, Device::Cpu).unwrap();

    let (prompts, replies) = (token_lists(&reply["prompts"]), token_lists(&reply["replies"]));
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    eprintln!("prompts of {lengths:?} tokens");
    // Shorter and longer than one chunk of prefill, or the test misses a path.
    assert!(lengths.len() == 8 && lengths[0] < 512 && lengths[7] > 512, "{lengths:?}");

    for (name, reference) in tensors(&logits_file) {
        let prompt = name.strip_prefix("logits.").unwrap().parse::<usize>().unwrap();
        let ids: Vec<i64> = prompts[prompt].iter().map(|&id| i64::from(id)).collect();
        let difference = max_difference(&logits(&model, &Tensor::from_slice(&ids)), &reference);
        eprintln!("prompt {prompt}: logits within {difference:.1e} (bound {DEMO_MODEL:.0e})");
        assert!(difference < DEMO_MODEL, "prompt {prompt}: logits differ by up to {difference:e}");
    }

    let samples = greedy(&model, &prompts, &reply["stop_ids"]);
    for (sample, expected) in samples.iter().zip(&replies) {
        assert_eq!(&sample.tokens, expected, "prompt {}", sample.prompt);
    }
    let drawn: usize = replies.iter().map(Vec::len).sum();
    eprintln!("all {drawn} greedy tokens of 8 replies are those of transformers");
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
    std::fs::write(&asked, serde_json::json!({"prompts": prompts, "stop_ids": [2]}).to_string())
        .unwrap();
    for saved_dir in [&single, &sharded] {
        let reply = ask(&["reload", text(&model_dir), text(saved_dir), text(&asked)]);
        assert_eq!(reply["problems"], serde_json::json!([]), "{}", saved_dir.display());
        let reloaded = Decoder::load(saved_dir, Kind::Float, Device::Cpu).unwrap();
        let samples = greedy(&reloaded, &prompts, &serde_json::json!([2]));
        assert_eq!(vec![samples[0].tokens.clone()], token_lists(&reply["replies"]));
        eprintln!("{}: {} tensors identical", saved_dir.display(), reply["tensors"]);
    }
}

/// Runs the reference script, says who answered, and returns the answer.
fn ask(arguments: &[&str]) -> Value {
    let output = python("model_reference.py", arguments);
    let reply: Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();
    eprintln!("{}: against {}", arguments[0], reply["versions"].as_str().unwrap());
    reply
}

/// `[tokens, vocab]` in fp32, without a cache.
fn logits(model: &Decoder, ids: &Tensor) -> Tensor {
    let positions = Tensor::arange(ids.size1().unwrap(), (Kind::Int64, Device::Cpu));
    let rotary = model.rotary(&positions).unwrap();
    let mut h = model.embed(ids).unwrap();
    for block in &model.blocks {
        h = block
            .forward(&h, &rotary, &mut |q, k, v| {
                let batch = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
                let attended = Tensor::f_scaled_dot_product_attention(
                    &batch(q),
                    &batch(k),
                    &batch(v),
                    None::<&Tensor>,
                    0.0,
                    true,
                    None,
                    true,
                )?;
                Ok(attended.squeeze_dim(0).transpose(0, 1))
            })
            .unwrap();
    }
    model.final_norm(&h).unwrap().linear(model.head_weight(), None::<&Tensor>)
}

fn greedy(model: &Decoder, prompts: &[Vec<u32>], stop_ids: &Value) -> Vec<Sample> {
    let stop_ids = serde_json::from_value(stop_ids.clone()).unwrap();
    let params = SamplingParams {
        temperature: 0.0,
        max_new_tokens: 64,
        stop_ids,
        ..SamplingParams::default()
    };
    let prompts = prompts.iter().enumerate();
    let prompts = prompts
        .map(|(i, tokens)| Prompt { prompt: i as u64, index: 0, tokens: tokens.clone() })
        .collect();
    let engine = SamplingEngine::default();
    let shard = Shard { seed: 0, iteration: 0, params, engine, prompts };
    sample_shard(model, &shard, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn max_difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    (ours - theirs).abs().max().double_value(&[])
}

/// A safetensors file written by the reference script.
fn tensors(path: &Path) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn token_lists(value: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
