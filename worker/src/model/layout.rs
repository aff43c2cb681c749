//! Which Hugging Face tensors make up the decoder's parameters, and how they are fused.

use super::ModelConfig;

/// A named range of rows of a fused weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The Hugging Face name, for example `model.layers.0.self_attn.k_proj.weight`.
    pub name: String,
    /// Rows it takes; elements, where the parameter is a vector.
    pub rows: i64,
}

/// The shape of one parameter, before it has a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot {
    /// Consecutive row ranges.
    pub(super) parts: Vec<Part>,
    /// Second dimension; a vector has none.
    pub(super) columns: Option<i64>,
}

impl Slot {
    fn matrix(parts: Vec<Part>, columns: i64) -> Self {
        Self { parts, columns: Some(columns) }
    }

    fn vector(parts: Vec<Part>) -> Self {
        Self { parts, columns: None }
    }

    /// Shape of `rows` rows of this parameter.
    pub(super) fn shape(&self, rows: i64) -> Vec<i64> {
        std::iter::once(rows).chain(self.columns).collect()
    }

    /// Rows of all parts together.
    pub(super) fn rows(&self) -> i64 {
        self.parts.iter().map(|part| part.rows).sum()
    }
}

/// What every block has one of, in the order of Hugging Face state dicts.
#[derive(Debug)]
pub(crate) struct PerBlock<T> {
    /// Queries, keys, values: `[(heads + 2 kv_heads) · head_dim, hidden]`.
    pub(crate) qkv: T,
    pub(crate) qkv_bias: Option<T>,
    /// `[hidden, heads · head_dim]`.
    pub(crate) output: T,
    pub(crate) output_bias: Option<T>,
    /// Gate, then up: `[2 · intermediate, hidden]`.
    pub(crate) gate_up: T,
    /// `[hidden, intermediate]`.
    pub(crate) down: T,
    /// `[hidden]`, ahead of attention.
    pub(crate) input_norm: T,
    /// `[hidden]`, ahead of the MLP.
    pub(crate) mlp_norm: T,
}

impl<T> PerBlock<T> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        [
            Some(&self.qkv),
            self.qkv_bias.as_ref(),
            Some(&self.output),
            self.output_bias.as_ref(),
            Some(&self.gate_up),
            Some(&self.down),
            Some(&self.input_norm),
            Some(&self.mlp_norm),
        ]
        .into_iter()
        .flatten()
    }

    pub(crate) fn map<U>(&self, mut map: impl FnMut(&T) -> U) -> PerBlock<U> {
        PerBlock {
            qkv: map(&self.qkv),
            qkv_bias: self.qkv_bias.as_ref().map(&mut map),
            output: map(&self.output),
            output_bias: self.output_bias.as_ref().map(&mut map),
            gate_up: map(&self.gate_up),
            down: map(&self.down),
            input_norm: map(&self.input_norm),
            mlp_norm: map(&self.mlp_norm),
        }
    }

    pub(crate) fn try_map<U, E>(
        &self,
        mut map: impl FnMut(&T) -> Result<U, E>,
    ) -> Result<PerBlock<U>, E> {
        Ok(PerBlock {
            qkv: map(&self.qkv)?,
            qkv_bias: self.qkv_bias.as_ref().map(&mut map).transpose()?,
            output: map(&self.output)?,
            output_bias: self.output_bias.as_ref().map(&mut map).transpose()?,
            gate_up: map(&self.gate_up)?,
            down: map(&self.down)?,
            input_norm: map(&self.input_norm)?,
            mlp_norm: map(&self.mlp_norm)?,
        })
    }
}

/// What the decoder has around its blocks.
#[derive(Debug)]
pub(super) struct Outer<T> {
    /// `[vocab, hidden]`.
    pub(super) embedding: T,
    /// `[hidden]`.
    pub(super) norm: T,
    /// `[vocab, hidden]`; absent where the embedding serves.
    pub(super) head: Option<T>,
}

/// All parameters of a model.
pub(super) struct Layout {
    pub(super) outer: Outer<Slot>,
    pub(super) blocks: Vec<PerBlock<Slot>>,
}

impl Layout {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let part = |name: &str, rows| Part { name: name.to_owned(), rows };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let outer = Outer {
            embedding: Slot::matrix(vec![part("model.embed_tokens.weight", vocab)], hidden),
            norm: Slot::vector(vec![part("model.norm.weight", hidden)]),
            head: (!config.tie_word_embeddings)
                .then(|| Slot::matrix(vec![part("lm_head.weight", vocab)], hidden)),
        };
        let blocks = (0..config.num_hidden_layers).map(|layer| block(config, layer)).collect();
        Self { outer, blocks }
    }

    /// Every slot, embedding first and head last.
    pub(super) fn slots(&self) -> impl Iterator<Item = &Slot> {
        std::iter::once(&self.outer.embedding)
            .chain(self.blocks.iter().flat_map(PerBlock::iter))
            .chain(std::iter::once(&self.outer.norm))
            .chain(self.outer.head.as_ref())
    }
}

fn block(config: &ModelConfig, layer: i64) -> PerBlock<Slot> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let query_rows = config.num_attention_heads * config.head_dim;
    let kv_rows = config.num_key_value_heads * config.head_dim;
    let part = |name: &str, rows| Part { name: format!("model.layers.{layer}.{name}"), rows };
    let qkv = |of: &str| {
        vec![
            part(&format!("self_attn.q_proj.{of}"), query_rows),
            part(&format!("self_attn.k_proj.{of}"), kv_rows),
            part(&format!("self_attn.v_proj.{of}"), kv_rows),
        ]
    };
    PerBlock {
        qkv: Slot::matrix(qkv("weight"), hidden),
        qkv_bias: config.qkv_bias.then(|| Slot::vector(qkv("bias"))),
        output: Slot::matrix(vec![part("self_attn.o_proj.weight", hidden)], query_rows),
        output_bias: config
            .output_bias
            .then(|| Slot::vector(vec![part("self_attn.o_proj.bias", hidden)])),
        gate_up: Slot::matrix(
            vec![
                part("mlp.gate_proj.weight", intermediate),
                part("mlp.up_proj.weight", intermediate),
            ],
            hidden,
        ),
        down: Slot::matrix(vec![part("mlp.down_proj.weight", hidden)], intermediate),
        input_norm: Slot::vector(vec![part("input_layernorm.weight", hidden)]),
        mlp_norm: Slot::vector(vec![part("post_attention_layernorm.weight", hidden)]),
    }
}
