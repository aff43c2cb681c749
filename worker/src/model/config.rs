//! `config.json`, read strictly: what the decoder cannot compute is refused by name.

mod family;
mod file;
mod head;
mod rope;
mod windows;

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::ModelError;
use super::ops::{Activation, NormScale};
pub use family::Architecture;
use family::Described;
pub(crate) use family::{Purpose, classes};
pub(crate) use file::{ConfigFile, typed};
pub use head::Head;
pub(crate) use head::check_one_label;
pub use rope::{RopeConfig, RopeScaling};

/// Largest size accepted for any one dimension: far above any model's, and low
/// enough that products of two stay clear of overflow.
const MAX_DIMENSION: i64 = 1 << 24;
/// As for layers, each of which takes memory before a weight is looked for.
const MAX_LAYERS: i64 = 1 << 12;

/// A decoder's shape and constants, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family, from `architectures`.
    pub architecture: Architecture,
    /// Whether the files hold more than the decoder, such as a vision tower.
    pub multimodal: bool,
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
    /// What the norms' weights say.
    pub norm_scale: NormScale,
    /// Whether each query and key head is normed ahead of its rotation.
    pub qk_norm: bool,
    /// Whether what attention and MLP add to the residual is normed too.
    pub sandwich_norms: bool,
    /// The MLP's.
    pub activation: Activation,
    /// Whether embeddings are multiplied by √`hidden_size`.
    pub scaled_embedding: bool,
    /// What scores are multiplied by ahead of the softmax.
    pub attention_scale: f64,
    /// For each block how many tokens a query sees, itself included; none where all before it.
    pub windows: Vec<Option<i64>>,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// That of blocks with a window, where it is another.
    pub local_rope: Option<RopeConfig>,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub output_bias: bool,
    /// What stands behind the final norm.
    pub head: Head,
    /// The token whose embedding row gets no gradient from look-ups, as
    /// `torch.nn.Embedding(padding_idx=…)` has it in transformers.
    pub pad_token_id: Option<i64>,
}

/// The entries of `config.json` that change what is computed.
#[derive(Deserialize)]
struct RawConfig {
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
    hidden_activation: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    attention_dropout: Option<f64>,
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    use_bidirectional_attention: Option<bool>,
    tie_word_embeddings: Option<bool>,
    pad_token_id: Option<i64>,
    partial_rotary_factor: Option<f64>,
    rope_interleaved: Option<bool>,
    rope_theta: Option<f64>,
    rope_local_base_freq: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    rope_parameters: Option<Map<String, Value>>,
    sliding_window: Option<i64>,
    sliding_window_pattern: Option<i64>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<i64>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
}

impl ModelConfig {
    /// Reads `config.json` in `dir`: a language model's.
    ///
    /// Errors name the file, the field, what it holds and what is supported.
    pub fn read(dir: &Path) -> Result<Self, ModelError> {
        Self::of(ConfigFile::read(dir)?, Purpose::Text)
    }

