//! How many weights a model has, and where.

use serde::Deserialize;

/// Why a `config.json` gives no shape.
#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    /// Not JSON, or without one of the entries that count.
    #[error("not a decoder's config.json: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Sizes that no model has.
    #[error("config.json: {0}")]
    Impossible(String),
}

/// The sizes that memory and time follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Width of hidden states.
    pub hidden: u64,
    /// Width between the halves of a block's MLP.
    pub intermediate: u64,
    /// Blocks.
    pub layers: u64,
    /// Width of all query heads together.
    pub queries: u64,
    /// Width of all key heads together; values have as much.
    pub keys: u64,
    /// Words.
    pub vocabulary: u64,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Weights of a block that are no matrix: norms and biases.
    small: u64,
    /// Hidden states of a block that are normed on their way to the residual.
    normed_outputs: u64,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    model_type: String,
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: u64,
    #[serde(default = "gemma_heads")]
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    #[serde(default = "gemma_vocabulary")]
    vocab_size: u64,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
}

/// What transformers takes where a Gemma-3 configuration leaves it out; the worker has the
/// same in `model/config/family.rs`.
fn gemma_heads() -> u64 {
    8
}

fn gemma_vocabulary() -> u64 {
    262_208
}

impl Shape {
    /// From the text of a `config.json`; of a multimodal one, its text part.
    ///
    /// # Errors
    /// What is missing or impossible.
    pub fn parse(text: &str) -> Result<Self, ShapeError> {
        let mut json: serde_json::Value = serde_json::from_str(text)?;
        if let Some(inner) = json.get_mut("text_config") {
            json = inner.take();
        }
        let config: Config = serde_json::from_value(json)?;
        let gemma = config.model_type.starts_with("gemma3");
        let heads = config.num_attention_heads;
        let kv_heads = config.num_key_value_heads.unwrap_or(if gemma { 4 } else { heads });
        let sizes = [config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads];
        let limit = 1 << 24;
        if sizes.iter().chain([&kv_heads, &config.vocab_size]).any(|&n| n == 0 || n > limit) {
            return Err(ShapeError::Impossible("a size is 0, or beyond all models".to_owned()));
        }
        let head_dim = match config.head_dim {
            Some(dim) if dim > 0 && dim <= limit => dim,
            Some(dim) => return Err(ShapeError::Impossible(format!("head_dim is {dim}"))),
            None if gemma => 256,
            None if config.model_type == "qwen3" => 128,
            None => config.hidden_size / heads,
        };
        let (hidden, queries, keys) = (config.hidden_size, heads * head_dim, kv_heads * head_dim);
        let normed_outputs = if gemma { 2 } else { 0 };
        let norms = (2 + normed_outputs) * hidden;
        let head_norms = if gemma || config.model_type == "qwen3" { 2 * head_dim } else { 0 };
        let qkv_bias = config.attention_bias || config.model_type == "qwen2";
        let biases = [
            (qkv_bias, queries + 2 * keys),
            (config.attention_bias, hidden),
            (config.mlp_bias, 2 * config.intermediate_size + hidden),
        ];
        let biases: u64 = biases.iter().filter(|(there, _)| *there).map(|(_, n)| n).sum();
        Ok(Self {
            hidden,
            intermediate: config.intermediate_size,
            layers: config.num_hidden_layers,
            queries,
            keys,
            vocabulary: config.vocab_size,
            // transformers' default is true; Llama's and Qwen2's own is false.
            tied: config.tie_word_embeddings.unwrap_or(gemma),
            small: norms + head_norms + biases,
            normed_outputs,
        })
    }

    /// Weights of a block's matrices.
    pub fn block_matrices(&self) -> u64 {
        let Self { hidden, intermediate, queries, keys, .. } = self;
        hidden * (2 * queries + 2 * keys + 3 * intermediate)
    }

    /// Weights of a block.
    pub fn block(&self) -> u64 {
        self.block_matrices() + self.small
    }

    /// Weights of the embedding, and of the head where it has its own.
    pub fn table(&self) -> u64 {
        self.vocabulary * self.hidden
    }

    /// All weights.
    pub fn parameters(&self) -> u64 {
        let tables = if self.tied { 1 } else { 2 };
        self.layers * self.block() + tables * self.table() + self.hidden
    }

    /// Elements that a token's keys and values have over all layers.
    pub fn cached(&self) -> u64 {
        self.layers * 2 * self.keys
    }

    /// Elements that a block keeps for backward, for a token.
    pub fn kept(&self) -> u64 {
        let Self { hidden, intermediate, queries, keys, normed_outputs, .. } = self;
        (2 + normed_outputs) * hidden + 2 * queries + 2 * keys + 2 * intermediate
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;

    pub(crate) const QWEN_14B: &str = r#"{"model_type": "qwen2", "hidden_size": 5120,
        "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": false}"#;

    /// As the models' own pages count them.
    #[test]
    fn known_models_have_as_many_weights_as_their_pages_say() {
        let count = |text| Shape::parse(text).unwrap().parameters();
        assert_eq!(count(QWEN_14B), 14_770_033_664);
        let qwen_7b = r#"{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "vocab_size": 152064, "tie_word_embeddings": false}"#;
        assert_eq!(count(qwen_7b), 7_615_616_512);
        let smol = r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "vocab_size": 49152, "tie_word_embeddings": true}"#;
        assert_eq!(count(smol), 134_515_008);
        let qwen3_8b = r#"{"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 151936, "tie_word_embeddings": false}"#;
        assert_eq!(count(qwen3_8b), 8_190_735_360);
        let mistral_7b = r#"{"model_type": "mistral", "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 32768, "tie_word_embeddings": false}"#;
        assert_eq!(count(mistral_7b), 7_248_023_552);
    }

    #[test]
    fn a_multimodal_model_is_counted_by_its_text_part() {
        let gemma = r#"{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text",
            "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}}"#;
        let shape = Shape::parse(gemma).unwrap();
        assert_eq!((shape.queries, shape.keys, shape.tied), (4096, 2048, true));
        // 12.2 billion with the vision tower's 0.4.
        assert_eq!(shape.parameters(), 11_766_034_176);
    }

    #[test]
    fn what_is_no_model_is_refused() {
        for text in
            ["{}", "[", r#"{"hidden_size": 0, "intermediate_size": 1, "num_hidden_layers": 1}"#]
        {
            assert!(Shape::parse(text).is_err(), "{text}");
        }
    }
}
