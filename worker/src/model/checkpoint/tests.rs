use std::fs;

use tempfile::TempDir;

use super::*;
use crate::model::{Decoder, ModelConfig, Parameter};

const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "attention_bias": true, "tie_word_embeddings": true
}"#;

/// A small model, and a directory that holds it.
fn saved(config: &str) -> (Decoder, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    let model = Decoder::random(ModelConfig::read(dir.path()).unwrap(), 1);
    model.save(dir.path()).unwrap();
    (model, dir)
}

fn load(dir: &Path) -> Result<Decoder, ModelError> {
    Decoder::load(dir, Kind::Float, Device::Cpu)
}

fn parameters(model: &Decoder) -> Vec<Parameter> {
    let blocks = model.blocks.iter().flat_map(|block| block.parameters());
    model.outer_parameters().into_iter().chain(blocks).collect()
}

fn assert_same(a: &Decoder, b: &Decoder) {
    let (a, b) = (parameters(a), parameters(b));
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(&b) {
        assert_eq!(a.parts, b.parts);
        assert_eq!(a.tensor, b.tensor, "{:?}", a.parts);
    }
}

/// Rewrites the weight file with `edit` done to its header, padded by spaces
/// to a multiple of `align` bytes.
fn edit_header(dir: &Path, align: usize, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join(SINGLE);
    let content = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(content[..8].try_into().unwrap()) as usize;
    let mut value = serde_json::from_slice(&content[8..8 + header]).unwrap();
    edit(&mut value);
    let mut text = value.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(align), b' ');
    let mut edited = (text.len() as u64).to_le_bytes().to_vec();
    edited.extend(text);
    edited.extend(&content[8 + header..]);
    fs::write(&path, edited).unwrap();
}

/// Appends a tensor of `elements` zeros in fp32.
fn append(dir: &Path, name: &str, shape: &[usize], data: &[u8]) {
    edit_header(dir, 8, |header| {
        let entries = header.as_object().unwrap().values();
        let end = entries.filter_map(|e| e["data_offsets"][1].as_u64()).max().unwrap();
        header[name] = serde_json::json!({
            "dtype": "F32", "shape": shape, "data_offsets": [end, end + data.len() as u64]
        });
    });
    let path = dir.join(SINGLE);
    let mut content = fs::read(&path).unwrap();
    content.extend(data);
    fs::write(path, content).unwrap();
}

fn message(dir: &Path) -> String {
    load(dir).unwrap_err().to_string()
}

