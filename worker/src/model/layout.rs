//! Which Hugging Face tensors make up the decoder's parameters, and how they are fused.

use std::convert::Infallible;

use super::ModelConfig;
use super::config::Head;

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
pub(crate) struct Slot {
    /// Consecutive row ranges.
    pub(crate) parts: Vec<Part>,
    /// Second dimension; a vector has none.
    pub(crate) columns: Option<i64>,
}

impl Slot {
    /// Of rows with `columns` each.
    pub(crate) fn matrix(parts: Vec<Part>, columns: i64) -> Self {
        Self { parts, columns: Some(columns) }
    }

    /// Of elements.
    pub(crate) fn vector(parts: Vec<Part>) -> Self {
        Self { parts, columns: None }
    }

    /// Shape of `rows` rows of this parameter.
    pub(crate) fn shape(&self, rows: i64) -> Vec<i64> {
        std::iter::once(rows).chain(self.columns).collect()
    }

    /// Rows of all parts together.
    pub(crate) fn rows(&self) -> i64 {
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
    /// `[head_dim]`, on each query head.
    pub(crate) query_norm: Option<T>,
    /// `[head_dim]`, on each key head.
    pub(crate) key_norm: Option<T>,
    /// Gate, then up: `[2 · intermediate, hidden]`.
    pub(crate) gate_up: T,
    /// `[hidden, intermediate]`.
    pub(crate) down: T,
    /// `[hidden]`, ahead of attention.
    pub(crate) input_norm: T,
    /// `[hidden]`, between attention and the residual.
    pub(crate) attention_output_norm: Option<T>,
    /// `[hidden]`, ahead of the MLP.
    pub(crate) mlp_norm: T,
    /// `[hidden]`, between the MLP and the residual.
    pub(crate) mlp_output_norm: Option<T>,
}

impl<T> PerBlock<T> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        [
            Some(&self.qkv),
            self.qkv_bias.as_ref(),
            Some(&self.output),
            self.output_bias.as_ref(),
            self.query_norm.as_ref(),
            self.key_norm.as_ref(),
            Some(&self.gate_up),
            Some(&self.down),
            Some(&self.input_norm),
            self.attention_output_norm.as_ref(),
            Some(&self.mlp_norm),
            self.mlp_output_norm.as_ref(),
        ]
        .into_iter()
        .flatten()
    }

    pub(crate) fn map<U>(&self, mut map: impl FnMut(&T) -> U) -> PerBlock<U> {
        let Ok(mapped) = self.try_map(|one| Ok::<_, Infallible>(map(one)));
        mapped
    }

    /// In the order of [`Self::iter`].
    pub(crate) fn try_map<U, E>(
        &self,
        mut map: impl FnMut(&T) -> Result<U, E>,
    ) -> Result<PerBlock<U>, E> {
        Ok(PerBlock {
            qkv: map(&self.qkv)?,
            qkv_bias: self.qkv_bias.as_ref().map(&mut map).transpose()?,
            output: map(&self.output)?,
            output_bias: self.output_bias.as_ref().map(&mut map).transpose()?,
            query_norm: self.query_norm.as_ref().map(&mut map).transpose()?,
            key_norm: self.key_norm.as_ref().map(&mut map).transpose()?,
            gate_up: map(&self.gate_up)?,
            down: map(&self.down)?,
            input_norm: map(&self.input_norm)?,
            attention_output_norm: self.attention_output_norm.as_ref().map(&mut map).transpose()?,
            mlp_norm: map(&self.mlp_norm)?,
            mlp_output_norm: self.mlp_output_norm.as_ref().map(&mut map).transpose()?,
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
    /// `[vocab, hidden]`, or `[1, hidden]` of one that rates; absent where the embedding serves.
    pub(super) head: Option<T>,
}

/// All parameters of a model.
pub(super) struct Layout {
    pub(super) outer: Outer<Slot>,
    pub(super) blocks: Vec<PerBlock<Slot>>,
    pub(super) prefix: Prefix,
}

/// What the files put ahead of the decoder's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefix {
    /// Of the embedding, the blocks and the final norm.
    pub(super) body: &'static str,
    /// Of the head.
    pub(super) head: &'static str,
}

impl Prefix {
    /// Of a model that is a decoder and nothing else: with its head, and as it was saved
    /// without, which transformers calls the base model. Embedders come so.
    pub(super) const PLAIN: [Self; 2] =
        [Self { body: "model.", head: "" }, Self { body: "", head: "" }];

    /// Of the decoder in a multimodal model: as files on the hub have it, and as
    /// transformers 5 names its modules.
    pub(super) const MULTIMODAL: [Self; 2] = [
        Self { body: "language_model.model.", head: "language_model." },
        Self { body: "model.language_model.", head: "" },
    ];

    /// Whether `name` is of a tensor beside the decoder, which it has nothing to do with.
    pub(super) fn is_beside(self, name: &str) -> bool {
        const TOWERS: [&str; 2] = ["vision_tower.", "multi_modal_projector."];
        let name = name.strip_prefix("model.").unwrap_or(name);
        Self::MULTIMODAL.contains(&self) && TOWERS.iter().any(|tower| name.starts_with(tower))
    }

    /// The name of the embedding.
    pub(super) fn embedding(self) -> String {
        format!("{}embed_tokens.weight", self.body)
    }

    /// The name of the vocabulary's head.
    pub(super) fn vocabulary(self) -> String {
        format!("{}lm_head.weight", self.head)
    }

    /// The name of the head that rates.
    fn rating(self) -> String {
        format!("{}score.weight", self.head)
    }
}

impl Layout {
    pub(super) fn new(config: &ModelConfig, prefix: Prefix) -> Self {
        let part = |name: String, rows| vec![Part { name, rows }];
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let outer = Outer {
            embedding: Slot::matrix(part(prefix.embedding(), vocab), hidden),
            norm: Slot::vector(part(format!("{}norm.weight", prefix.body), hidden)),
            head: match config.head {
                Head::Tied => None,
                Head::Vocabulary => Some(Slot::matrix(part(prefix.vocabulary(), vocab), hidden)),
                Head::Rating => Some(Slot::matrix(part(prefix.rating(), 1), hidden)),
            },
        };
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| block(config, &format!("{}layers.{layer}.", prefix.body)))
            .collect();
        Self { outer, blocks, prefix }
    }

    /// Every slot, embedding first and head last.
    pub(super) fn slots(&self) -> impl Iterator<Item = &Slot> {
        std::iter::once(&self.outer.embedding)
            .chain(self.blocks.iter().flat_map(PerBlock::iter))
            .chain(std::iter::once(&self.outer.norm))
            .chain(self.outer.head.as_ref())
    }
}

