use serde_json::json;
use tch::Device;

use super::*;
use crate::model::RopeScaling;

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "some_key_of_a_trainer": 1
    })
}

fn qwen2() -> Value {
    let mut config = llama();
    config["architectures"] = json!(["Qwen2ForCausalLM"]);
    config["model_type"] = json!("qwen2");
    config
}

fn with(mut config: Value, field: &str, value: Value) -> Value {
    config[field] = value;
    config
}

fn parse(config: &Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::parse(&config.to_string(), Path::new("m/config.json"))
}

#[test]
fn silent_fields_have_the_defaults_of_transformers() {
    let mut config = llama();
    config.as_object_mut().unwrap().remove("num_key_value_heads");
    let config = parse(&config).unwrap();
    assert_eq!(config.num_key_value_heads, 4);
    assert_eq!(config.head_dim, 16);
    assert_eq!(config.rms_norm_eps, 1e-6);
    assert_eq!(config.rope, RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default });
    assert!(!config.tie_word_embeddings && !config.qkv_bias && !config.output_bias);
    assert_eq!(config.pad_token_id, None);
}

#[test]
fn biases_follow_family_and_field() {
    let biases = |config: Value| {
        let config = parse(&config).unwrap();
        (config.qkv_bias, config.output_bias)
    };
    assert_eq!(biases(qwen2()), (true, false));
    assert_eq!(biases(with(llama(), "attention_bias", json!(true))), (true, true));
    assert_eq!(biases(with(llama(), "attention_bias", json!(false))), (false, false));
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let dynamic = json!({"rope_type": "dynamic", "factor": 2.0});
    let windowed = json!(["full_attention", "sliding_attention"]);
    let cases = [
        (with(llama(), "architectures", json!(["MistralForCausalLM"])), "architectures is Mistral"),
        (with(llama(), "architectures", json!([])), "architectures is missing"),
        (with(llama(), "model_type", json!("gemma")), "model_type is gemma"),
        (with(llama(), "hidden_act", json!("gelu")), "hidden_act is gelu"),
        (with(llama(), "mlp_bias", json!(true)), "mlp_bias is true"),
        (with(llama(), "attention_dropout", json!(0.1)), "attention_dropout is 0.1"),
        (with(llama(), "partial_rotary_factor", json!(0.5)), "partial_rotary_factor is 0.5"),
        (with(llama(), "rope_interleaved", json!(true)), "rope_interleaved is true"),
        (
            with(llama(), "quantization_config", json!({"quant_method": "gptq"})),
            "quantization_config is gptq",
        ),
        (with(llama(), "rope_scaling", dynamic.clone()), "rope_scaling.rope_type is \"dynamic\""),
        (with(llama(), "rope_parameters", dynamic), "rope_parameters.rope_type is \"dynamic\""),
        (with(qwen2(), "layer_types", windowed), "layer_types is sliding_attention"),
        (
            with(with(qwen2(), "use_sliding_window", json!(true)), "max_window_layers", json!(1)),
            "use_sliding_window is true",
        ),
    ];
    for (config, expected) in cases {
        let error = parse(&config).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{message}");
        assert!(message.starts_with(&format!("m/config.json: {expected}")), "{message}");
        assert!(message.contains("but this decoder supports"), "{message}");
    }
}

#[test]
fn a_window_that_is_switched_off_is_no_window() {
    let config = with(qwen2(), "sliding_window", json!(131_072));
    let config = with(config, "max_window_layers", json!(1));
    parse(&with(config, "use_sliding_window", json!(false))).unwrap();
    // On, but from a layer on that the model does not have: Qwen2.5's files.
    let config = with(qwen2(), "use_sliding_window", json!(true));
    parse(&with(config, "max_window_layers", json!(2))).unwrap();
}

#[test]
fn numbers_out_of_range_are_refused() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0});
    let cases = [
        (with(llama(), "hidden_size", json!(0)), "hidden_size is 0"),
        (with(llama(), "vocab_size", json!(1_i64 << 40)), "vocab_size is 1099511627776"),
        (with(llama(), "num_key_value_heads", json!(3)), "not a multiple of num_key_value_heads 3"),
        (with(llama(), "hidden_size", json!(66)), "hidden_size 66 is not a multiple"),
        (with(llama(), "head_dim", json!(7)), "head_dim is 7"),
        (with(llama(), "rms_norm_eps", json!(-1.0)), "rms_norm_eps is -1"),
        (with(llama(), "rope_theta", json!(0)), "rope_theta is 0"),
        (with(llama(), "pad_token_id", json!(100)), "pad_token_id is 100"),
        (with(llama(), "rope_scaling", llama3), "rope_scaling.high_freq_factor is missing"),
        (with(llama(), "rope_scaling", json!({"factor": 2.0})), "factor but no rope_type"),
        (
            with(llama(), "rope_parameters", json!({"full_attention": {"rope_type": "default"}})),
            "full_attention but no rope_type",
        ),
        (with(qwen2(), "num_key_value_heads", Value::Null), "num_key_value_heads is missing"),
    ];
    for (config, expected) in cases {
        let error = parse(&config).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, ModelError::Malformed { .. }), "{message}");
        assert!(message.contains(expected), "{message} lacks {expected:?}");
    }
    let error = parse(&json!({"architectures": ["LlamaForCausalLM"]})).unwrap_err();
    assert!(error.to_string().contains("missing field `vocab_size`"), "{error}");
}

#[test]
fn both_spellings_of_rope_say_the_same() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192
    });
    let old = with(with(llama(), "rope_theta", json!(500_000.0)), "rope_scaling", scaling.clone());
    let new = with(llama(), "rope_parameters", with(scaling, "rope_theta", json!(500_000.0)));
    let (old, new) = (parse(&old).unwrap().rope, parse(&new).unwrap().rope);
    assert_eq!(old, new);
    assert_eq!(old.theta, 500_000.0);
    assert!(matches!(old.scaling, RopeScaling::Llama3 { factor: 8.0, .. }));

    let older = json!({"type": "default"});
    let older = parse(&with(llama(), "rope_scaling", older)).unwrap().rope;
    assert_eq!(older.scaling, RopeScaling::Default);

    let both = with(llama(), "rope_parameters", json!({"rope_theta": 5.0}));
    let error = parse(&with(both, "rope_theta", json!(6.0))).unwrap_err();
    assert!(error.to_string().contains("rope_theta is 6, but rope_parameters.rope_theta is 5"));
}

#[test]
fn llama3_keeps_short_waves_and_stretches_long_ones() {
    let rope = |scaling| RopeConfig { theta: 10_000.0, scaling };
    let frequencies = |rope: RopeConfig| -> Vec<f32> {
        Vec::try_from(rope.inverse_frequencies(64, Device::Cpu).unwrap()).unwrap()
    };
    let plain = frequencies(rope(RopeScaling::Default));
    let scaled = frequencies(rope(RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 1024.0,
    }));
    assert_eq!(plain.len(), 32);
    let mut between = 0;
    for (plain, scaled) in plain.iter().zip(&scaled) {
        let wavelength = std::f32::consts::TAU / plain;
        if wavelength < 256.0 {
            assert_eq!(plain, scaled);
        } else if wavelength > 1024.0 {
            assert_eq!(plain / 8.0, *scaled);
        } else {
            between += 1;
            assert!(*scaled < *plain && *scaled > plain / 8.0);
        }
    }
    assert!(between > 0);
}

#[test]
fn a_negative_padding_id_counts_from_the_end() {
    let config = parse(&with(llama(), "pad_token_id", json!(-1))).unwrap();
    assert_eq!(config.pad_token_id, Some(99));
}
