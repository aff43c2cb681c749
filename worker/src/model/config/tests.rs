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

fn of_family(class: &str, model_type: &str) -> Value {
    let mut config = llama();
    config["architectures"] = json!([class]);
    config["model_type"] = json!(model_type);
    config.as_object_mut().unwrap().remove("hidden_act");
    config
}

fn mistral() -> Value {
    of_family("MistralForCausalLM", "mistral")
}

fn qwen3() -> Value {
    of_family("Qwen3ForCausalLM", "qwen3")
}

fn gemma3() -> Value {
    with(of_family("Gemma3ForCausalLM", "gemma3_text"), "num_hidden_layers", json!(7))
}

/// As the files of Gemma-3's multimodal models have it.
fn multimodal() -> Value {
    json!({
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {"hidden_size": 1152},
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360,
            "num_attention_heads": 16, "num_hidden_layers": 48, "num_key_value_heads": 8,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024
        }
    })
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
    assert_eq!(config.windows, [None, None]);
    assert_eq!(config.attention_scale, 0.25);
    assert_eq!(config.head, Head::Vocabulary);
    assert!(!config.qkv_bias && !config.output_bias);
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
        (with(llama(), "architectures", json!(["PhiForCausalLM"])), "architectures is PhiForC"),
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
        (with(llama(), "layer_types", windowed.clone()), "layer_types is sliding_attention"),
        (with(mistral(), "layer_types", windowed), "layer_types is full_attention"),
        (
            with(qwen3(), "layer_types", json!(["full_attention", "linear_attention"])),
            "layer_types is linear_attention",
        ),
        (with(gemma3(), "hidden_activation", json!("relu")), "hidden_activation is relu"),
        (with(gemma3(), "attn_logit_softcapping", json!(50)), "attn_logit_softcapping is 50"),
        (with(gemma3(), "final_logit_softcapping", json!(30.0)), "final_logit_softcapping is 30"),
        (
            with(gemma3(), "use_bidirectional_attention", json!(true)),
            "use_bidirectional_attention is true",
        ),
        (with(multimodal(), "quantization_config", json!({})), "quantization_config is present"),
        (
            with(multimodal(), "text_config", json!({"model_type": "gemma2"})),
            "text_config.model_type is gemma2",
        ),
    ];
    for (config, expected) in cases {
        let error = parse(&config).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{message}");
        assert!(message.starts_with(&format!("m/config.json: {expected}")), "{message}");
        assert!(message.contains("but the worker supports"), "{message}");
    }
}

#[test]
fn windows_are_where_transformers_has_them() {
    let windows = |config: Value| parse(&config).unwrap().windows;
    let off = with(with(qwen2(), "sliding_window", json!(9)), "max_window_layers", json!(1));
    assert_eq!(windows(with(off.clone(), "use_sliding_window", json!(false))), [None, None]);
    let on = with(off, "use_sliding_window", json!(true));
    assert_eq!(windows(on.clone()), [None, Some(9)]);
    // On, but from a layer on that the model does not have: Qwen2.5's files.
    assert_eq!(windows(with(on.clone(), "max_window_layers", json!(2))), [None, None]);
    let types = json!(["sliding_attention", "full_attention"]);
    assert_eq!(windows(with(on, "layer_types", types)), [Some(9), None]);

    // What is absent is transformers' default, and what is null is null.
    assert_eq!(windows(mistral()), [Some(4096); 2]);
    assert_eq!(windows(with(mistral(), "sliding_window", Value::Null)), [None, None]);

    let by_six: Vec<_> = (0..7).map(|layer| (layer != 5).then_some(4096)).collect();
    assert_eq!(windows(gemma3()), by_six);
    let by_two = windows(with(gemma3(), "sliding_window_pattern", json!(2)));
    assert_eq!(by_two.iter().filter(|window| window.is_none()).count(), 3);
    assert_eq!(by_two[1], None);
}

#[test]
fn a_multimodal_file_is_read_for_its_text_part() {
    let config = parse(&multimodal()).unwrap();
    assert_eq!(config.head, Head::Tied);
    assert!(config.multimodal && config.qk_norm);
    assert_eq!((config.vocab_size, config.head_dim), (262_208, 256));
    assert_eq!(config.pad_token_id, Some(0));
    assert_eq!(config.windows.iter().flatten().collect::<Vec<_>>(), [&1024; 40]);
    assert_eq!(config.rope.theta, 1e6);
    assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 8.0 });
    let local = RopeConfig { theta: 1e4, scaling: RopeScaling::Default };
    assert_eq!(config.local_rope, Some(local));

    // What the coordinator plans with.
    let planned = include_str!("../../../../configs/models/gemma-3-12b-it.json");
    assert_eq!(ModelConfig::parse(planned, Path::new("config.json")).unwrap(), config);

    let mut nested = multimodal();
    let text = nested["text_config"].as_object_mut().unwrap();
    text.remove("rope_scaling");
    text["sliding_window"] = json!(1024);
    text.insert(
        "rope_parameters".to_owned(),
        json!({
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}
        }),
    );
    assert_eq!(parse(&nested).unwrap(), config);
}

#[test]
fn numbers_out_of_range_are_refused() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0});
    let cases = [
        (with(llama(), "hidden_size", json!(0)), "hidden_size is 0"),
        (with(llama(), "vocab_size", json!(1_i64 << 40)), "vocab_size is 1099511627776"),
        (with(llama(), "num_hidden_layers", json!(4097)), "is 4097, expected 1 to 4096"),
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
        (with(mistral(), "num_key_value_heads", Value::Null), "num_key_value_heads is missing"),
        (
            with(qwen3(), "layer_types", json!(["sliding_attention", "sliding_attention"])),
            "use_sliding_window is not true",
        ),
        (with(qwen3(), "layer_types", json!(["full_attention"])), "1 entries for 2 layers"),
        (with(gemma3(), "sliding_window", Value::Null), "sliding_window is missing"),
        (with(gemma3(), "sliding_window_pattern", json!(0)), "sliding_window_pattern is 0"),
        (with(gemma3(), "query_pre_attn_scalar", json!(-1)), "query_pre_attn_scalar is -1"),
        (with(gemma3(), "rope_local_base_freq", json!(0)), "rope_local_base_freq is 0"),
        (
            with(gemma3(), "rope_parameters", json!({"full_attention": {"rope_theta": 1e6}})),
            "rope_parameters.sliding_attention is missing",
        ),
        (with(multimodal(), "text_config", Value::Null), "text_config is missing"),
        (
            with(with(multimodal(), "tie_word_embeddings", json!(false)), "text_config", {
                with(multimodal()["text_config"].clone(), "tie_word_embeddings", json!(true))
            }),
            "tie_word_embeddings is false, but text_config.tie_word_embeddings is true",
        ),
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