fn block(config: &ModelConfig, prefix: &str) -> PerBlock<Slot> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let query_rows = config.num_attention_heads * config.head_dim;
    let kv_rows = config.num_key_value_heads * config.head_dim;
    let part = |name: &str, rows| Part { name: format!("{prefix}{name}"), rows };
    let qkv = |of: &str| {
        vec![
            part(&format!("self_attn.q_proj.{of}"), query_rows),
            part(&format!("self_attn.k_proj.{of}"), kv_rows),
            part(&format!("self_attn.v_proj.{of}"), kv_rows),
        ]
    };
    let vector = |name: &str, rows| Slot::vector(vec![part(name, rows)]);
    let head_norm = |name: &str| {
        config.qk_norm.then(|| vector(&format!("self_attn.{name}.weight"), config.head_dim))
    };
    let norm = |name: &str| vector(&format!("{name}_layernorm.weight"), hidden);
    // Where there are norms ahead of the residual, what others call the norm behind
    // attention, and put ahead of the MLP, is one of them.
    let (attention_output_norm, mlp_norm, mlp_output_norm) = match config.sandwich_norms {
        false => (None, norm("post_attention"), None),
        true => {
            (Some(norm("post_attention")), norm("pre_feedforward"), Some(norm("post_feedforward")))
        }
    };
    PerBlock {
        qkv: Slot::matrix(qkv("weight"), hidden),
        qkv_bias: config.qkv_bias.then(|| Slot::vector(qkv("bias"))),
        output: Slot::matrix(vec![part("self_attn.o_proj.weight", hidden)], query_rows),
        output_bias: config.output_bias.then(|| vector("self_attn.o_proj.bias", hidden)),
        query_norm: head_norm("q_norm"),
        key_norm: head_norm("k_norm"),
        gate_up: Slot::matrix(
            vec![
                part("mlp.gate_proj.weight", intermediate),
                part("mlp.up_proj.weight", intermediate),
            ],
            hidden,
        ),
        down: Slot::matrix(vec![part("mlp.down_proj.weight", hidden)], intermediate),
        input_norm: norm("input"),
        attention_output_norm,
        mlp_norm,
        mlp_output_norm,
    }
}
