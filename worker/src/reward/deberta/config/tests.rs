use std::path::Path;

use serde_json::json;

use super::*;

/// What OpenAssistant's reward-model-deberta-v3-large-v2 has, smaller.
fn config() -> Value {
    json!({
        "architectures": ["DebertaV2ForSequenceClassification"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 64,
        "id2label": {"0": "LABEL_0"},
        "intermediate_size": 96,
        "label2id": {"LABEL_0": 0},
        "layer_norm_eps": 1e-7,
        "max_position_embeddings": 512,
        "max_relative_positions": -1,
        "model_type": "deberta-v2",
        "norm_rel_ebd": "layer_norm",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": 64,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": false,
        "position_buckets": 256,
        "relative_attention": true,
        "share_att_key": true,
        "type_vocab_size": 0,
        "vocab_size": 100
    })
}

fn with(field: &str, value: Value) -> Value {
    let mut config = config();
    config[field] = value;
    config
}

fn without(field: &str) -> Value {
    let mut config = config();
    config.as_object_mut().unwrap().remove(field);
    config
}

fn parse(config: &Value) -> Result<DebertaConfig, ModelError> {
    let file = ConfigFile::parse(&config.to_string(), Path::new("m/config.json"))?;
    DebertaConfig::of(file)
}

#[test]
fn the_entries_of_the_hub_are_understood() {
    let expected = DebertaConfig {
        vocab_size: 100,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        max_position_embeddings: 512,
        layer_norm_eps: 1e-7,
        positions: Positions {
            farthest: 512,
            buckets: Some(256),
            content_to_position: true,
            position_to_content: true,
            normed: true,
        },
    };
    assert_eq!(parse(&config()).unwrap(), expected);
    for same in [
        with("pos_att_type", json!("p2c|c2p")),
        with("pos_att_type", json!("C2P | p2c")),
        with("norm_rel_ebd", json!("none|layer_norm")),
        with("quantization_config", Value::Null),
        without("max_position_embeddings"),
        without("layer_norm_eps"),
        without("pooler_hidden_size"),
        without("hidden_act"),
    ] {
        assert_eq!(parse(&same).unwrap(), expected, "{same}");
    }
    let of = |config: Value| parse(&config).unwrap().positions;
    assert!(!of(with("pos_att_type", json!("c2p"))).position_to_content);
    assert!(!of(with("pos_att_type", json!(["p2c"]))).content_to_position);
    assert!(!of(without("norm_rel_ebd")).normed);
    assert_eq!(of(with("max_relative_positions", json!(300))).farthest, 300);
    assert_eq!((of(without("position_buckets")).buckets, of(config()).span()), (None, 256));
    assert_eq!(of(with("position_buckets", json!(-1))).span(), 512);
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (config, expected) in [
        (with("model_type", json!("deberta")), "model_type is deberta"),
        (with("relative_attention", json!(false)), "relative_attention is false"),
        (without("relative_attention"), "relative_attention is false"),
        (with("position_biased_input", json!(true)), "position_biased_input is true"),
        (without("position_biased_input"), "position_biased_input is true"),
        (with("share_att_key", json!(false)), "share_att_key is false"),
        (without("share_att_key"), "share_att_key is false"),
        (with("type_vocab_size", json!(2)), "type_vocab_size is 2"),
        (with("conv_kernel_size", json!(3)), "conv_kernel_size is 3"),
        (with("hidden_act", json!("gelu_new")), "hidden_act is gelu_new"),
        (with("pooler_hidden_act", json!("tanh")), "pooler_hidden_act is tanh"),
        (with("attention_head_size", json!(32)), "attention_head_size is 32"),
        (with("embedding_size", json!(32)), "embedding_size is 32"),
        (with("pooler_hidden_size", json!(32)), "pooler_hidden_size is 32"),
        (with("pos_att_type", json!("c2p|p2p")), "pos_att_type is c2p|p2p"),
        (with("pos_att_type", json!([])), "pos_att_type is missing"),
        (without("pos_att_type"), "pos_att_type is missing"),
        (with("norm_rel_ebd", json!("batch_norm")), "norm_rel_ebd is batch_norm"),
        (with("id2label", json!({"0": "bad", "1": "good"})), "id2label is of 2 labels"),
        (without("id2label"), "num_labels is of 2 labels"),
        (with("quantization_config", json!({"quant_method": "awq"})), "quantization_config is awq"),
    ] {
        let message = parse(&config).unwrap_err().to_string();
        assert!(message.starts_with("m/config.json: "), "{message}");
        assert!(message.contains(expected), "{expected}: {message}");
        assert!(message.contains("but the worker supports"), "{message}");
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    for (config, expected) in [
        (with("vocab_size", json!(0)), "vocab_size is 0"),
        (with("num_hidden_layers", json!(9_000_000)), "is 9000000, expected 1 to 4096"),
        (with("num_attention_heads", json!(5)), "hidden_size 64 is not a multiple"),
        (with("layer_norm_eps", json!(-1.0)), "layer_norm_eps is -1"),
        (with("position_buckets", json!(1)), "position_buckets is 1, expected 2 to under 1022"),
        (with("position_buckets", json!(1022)), "position_buckets is 1022"),
        (with("hidden_size", json!("64")), "not a model configuration"),
    ] {
        let message = parse(&config).unwrap_err().to_string();
        assert!(message.contains(expected), "{expected}: {message}");
    }
    assert!(parse(&with("position_buckets", json!(1021))).is_ok());
}
