//! A chat model so small that a run takes seconds: a Llama of random weights that
//! speaks the demo model's tokens.

use std::path::Path;

use anyhow::{Context, Result};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 64;
const LAYERS: usize = 2;
const HEADS: usize = 2;
const HEAD: usize = HIDDEN / HEADS;

/// Writes it to `folder`, with the tokenizer of the model in `demo`.
pub(crate) fn write(demo: &Path, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    for entry in demo.read_dir().with_context(|| format!("list {}", demo.display()))? {
        let path = entry?.path();
        if path.extension().is_none_or(|ending| ending != "safetensors") {
            let name = path.file_name().context("a file without a name")?;
            std::fs::copy(&path, folder.join(name))?;
        }
    }
    let config_path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&config_path)?)?;
    let vocabulary = config["vocab_size"].as_u64().context("vocab_size")? as usize;
    for (key, value) in [
        ("hidden_size", json!(HIDDEN)),
        ("intermediate_size", json!(INTERMEDIATE)),
        ("num_hidden_layers", json!(LAYERS)),
        ("num_attention_heads", json!(HEADS)),
        ("num_key_value_heads", json!(1)),
        ("head_dim", json!(HEAD)),
        ("tie_word_embeddings", json!(true)),
    ] {
        config[key] = value;
    }
    std::fs::write(&config_path, serde_json::to_vec_pretty(&config)?)?;

    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![vocabulary, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HEAD, HIDDEN]),
            ("self_attn.v_proj", vec![HEAD, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INTERMEDIATE]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let mut state = 1_u64;
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(name, shape)| {
            let is_norm = name.contains("norm");
            (0..shape.iter().product::<usize>())
                .flat_map(|_| {
                    let value = if is_norm { 1.0 } else { 0.05 * noise(&mut state) };
                    // bf16 is the upper half of an f32.
                    ((value.to_bits() >> 16) as u16).to_le_bytes()
                })
                .collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        Ok((name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes)?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))?;
    Ok(())
}

/// Between -1 and 1.
fn noise(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
}
