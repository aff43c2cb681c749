//! What a pair costs to compute, so that work can be dealt out evenly.

use serde::Deserialize;

use crate::domain::PairId;

/// What planning needs to know of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairSize {
    /// Which pair.
    pub id: PairId,
    /// Tokens it takes packed: prompt once, and both replies.
    pub tokens: usize,
    /// Tokens of the chosen reply.
    pub chosen: usize,
    /// Tokens of the rejected reply.
    pub rejected: usize,
}

impl PairSize {
    /// Pairs (query, key) of the packed attention: every token attends to itself
    /// and to those before it, but y⁻ not to y⁺.
    ///
    /// With n(n + 1)/2 for n tokens in a row: x alone, then each reply y adds
    /// y·x for the prompt and y(y + 1)/2 for itself.
    pub fn attended(&self) -> u64 {
        let (chosen, rejected) = (self.chosen as u64, self.rejected as u64);
        let prompt = (self.tokens as u64).saturating_sub(chosen + rejected);
        let row = |n: u64| n * (n + 1) / 2;
        row(prompt) + prompt * (chosen + rejected) + row(chosen) + row(rejected)
    }
}

/// Multiply-accumulates of one forward pass, by what they grow with. Backward
/// is twice as much of each, so their ratios are those of a whole step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CostModel {
    /// For a token: the blocks' matrices.
    pub token: u64,
    /// For a pair (query, key) that attends: the scores, and the weighted sum of values.
    pub attended: u64,
    /// For a token of a reply: the head, hidden size × vocabulary.
    pub response: u64,
}

impl CostModel {
    /// What one pair costs.
    pub fn of(&self, pair: &PairSize) -> u64 {
        self.token * pair.tokens as u64
            + self.attended * pair.attended()
            + self.response * (pair.chosen + pair.rejected) as u64
    }
}

/// What `config.json` says of a decoder's matrices, under Hugging Face's names.
#[derive(Debug, Clone, Copy, Deserialize)]
struct DecoderShape {
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: u64,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    vocab_size: u64,
}

impl CostModel {
    /// From the text of a model's `config.json`.
    ///
    /// # Errors
    /// A shape that is not there or is no decoder's.
    pub fn from_config_json(text: &[u8]) -> serde_json::Result<Self> {
        let shape: DecoderShape = serde_json::from_slice(text)?;
        let heads = shape.num_attention_heads;
        let head_dim = shape.head_dim.unwrap_or(shape.hidden_size / heads.max(1));
        let query = heads * head_dim;
        let key_value = shape.num_key_value_heads.unwrap_or(heads) * head_dim;
        // Query and output, key and value; gate, up and down.
        let attention = shape.hidden_size * (2 * query + 2 * key_value);
        let mlp = 3 * shape.hidden_size * shape.intermediate_size;
        Ok(Self {
            token: shape.num_hidden_layers * (attention + mlp),
            attended: shape.num_hidden_layers * 2 * query,
            response: shape.hidden_size * shape.vocab_size,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn pair(prompt: usize, chosen: usize, rejected: usize) -> PairSize {
        PairSize { id: PairId(0), tokens: prompt + chosen + rejected, chosen, rejected }
    }

    #[test]
    fn attention_is_counted_as_the_mask_has_it() {
        for (x, chosen, rejected) in [(1, 1, 1), (5, 3, 2), (4, 0, 7), (9, 8, 1)] {
            // Position by position: y⁻ begins where y⁺ ends, and does not see it.
            let sees = |n: usize| {
                if n < x + chosen { n + 1 } else { n + 1 - chosen }
            };
            let counted: usize = (0..x + chosen + rejected).map(sees).sum();
            assert_eq!(pair(x, chosen, rejected).attended(), counted as u64);
        }
    }

    #[test]
    fn a_decoders_shape_gives_its_operations() {
        // SmolLM2-135M: 134,515,008 parameters, of them 49152 × 576 embeddings and 61 norms.
        let config = br#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "vocab_size": 49152}"#;
        let cost = CostModel::from_config_json(config).unwrap();
        assert_eq!(cost.response, 49_152 * 576);
        assert_eq!(cost.token, 134_515_008 - 49_152 * 576 - 61 * 576);
        assert_eq!(cost.attended, 30 * 2 * 576);
        let longer = cost.of(&pair(1000, 10, 10)) as f64 / cost.of(&pair(500, 10, 10)) as f64;
        assert!(longer > 1.95 && longer < 2.2, "a little more than twice: {longer}");
        let error = CostModel::from_config_json(b"{\"hidden_size\": 1}").unwrap_err();
        assert!(error.to_string().contains("intermediate_size"), "{error}");
    }
}
