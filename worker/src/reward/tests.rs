use std::fs;

use tempfile::TempDir;

use super::*;
use crate::host::count::{self, Crossings};
use crate::model::{Decoder, ModelConfig};

const DEBERTA: &str = r#"{
    "architectures": ["DebertaV2ForSequenceClassification"], "model_type": "deberta-v2",
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "relative_attention": true,
    "position_buckets": 8, "position_biased_input": false, "share_att_key": true,
    "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "id2label": {"0": "LABEL_0"}
}"#;

const QWEN3: &str = r#"{
    "architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3",
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "tie_word_embeddings": true, "num_labels": 1
}"#;

fn deberta() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), DEBERTA).unwrap();
    super::deberta::write_random(dir.path(), 5);
    dir
}

fn qwen3() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    fs::write(&config, QWEN3).unwrap();
    let file = ConfigFile::parse(QWEN3, &config).unwrap();
    let config = ModelConfig::of(file, Purpose::Rating).unwrap();
    Decoder::random(config, 5).save(dir.path()).unwrap();
    dir
}

fn load(dir: &Path, kind: Kind) -> Result<RewardModel, ModelError> {
    RewardModel::load(dir, kind, Device::Cpu)
}

fn rate(model: &RewardModel, sequences: &[Vec<u32>]) -> Result<Vec<f64>, RewardError> {
    model.rate(sequences, &mut |_| ControlFlow::Continue(()))
}

fn sequences(lengths: &[usize]) -> Vec<Vec<u32>> {
    let token = |at: usize, i: usize| ((at * 37 + i * 11 + i * i) % 90) as u32;
    let sequence = |(at, &length)| (0..length).map(|i| token(at, i)).collect();
    lengths.iter().enumerate().map(sequence).collect()
}

#[test]
fn a_rating_is_its_own_sequences_to_the_last_bit() {
    for dir in [deberta(), qwen3()] {
        let model = load(dir.path(), Kind::Float).unwrap();
        let all = sequences(&[5, 1, 128, 17, 60, 5]);
        let mut done = Vec::new();
        let together = model.rate(&all, &mut |n| {
            done.push(n);
            ControlFlow::Continue(())
        });
        let together = together.unwrap();
        assert_eq!(done, [1, 2, 3, 4, 5, 6]);
        for (one, rating) in all.iter().zip(&together) {
            assert_eq!(rate(&model, std::slice::from_ref(one)).unwrap(), [*rating]);
        }
        let mut backwards = all.clone();
        backwards.reverse();
        let rated = rate(&model, &backwards).unwrap();
        assert_eq!(rated.into_iter().rev().collect::<Vec<_>>(), together);
        // Or the model says nothing of what it reads.
        let differ = |(at, a): (usize, &f64)| together[..at].iter().all(|b| (a - b).abs() > 1e-3);
        assert!(together.iter().enumerate().all(differ), "{together:?}");
    }
}