#[test]
fn what_is_saved_is_loaded() {
    let (model, dir) = saved(CONFIG);
    assert_same(&model, &load(dir.path()).unwrap());

    let untied =
        CONFIG.replace(r#""tie_word_embeddings": true"#, r#""tie_word_embeddings": false"#);
    let (model, dir) = saved(&untied);
    assert_eq!(model.outer_parameters().len(), 3);
    assert_same(&model, &load(dir.path()).unwrap());
}

#[test]
fn shards_hold_what_one_file_holds() {
    let (model, dir) = saved(CONFIG);
    fs::remove_file(dir.path().join(SINGLE)).unwrap();
    let files = model.save_sharded(dir.path(), 4000).unwrap();
    let names: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
    assert!(names.len() > 3, "{names:?}");
    assert_eq!(names[0], format!("model-00001-of-{:05}.safetensors", names.len() - 1));
    assert_eq!(*names.last().unwrap(), INDEX);
    assert_same(&model, &load(dir.path()).unwrap());

    let shard = dir.path().join(names[1]);
    fs::remove_file(&shard).unwrap();
    assert_eq!(message(dir.path()), format!("open {}", shard.display()));
}

#[test]
fn weights_convert_to_the_wanted_kind() {
    let (model, dir) = saved(CONFIG);
    let half = Decoder::load(dir.path(), Kind::BFloat16, Device::Cpu).unwrap();
    for (full, half) in parameters(&model).iter().zip(parameters(&half)) {
        assert_eq!(full.tensor.to_kind(Kind::BFloat16), half.tensor);
    }
    fs::remove_file(dir.path().join(SINGLE)).unwrap();
    half.save(dir.path()).unwrap();
    let widened = load(dir.path()).unwrap();
    for (half, widened) in parameters(&half).iter().zip(parameters(&widened)) {
        assert_eq!(half.tensor.to_kind(Kind::Float), widened.tensor);
    }
}

#[test]
fn a_file_cut_short_is_named() {
    let (_, dir) = saved(CONFIG);
    let path = dir.path().join(SINGLE);
    let content = fs::read(&path).unwrap();
    for (length, expected) in [
        (content.len() - 1, "but its header describes"),
        (200, "cut short, or not safetensors"),
        (5, "too short for a safetensors file"),
    ] {
        fs::write(&path, &content[..length]).unwrap();
        let message = message(dir.path());
        assert!(message.starts_with(&path.display().to_string()), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_lying_header_is_refused() {
    let norm = "model.norm.weight";
    let huge = 1_u64 << 62;
    let lies = [
        ("shape", serde_json::json!([17])),
        ("shape", serde_json::json!([huge, huge])),
        ("data_offsets", serde_json::json!([0, 64])),
        ("data_offsets", serde_json::json!([huge, huge + 64])),
    ];
    for (field, lie) in lies {
        let (_, dir) = saved(CONFIG);
        edit_header(dir.path(), 8, |header| header[norm][field] = lie);
        let message = message(dir.path());
        assert!(message.contains("model.safetensors: not a safetensors header"), "{message}");
    }

    let (_, dir) = saved(CONFIG);
    edit_header(dir.path(), 8, |h| h[norm]["dtype"] = "I32".into());
    let message = message(dir.path());
    assert!(message.contains("the dtype of model.norm.weight is I32"), "{message}");

    let path = dir.path().join(SINGLE);
    fs::write(&path, [&u64::MAX.to_le_bytes()[..], b"{}"].concat()).unwrap();
    let message = self::message(dir.path());
    assert!(message.contains("header of 18446744073709551615 bytes in a file of 10"), "{message}");
}

#[test]
fn shapes_and_names_follow_the_configuration() {
    let (_, dir) = saved(CONFIG);
    let config = dir.path().join("config.json");
    let replaced = |from: &str, to: &str| {
        fs::write(&config, CONFIG.replace(from, to)).unwrap();
        message(dir.path())
    };
    let shape = replaced(r#""intermediate_size": 24"#, r#""intermediate_size": 25"#);
    assert!(shape.contains("mlp.gate_proj.weight has shape [24, 16], but"), "{shape}");
    assert!(shape.contains("calls for [25, 16]"), "{shape}");

    let missing = replaced(r#""num_hidden_layers": 2"#, r#""num_hidden_layers": 3"#);
    assert!(missing.contains("13 tensors missing: model.layers.2.self_attn.q_proj"), "{missing}");
    assert!(missing.contains("and 8 more"), "{missing}");

    let unexpected = replaced(r#""attention_bias": true"#, r#""attention_bias": false"#);
    assert!(unexpected.contains("8 tensors that config.json has no place for"), "{unexpected}");
    assert!(unexpected.contains("model.layers.0.self_attn.k_proj.bias"), "{unexpected}");
}

#[test]
fn tensors_that_follow_from_others_may_be_there() {
    let (model, dir) = saved(CONFIG);
    append(dir.path(), "model.layers.0.self_attn.rotary_emb.inv_freq", &[4], &[0; 16]);
    let mut embedding = vec![0; 50 * 16 * 4];
    model.head_weight().f_copy_data_u8(&mut embedding, 50 * 16).unwrap();
    append(dir.path(), "lm_head.weight", &[50, 16], &embedding);
    assert_same(&model, &load(dir.path()).unwrap());

    let (_, dir) = saved(CONFIG);
    embedding[7] ^= 1;
    append(dir.path(), "lm_head.weight", &[50, 16], &embedding);
    let message = message(dir.path());
    assert!(message.contains("lm_head.weight differs from model.embed_tokens.weight"), "{message}");
}

#[test]
fn an_unaligned_file_loads_all_the_same() {
    let (model, dir) = saved(CONFIG);
    edit_header(dir.path(), 1, |header| {
        header["__metadata__"]["note"] = "x".into();
        while header.to_string().len() % 4 == 0 {
            let longer = format!("{}x", header["__metadata__"]["note"].as_str().unwrap());
            header["__metadata__"]["note"] = longer.into();
        }
    });
    assert_same(&model, &load(dir.path()).unwrap());
}

#[test]
fn an_index_stays_in_its_directory() {
    let (_, dir) = saved(CONFIG);
    fs::rename(dir.path().join(SINGLE), dir.path().join("shard.safetensors")).unwrap();
    let index = dir.path().join(INDEX);
    for outside in ["../shard.safetensors", "/etc/passwd", "a/shard.safetensors", ".."] {
        let map = serde_json::json!({"weight_map": {"model.norm.weight": outside}});
        fs::write(&index, map.to_string()).unwrap();
        let message = message(dir.path());
        assert!(message.contains("expected a file name without folders"), "{message}");
    }
    let map = serde_json::json!({"weight_map": {"model.norm.weight": "shard.safetensors"}});
    fs::write(&index, map.to_string()).unwrap();
    let message = message(dir.path());
    assert!(message.contains("has no place for"), "{message}");
}

#[test]
fn another_checkpoints_files_are_not_mixed_in() {
    let (model, dir) = saved(CONFIG);
    let error = model.save_sharded(dir.path(), 4000).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: left by another checkpoint"), "{error}");
    // The same division writes over itself: a save that died can be repeated.
    model.save(dir.path()).unwrap();
}
