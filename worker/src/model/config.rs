//! `config.json`, read strictly: what the decoder cannot compute is refused by name.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::ModelError;
use super::rope::RopeConfig;

/// Largest size accepted for any one dimension: far above any model's, and low
/// enough that products of two stay clear of overflow.
const MAX_DIMENSION: i64 = 1 << 24;

/// The model families this decoder computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`: Llama with biases on queries, keys and values.
    Qwen2,
}

/// A decoder's shape and constants, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family, from `architectures`.
    pub architecture: Architecture,
    /// Rows of the embedding and of the head.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the gated MLP.
    pub intermediate_size: i64,
    /// Number of blocks.
    pub num_hidden_layers: i64,
    /// Query heads per block.
    pub num_attention_heads: i64,
    /// Key and value heads per block; divides `num_attention_heads`.
    pub num_key_value_heads: i64,
    /// Width of one head; `hidden_size / num_attention_heads` where the file is silent. Even.
    pub head_dim: i64,
    /// Context the model was made for, in tokens. Rotary positions go on beyond it.
    pub max_position_embeddings: i64,
    /// ε under RMSNorm's root.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the head is the embedding itself.
    pub tie_word_embeddings: bool,
    /// The token whose embedding row gets no gradient from look-ups, as
    /// `torch.nn.Embedding(padding_idx=…)` has it in transformers.
    pub pad_token_id: Option<i64>,
}

/// The fields of `config.json` that change what is computed.
#[derive(Deserialize)]
pub(super) struct RawConfig {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    max_position_embeddings: Option<i64>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    attention_dropout: Option<f64>,
    tie_word_embeddings: Option<bool>,
    pad_token_id: Option<i64>,
    partial_rotary_factor: Option<f64>,
    rope_interleaved: Option<bool>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<Map<String, Value>>,
    pub(super) rope_parameters: Option<Map<String, Value>>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<i64>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
}

impl ModelConfig {
    /// Reads `config.json` in `dir`.
    ///
    /// Errors name the file, the field, what it holds and what is supported.
    pub fn read(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(ModelError::io("read", &path))?;
        Self::parse(&text, &path)
    }

    /// Checks the text of a `config.json`; `path` is what errors name.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ModelError> {
        let raw: RawConfig = serde_json::from_str(text)
            .map_err(|e| ModelError::malformed(path, format!("not a model configuration: {e}")))?;
        let architecture = architecture(&raw, path)?;
        refuse_unsupported(&raw, architecture, path)?;

        let size = |field: &str, value: i64| match value {
            1..=MAX_DIMENSION => Ok(value),
            _ => Err(ModelError::malformed(
                path,
                format!("{field} is {value}, expected 1 to {MAX_DIMENSION}"),
            )),
        };
        let hidden_size = size("hidden_size", raw.hidden_size)?;
        let vocab_size = size("vocab_size", raw.vocab_size)?;
        let heads = size("num_attention_heads", raw.num_attention_heads)?;
        let kv_heads = match (raw.num_key_value_heads, architecture) {
            (Some(kv_heads), _) => size("num_key_value_heads", kv_heads)?,
            (None, Architecture::Llama) => heads,
            // transformers' default is the constant 32: a trap, not a default.
            (None, Architecture::Qwen2) => {
                return Err(ModelError::malformed(
                    path,
                    "num_key_value_heads is missing; write the number into the file",
                ));
            }
        };
        if heads % kv_heads != 0 {
            return Err(ModelError::malformed(
                path,
                format!(
                    "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
                ),
            ));
        }
        let head_dim = match raw.head_dim {
            Some(head_dim) => size("head_dim", head_dim)?,
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => {
                return Err(ModelError::malformed(
                    path,
                    format!(
                        "hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, \
                         and head_dim is missing"
                    ),
                ));
            }
        };
        if head_dim % 2 != 0 {
            return Err(ModelError::malformed(
                path,
                format!("head_dim is {head_dim}, expected an even number for rotary embeddings"),
            ));
        }
        let rms_norm_eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
            return Err(ModelError::malformed(
                path,
                format!("rms_norm_eps is {rms_norm_eps}, expected a number from 0"),
            ));
        }
        let bias = raw.attention_bias.unwrap_or(false);
        Ok(Self {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: size("intermediate_size", raw.intermediate_size)?,
            num_hidden_layers: size("num_hidden_layers", raw.num_hidden_layers)?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: match raw.max_position_embeddings {
                Some(positions) => size("max_position_embeddings", positions)?,
                None => 2048,
            },
            rms_norm_eps,
            rope: RopeConfig::parse(&raw, path)?,
            qkv_bias: architecture == Architecture::Qwen2 || bias,
            output_bias: architecture == Architecture::Llama && bias,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            pad_token_id: pad_token(raw.pad_token_id, vocab_size, path)?,
        })
    }

    /// Rows of the fused query, key and value projection.
    pub fn qkv_rows(&self) -> i64 {
        (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
    }
}