/// The first token is where an encoder is read, and the last where a decoder is.
#[test]
fn every_token_counts_and_so_does_its_place() {
    for dir in [deberta(), qwen3()] {
        let model = load(dir.path(), Kind::Float).unwrap();
        let sequence = sequences(&[40]).remove(0);
        let changed = |at: usize| {
            let mut other = sequence.clone();
            other[at] = (other[at] + 1) % 90;
            other
        };
        let mut swapped = sequence.clone();
        swapped.swap(10, 30);
        let others = [changed(0), changed(20), changed(39), swapped];
        let [rating] = rate(&model, std::slice::from_ref(&sequence)).unwrap()[..] else {
            panic!("not one rating");
        };
        for (at, other) in rate(&model, &others).unwrap().into_iter().enumerate() {
            assert!((other - rating).abs() > 1e-4, "change {at}: {other} and {rating}");
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_a_stop_is_seen() {
    for dir in [deberta(), qwen3()] {
        let model = load(dir.path(), Kind::Float).unwrap();
        let refused = |all: &[Vec<u32>]| rate(&model, all).unwrap_err().to_string();
        assert!(refused(&[vec![1], vec![]]).contains("sequence 1 has no tokens"));
        assert!(refused(&[vec![90]]).contains("sequence 0 holds token 90"));
        let stopped = model.rate(&sequences(&[3, 3]), &mut |_| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(RewardError::Stopped)));
    }
    let long = sequences(&[128, 129]);
    let dir = deberta();
    let message = rate(&load(dir.path(), Kind::Float).unwrap(), &long).unwrap_err().to_string();
    let expected =
        "sequence 1 has 129 tokens, but the reward model's max_position_embeddings is 128";
    assert!(message.contains(expected), "{message}");
    let dir = qwen3();
    assert!(rate(&load(dir.path(), Kind::Float).unwrap(), &long).is_ok());
}

#[test]
fn damaged_weights_are_told_and_not_rated() {
    let dir = deberta();
    let path = dir.path().join("model.safetensors");
    let mut tensors = Tensor::read_safetensors(&path).unwrap();
    for (name, tensor) in &mut tensors {
        if name == "classifier.bias" {
            let _ = tensor.fill_(f64::NAN);
        }
    }
    Tensor::write_safetensors(&tensors, &path).unwrap();
    let model = load(dir.path(), Kind::Float).unwrap();
    let message = rate(&model, &sequences(&[4])).unwrap_err().to_string();
    assert!(message.contains("sequence 0 has a rating that is not finite"), "{message}");
}

#[test]
fn files_are_read_strictly() {
    let (dir, path) = (deberta(), "model.safetensors");
    let path = dir.path().join(path);
    let whole = Tensor::read_safetensors(&path).unwrap();
    let write = |tensors: Vec<(&str, &Tensor)>| Tensor::write_safetensors(&tensors, &path).unwrap();
    let of = || whole.iter().map(|(name, tensor)| (name.as_str(), tensor));
    let message = || load(dir.path(), Kind::Float).unwrap_err().to_string();

    write(of().filter(|(name, _)| *name != "pooler.dense.bias").collect());
    assert!(message().contains("1 tensor missing: pooler.dense.bias"), "{}", message());

    let (stray, labels) = (Tensor::zeros([1], (Kind::Float, Device::Cpu)), "deberta.stray");
    write(of().chain([(labels, &stray)]).collect());
    assert!(message().contains("no place for: deberta.stray"), "{}", message());

    let two = Tensor::zeros([2, 32], (Kind::Float, Device::Cpu));
    let classifier =
        |(name, tensor)| (name, if name == "classifier.weight" { &two } else { tensor });
    write(of().map(classifier).collect());
    assert!(message().contains("classifier.weight has shape [2, 32]"), "{}", message());

    // Files of old releases hold more, which transformers ignores, too.
    let ids = Tensor::arange(128, (Kind::Int64, Device::Cpu)).view([1, 128]);
    write(of().chain([("deberta.embeddings.position_ids", &ids)]).collect());
    assert!(load(dir.path(), Kind::Float).is_ok());
}

#[test]
fn other_models_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let message = |config: String| {
        fs::write(dir.path().join("config.json"), config).unwrap();
        load(dir.path(), Kind::Float).unwrap_err().to_string()
    };
    for class in ["BertForSequenceClassification", "Qwen3ForCausalLM", "DebertaV2Model"] {
        let refused = message(QWEN3.replace("Qwen3ForSequenceClassification", class));
        assert!(refused.contains(&format!("architectures is {class}, but")), "{refused}");
        assert!(
            refused.contains("supports DebertaV2ForSequenceClassification, Llama"),
            "{refused}"
        );
    }
    let labels = message(QWEN3.replace(r#""num_labels": 1"#, r#""num_labels": 3"#));
    assert!(labels.contains("num_labels is of 3 labels"), "{labels}");
    // Two where the file is silent, and a list of names goes before the number.
    let silent = message(QWEN3.replace(r#", "num_labels": 1"#, ""));
    assert!(silent.contains("num_labels is of 2 labels"), "{silent}");
    let names = message(
        QWEN3.replace(r#""num_labels""#, r#""id2label": {"0": "a", "1": "b"}, "num_labels""#),
    );
    assert!(names.contains("id2label is of 2 labels"), "{names}");
    let bias = message(QWEN3.replace(r#""head_dim": 8"#, r#""head_dim": 8, "mlp_bias": true"#));
    assert!(bias.contains("mlp_bias is true"), "{bias}");
    // And what rates cannot be trained.
    fs::write(dir.path().join("config.json"), QWEN3).unwrap();
    let policy = Decoder::load(dir.path(), Kind::Float, Device::Cpu).unwrap_err().to_string();
    assert!(policy.contains("architectures is Qwen3ForSequenceClassification"), "{policy}");
}

#[test]
fn bf16_rates_nearly_the_same() {
    for dir in [deberta(), qwen3()] {
        let all = sequences(&[50, 9]);
        let full = rate(&load(dir.path(), Kind::Float).unwrap(), &all).unwrap();
        let half = rate(&load(dir.path(), Kind::BFloat16).unwrap(), &all).unwrap();
        for (full, half) in full.iter().zip(&half) {
            assert!((full - half).abs() < 0.1, "{full} and {half}");
        }
    }
}

#[test]
fn a_sequence_crosses_once_each_way() {
    for (dir, uploads) in [(deberta(), 1), (qwen3(), 3)] {
        let model = load(dir.path(), Kind::Float).unwrap();
        count::take();
        rate(&model, &sequences(&[20, 30])).unwrap();
        assert_eq!(count::take(), Crossings { reads: 2, uploads: 2 * uploads });
    }
}