    /// Checks the text of a language model's `config.json`; `path` is what errors name.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ModelError> {
        Self::of(ConfigFile::parse(text, path)?, Purpose::Text)
    }

    /// Checks what `file` says of a decoder that is to serve `purpose`.
    pub(crate) fn of(file: ConfigFile, purpose: Purpose) -> Result<Self, ModelError> {
        if purpose == Purpose::Rating {
            check_one_label(&file)?;
        }
        let path = &file.path.clone();
        let Described { architecture, multimodal, entries } = family::describe(file, purpose)?;
        let raw: RawConfig = typed(entries, path)?;
        refuse_unsupported(&raw, path)?;

        let size = |field: &str, value: i64| size(field, value, path);
        let hidden_size = size("hidden_size", raw.hidden_size)?;
        let vocab_size = size("vocab_size", raw.vocab_size)?;
        let heads = size("num_attention_heads", raw.num_attention_heads)?;
        let kv_heads = match (raw.num_key_value_heads, architecture) {
            (Some(kv_heads), _) => size("num_key_value_heads", kv_heads)?,
            (None, Architecture::Llama) => heads,
            // transformers' default is one large model's: a trap, not a default.
            (None, _) => {
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
        let (qkv_bias, output_bias) = biases(architecture, raw.attention_bias == Some(true));
        let gemma = architecture == Architecture::Gemma3;
        let (rope, local_rope) = rope::parse(&raw, architecture, path)?;
        Ok(Self {
            architecture,
            multimodal,
            vocab_size,
            hidden_size,
            intermediate_size: size("intermediate_size", raw.intermediate_size)?,
            num_hidden_layers: layers(raw.num_hidden_layers, path)?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: match raw.max_position_embeddings {
                Some(positions) => size("max_position_embeddings", positions)?,
                None => 2048,
            },
            rms_norm_eps,
            norm_scale: if gemma { NormScale::OnePlusWeight } else { NormScale::Weight },
            qk_norm: gemma || architecture == Architecture::Qwen3,
            sandwich_norms: gemma,
            activation: activation(&raw, architecture, path)?,
            scaled_embedding: gemma,
            attention_scale: attention_scale(&raw, architecture, head_dim, path)?,
            windows: windows::parse(&raw, architecture, path)?,
            rope,
            local_rope,
            qkv_bias,
            output_bias,
            head: match (purpose, raw.tie_word_embeddings) {
                (Purpose::Rating, _) => Head::Rating,
                (Purpose::Text, Some(true)) => Head::Tied,
                (Purpose::Text, _) => Head::Vocabulary,
            },
            pad_token_id: pad_token(raw.pad_token_id, vocab_size, path)?,
        })
    }

    /// Rows of the fused query, key and value projection.
    pub fn qkv_rows(&self) -> i64 {
        (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
    }
}

/// Checks a dimension.
pub(crate) fn size(field: &str, value: i64, path: &Path) -> Result<i64, ModelError> {
    bounded(field, value, MAX_DIMENSION, path)
}

/// Checks `num_hidden_layers`.
pub(crate) fn layers(value: i64, path: &Path) -> Result<i64, ModelError> {
    bounded("num_hidden_layers", value, MAX_LAYERS, path)
}

fn bounded(field: &str, value: i64, most: i64, path: &Path) -> Result<i64, ModelError> {
    if (1..=most).contains(&value) {
        return Ok(value);
    }
    let problem = format!("{field} is {value}, expected 1 to {most}");
    Err(ModelError::malformed(path, problem))
}

/// Of queries, keys and values, and of attention's output, given `attention_bias`.
fn biases(architecture: Architecture, attention_bias: bool) -> (bool, bool) {
    match architecture {
        Architecture::Llama | Architecture::Qwen3 | Architecture::Gemma3 => {
            (attention_bias, attention_bias)
        }
        Architecture::Qwen2 => (true, false),
        Architecture::Mistral => (false, false),
    }
}

fn activation(
    raw: &RawConfig,
    architecture: Architecture,
    path: &Path,
) -> Result<Activation, ModelError> {
    let (field, name) = match architecture {
        Architecture::Gemma3 => ("hidden_activation", &raw.hidden_activation),
        _ => ("hidden_act", &raw.hidden_act),
    };
    let name = name.as_deref().unwrap_or("silu");
    Activation::named(name)
        .ok_or_else(|| ModelError::unsupported(path, field, name, "silu and gelu_pytorch_tanh"))
}

fn attention_scale(
    raw: &RawConfig,
    architecture: Architecture,
    head_dim: i64,
    path: &Path,
) -> Result<f64, ModelError> {
    let squared = match (architecture, raw.query_pre_attn_scalar) {
        (Architecture::Gemma3, Some(scalar)) => scalar,
        _ => head_dim as f64,
    };
    if !(squared.is_finite() && squared > 0.0) {
        let problem = format!("query_pre_attn_scalar is {squared}, expected a positive number");
        return Err(ModelError::malformed(path, problem));
    }
    Ok(1.0 / squared.sqrt())
}

/// Refuses whatever `quantization_config` says.
pub(crate) fn refuse_quantized(
    quantization: Option<&Value>,
    path: &Path,
) -> Result<(), ModelError> {
    let Some(quantization) = quantization else { return Ok(()) };
    let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("present");
    Err(ModelError::unsupported(path, "quantization_config", method, "unquantised weights only"))
}

fn refuse_unsupported(raw: &RawConfig, path: &Path) -> Result<(), ModelError> {
    let refuse = |field: &str, found: String, supported: &str| {
        Err(ModelError::unsupported(path, field, found, supported))
    };
    refuse_quantized(raw.quantization_config.as_ref(), path)?;
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
    for (field, cap) in [
        ("attn_logit_softcapping", raw.attn_logit_softcapping),
        ("final_logit_softcapping", raw.final_logit_softcapping),
    ] {
        if let Some(cap) = cap {
            return refuse(field, cap.to_string(), "null");
        }
    }
    for (field, on) in [
        ("mlp_bias", raw.mlp_bias),
        ("rope_interleaved", raw.rope_interleaved),
        ("use_bidirectional_attention", raw.use_bidirectional_attention),
    ] {
        if on == Some(true) {
            return refuse(field, "true".to_owned(), "false");
        }
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