fn architecture(raw: &RawConfig, path: &Path) -> Result<Architecture, ModelError> {
    const SUPPORTED: &str = "LlamaForCausalLM and Qwen2ForCausalLM";
    let names = raw.architectures.as_deref().unwrap_or_default();
    let (architecture, model_type) = match names {
        [name] if name == "LlamaForCausalLM" => (Architecture::Llama, "llama"),
        [name] if name == "Qwen2ForCausalLM" => (Architecture::Qwen2, "qwen2"),
        [] => {
            return Err(ModelError::unsupported(path, "architectures", "missing", SUPPORTED));
        }
        other => {
            return Err(ModelError::unsupported(
                path,
                "architectures",
                other.join(", "),
                SUPPORTED,
            ));
        }
    };
    match &raw.model_type {
        Some(found) if found != model_type => {
            let supported = format!("{model_type} for {}", names[0]);
            Err(ModelError::unsupported(path, "model_type", found, &supported))
        }
        _ => Ok(architecture),
    }
}

fn refuse_unsupported(
    raw: &RawConfig,
    architecture: Architecture,
    path: &Path,
) -> Result<(), ModelError> {
    let refuse = |field: &str, found: String, supported: &str| {
        Err(ModelError::unsupported(path, field, found, supported))
    };
    if let Some(quantization) = &raw.quantization_config {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("present");
        return refuse("quantization_config", method.to_owned(), "unquantised weights only");
    }
    match raw.hidden_act.as_deref() {
        None | Some("silu" | "swish") => {}
        Some(other) => return refuse("hidden_act", other.to_owned(), "silu"),
    }
    if raw.mlp_bias == Some(true) {
        return refuse("mlp_bias", "true".to_owned(), "false");
    }
    if let Some(dropout) = raw.attention_dropout
        && dropout != 0.0
    {
        let supported = "0, as preference training has it; set it to 0 in the file";
        return refuse("attention_dropout", dropout.to_string(), supported);
    }
    if let Some(factor) = raw.partial_rotary_factor
        && factor != 1.0
    {
        return refuse("partial_rotary_factor", factor.to_string(), "1");
    }
    if raw.rope_interleaved == Some(true) {
        return refuse("rope_interleaved", "true".to_owned(), "false");
    }
    let other_layer = raw.layer_types.iter().flatten().find(|kind| *kind != "full_attention");
    if let Some(kind) = other_layer {
        return refuse("layer_types", kind.to_owned(), "full_attention in every layer");
    }
    // A window only counts where it is switched on, and from layer
    // `max_window_layers` upward; an explicit `layer_types` has had its say.
    let windowed = architecture == Architecture::Qwen2
        && raw.use_sliding_window == Some(true)
        && raw.layer_types.is_none()
        && raw.max_window_layers.unwrap_or(28) < raw.num_hidden_layers;
    if windowed {
        return refuse("use_sliding_window", "true".to_owned(), "full attention in every layer");
    }
    Ok(())
}

/// Python's indexing: a negative id counts from the vocabulary's end.
fn pad_token(id: Option<i64>, vocab_size: i64, path: &Path) -> Result<Option<i64>, ModelError> {
    let Some(id) = id else { return Ok(None) };
    let row = if id < 0 { id + vocab_size } else { id };
    if (0..vocab_size).contains(&row) {
        return Ok(Some(row));
    }
    let problem = format!("pad_token_id is {id}, outside the vocabulary of {vocab_size}");
    Err(ModelError::malformed(path, problem))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
