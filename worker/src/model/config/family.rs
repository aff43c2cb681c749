//! The model families, by the names that `config.json` has for them.

use serde_json::{Map, Value, json};

use super::file::{ConfigFile, check_type};
use crate::model::error::ModelError;

/// The model families this decoder computes, by the classes that write text; most have one
/// that rates it, too.
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

/// What a model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Its next tokens.
    Text,
    /// One number for a whole sequence.
    Rating,
}

/// A class of transformers that a checkpoint is of.
struct Class {
    name: &'static str,
    model_type: &'static str,
    architecture: Architecture,
    purpose: Purpose,
    /// `model_type` of the section that describes the decoder, where there is more than it.
    text_model_type: Option<&'static str>,
}

const CLASSES: [Class; 11] = [
    Class::text("LlamaForCausalLM", "llama", Architecture::Llama),
    Class::text("MistralForCausalLM", "mistral", Architecture::Mistral),
    Class::text("Qwen2ForCausalLM", "qwen2", Architecture::Qwen2),
    Class::text("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
    Class::text("Gemma3ForCausalLM", "gemma3_text", Architecture::Gemma3),
    Class {
        text_model_type: Some("gemma3_text"),
        ..Class::text("Gemma3ForConditionalGeneration", "gemma3", Architecture::Gemma3)
    },
    Class::rating("LlamaForSequenceClassification", "llama", Architecture::Llama),
    Class::rating("MistralForSequenceClassification", "mistral", Architecture::Mistral),
    Class::rating("Qwen2ForSequenceClassification", "qwen2", Architecture::Qwen2),
    Class::rating("Qwen3ForSequenceClassification", "qwen3", Architecture::Qwen3),
    Class::rating("Gemma3TextForSequenceClassification", "gemma3_text", Architecture::Gemma3),
];

impl Class {
    const fn text(
        name: &'static str,
        model_type: &'static str,
        architecture: Architecture,
    ) -> Self {
        Self { name, model_type, architecture, purpose: Purpose::Text, text_model_type: None }
    }

    const fn rating(
        name: &'static str,
        model_type: &'static str,
        architecture: Architecture,
    ) -> Self {
        Self { purpose: Purpose::Rating, ..Self::text(name, model_type, architecture) }
    }
}

/// The classes that serve `purpose`, by name.
pub(crate) fn classes(purpose: Purpose) -> Vec<&'static str> {
    let serving = CLASSES.iter().filter(|class| class.purpose == purpose);
    serving.map(|class| class.name).collect()
}

/// The part of a `config.json` that describes the decoder.
pub(super) struct Described {
    pub(super) architecture: Architecture,
    /// Whether the file describes more than the decoder.
    pub(super) multimodal: bool,
    /// The decoder's entries, with what transformers takes for those that are absent.
    pub(super) entries: Map<String, Value>,
}

/// Finds it in `file`, which is to serve `purpose`.
pub(super) fn describe(file: ConfigFile, purpose: Purpose) -> Result<Described, ModelError> {
    let serves = |class: &&Class| class.purpose == purpose && file.class() == Some(class.name);
    let Some(class) = CLASSES.iter().find(serves) else {
        return Err(file.unsupported_class(&classes(purpose)));
    };
    file.check_type(class.model_type, class.name)?;
    let ConfigFile { path, mut entries } = file;
    if let Some(text_model_type) = class.text_model_type {
        let Some(Value::Object(text)) = entries.remove("text_config") else {
            let problem = format!("text_config is missing, expected a section for {}", class.name);
            return Err(ModelError::malformed(&path, problem));
        };
        check_type(&text, "text_config.model_type", text_model_type, class.name, &path)?;
        // What is said of the whole file is said of the decoder too.
        if let (Some(outer), Some(inner)) =
            (entries.get("tie_word_embeddings"), text.get("tie_word_embeddings"))
            && outer != inner
        {
            let problem = format!(
                "tie_word_embeddings is {outer}, but text_config.tie_word_embeddings is {inner}"
            );
            return Err(ModelError::malformed(&path, problem));
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
