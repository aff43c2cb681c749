//! The model families, by the names that `config.json` has for them.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::model::error::ModelError;

/// The model families this decoder computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`: Llama with a sliding window.
    Mistral,
    /// `Qwen2ForCausalLM`: Llama with biases on queries, keys and values.
    Qwen2,
    /// `Qwen3ForCausalLM`: Llama with a norm on each query and key head.
    Qwen3,
    /// `Gemma3ForCausalLM`, and the text part of `Gemma3ForConditionalGeneration`: norms on
    /// heads and around attention and MLP, GeGLU, five layers with a window to one without.
    Gemma3,
}

/// A class of transformers that a checkpoint is of.
struct Class {
    name: &'static str,
    model_type: &'static str,
    architecture: Architecture,
    /// `model_type` of the section that describes the decoder, where there is more than it.
    text_model_type: Option<&'static str>,
}

const CLASSES: [Class; 6] = [
    Class::plain("LlamaForCausalLM", "llama", Architecture::Llama),
    Class::plain("MistralForCausalLM", "mistral", Architecture::Mistral),
    Class::plain("Qwen2ForCausalLM", "qwen2", Architecture::Qwen2),
    Class::plain("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
    Class::plain("Gemma3ForCausalLM", "gemma3_text", Architecture::Gemma3),
    Class {
        name: "Gemma3ForConditionalGeneration",
        model_type: "gemma3",
        architecture: Architecture::Gemma3,
        text_model_type: Some("gemma3_text"),
    },
];

impl Class {
    const fn plain(
        name: &'static str,
        model_type: &'static str,
        architecture: Architecture,
    ) -> Self {
        Self { name, model_type, architecture, text_model_type: None }
    }

    fn supported() -> String {
        let names: Vec<_> = CLASSES.iter().map(|class| class.name).collect();
        let (last, others) = names.split_last().unwrap_or((&"", &[]));
        format!("{} and {last}", others.join(", "))
    }
}

/// The part of a `config.json` that describes the decoder.
pub(super) struct Described {
    pub(super) architecture: Architecture,
    /// Whether the file describes more than the decoder.
    pub(super) multimodal: bool,
    /// The decoder's entries, with what transformers takes for those that are absent.
    pub(super) entries: Map<String, Value>,
}

/// Finds it in all of the file's `entries`.
pub(super) fn describe(
    mut entries: Map<String, Value>,
    path: &Path,
) -> Result<Described, ModelError> {
    let names: Vec<&str> = match entries.get("architectures") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let class = match names.as_slice() {
        [name] => CLASSES.iter().find(|class| class.name == *name),
        _ => None,
    };
    let Some(class) = class else {
        let found = if names.is_empty() { "missing".to_owned() } else { names.join(", ") };
        return Err(ModelError::unsupported(path, "architectures", found, &Class::supported()));
    };
    check_type(&entries, "model_type", class.model_type, class.name, path)?;
    if let Some(text_model_type) = class.text_model_type {
        let Some(Value::Object(text)) = entries.remove("text_config") else {
            let problem = format!("text_config is missing, expected a section for {}", class.name);
            return Err(ModelError::malformed(path, problem));
        };
        check_type(&text, "text_config.model_type", text_model_type, class.name, path)?;
        // What is said of the whole file is said of the decoder too.
        if let (Some(outer), Some(inner)) =
            (entries.get("tie_word_embeddings"), text.get("tie_word_embeddings"))
            && outer != inner
        {
            let problem = format!(
                "tie_word_embeddings is {outer}, but text_config.tie_word_embeddings is {inner}"
            );
            return Err(ModelError::malformed(path, problem));
        }
        let quantization = entries.remove("quantization_config");
        entries = text;
        entries.extend(quantization.map(|value| ("quantization_config".to_owned(), value)));
    }
    for (key, value) in class.architecture.defaults() {
        entries.entry(key).or_insert(value);
    }
    Ok(Described {
        architecture: class.architecture,
        multimodal: class.text_model_type.is_some(),
        entries,
    })
}

fn check_type(
    entries: &Map<String, Value>,
    field: &str,
    expected: &str,
    class: &str,
    path: &Path,
) -> Result<(), ModelError> {
    match entries.get("model_type").and_then(Value::as_str) {
        Some(found) if found != expected => {
            let supported = format!("{expected} for {class}");
            Err(ModelError::unsupported(path, field, found, &supported))
        }
        _ => Ok(()),
    }
}

impl Architecture {
    /// Base of the rotary embedding of Gemma-3's layers with a window.
    pub(super) const LOCAL_THETA: f64 = 10_000.0;

    /// Base of the rotary embedding where the file is silent.
    pub(super) fn theta(self) -> f64 {
        match self {
            Self::Gemma3 => 1_000_000.0,
            _ => 10_000.0,
        }
    }

    /// What transformers takes for entries that are absent; one that is null was set so.
    /// Numbers of heads are left out where the default is one large model's: a trap.
    fn defaults(self) -> Map<String, Value> {
        let defaults = match self {
            Self::Llama => json!({}),
            Self::Mistral | Self::Qwen2 => json!({"sliding_window": 4096}),
            Self::Qwen3 => json!({"sliding_window": 4096, "head_dim": 128}),
            Self::Gemma3 => json!({
                "vocab_size": 262_208,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh",
                "max_position_embeddings": 131_072,
                "pad_token_id": 0,
                "tie_word_embeddings": true,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "sliding_window_pattern": 6,
            }),
        };
        match defaults {
            Value::Object(defaults) => defaults,
            _ => Map::new(),
        }
    }
}
