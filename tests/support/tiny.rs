//! A chat model of a few megabytes: the demo model's tokenizer and random weights,
//! for runs of which only the course matters.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::demo_model;

const HIDDEN: usize = 32;
const LAYERS: usize = 2;
const MLP: usize = 64;
const VOCABULARY: usize = 49_152;

/// Writes the model's folder; the same bytes each time.
pub(crate) fn write_model(folder: &Path) {
    fs::create_dir(folder).unwrap();
    for file in fs::read_dir(demo_model()).unwrap().flatten() {
        if file.file_name() != "model.safetensors" {
            fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
    }
    let path = folder.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (name, value) in [
        ("hidden_size", HIDDEN),
        ("head_dim", HIDDEN / 2),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 1),
        ("num_hidden_layers", LAYERS),
        ("intermediate_size", MLP),
    ] {
        config[name] = value.into();
    }
    assert_eq!(config["vocab_size"], VOCABULARY);
    fs::write(&path, config.to_string()).unwrap();

    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![MLP, HIDDEN]),
            ("mlp.up_proj", vec![MLP, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, MLP]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let mut state = 1_u64;
    let mut noise = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product::<usize>();
            let value = |noise: f32| if shape.len() == 1 { 1.0 + noise } else { 0.4 * noise };
            // bf16 is the upper half of an f32.
            let bytes = (0..count)
                .flat_map(|_| ((value(noise()).to_bits() >> 16) as u16).to_le_bytes())
                .collect();
            (name, (shape, bytes))
        })
        .collect();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}
