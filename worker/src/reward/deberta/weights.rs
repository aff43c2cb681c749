//! Which Hugging Face tensors make up the encoder's weights.

use tch::{TchError, Tensor};

use super::config::DebertaConfig;
use crate::model::ops::Linear;
use crate::model::{Part, Slot};

/// All weights: a slot each, or a tensor.
#[derive(Debug)]
pub(super) struct Weights<T> {
    /// `[vocab, hidden]`.
    pub(super) embedding: T,
    pub(super) embedding_norm: Pair<T>,
    /// Embeddings of distances, `[2 · span, hidden]`.
    pub(super) distances: T,
    pub(super) distances_norm: Option<Pair<T>>,
    pub(super) layers: Vec<LayerWeights<T>>,
    /// `[hidden, hidden]`, on the first token.
    pub(super) pooler: Pair<T>,
    /// `[1, hidden]`.
    pub(super) classifier: Pair<T>,
}

/// Those of a layer.
#[derive(Debug)]
pub(super) struct LayerWeights<T> {
    /// Queries, keys, values: `[3 · hidden, hidden]`.
    pub(super) qkv: Pair<T>,
    /// `[hidden, hidden]`, of what was attended to.
    pub(super) attended: Pair<T>,
    /// Behind the residual around attention.
    pub(super) attended_norm: Pair<T>,
    /// `[intermediate, hidden]`.
    pub(super) up: Pair<T>,
    /// `[hidden, intermediate]`.
    pub(super) down: Pair<T>,
    /// Behind the residual around the feed-forward layers.
    pub(super) output_norm: Pair<T>,
}

/// A weight and its bias: of a linear layer, or of a LayerNorm.
#[derive(Debug)]
pub(super) struct Pair<T> {
    pub(super) weight: T,
    /// As long as the weight has rows.
    pub(super) bias: T,
}

impl Pair<Tensor> {
    /// A linear layer's: `x` (`[rows, in]`) → `[rows, out]`.
    pub(super) fn linear(&self, x: &Tensor) -> Result<Tensor, TchError> {
        Linear { weight: &self.weight, bias: Some(&self.bias) }.forward(x)
    }

    /// A LayerNorm's, over the last dimension of `x`.
    pub(super) fn norm(&self, x: &Tensor, eps: f64) -> Result<Tensor, TchError> {
        let shape = self.weight.size();
        x.f_layer_norm(shape, Some(&self.weight), Some(&self.bias), eps, true)
    }
}

/// What becomes of a slot.
type Make<'a, T, E> = &'a mut dyn FnMut(Slot) -> Result<T, E>;

impl<T> Weights<T> {
    /// Of whatever `make` makes of each slot.
    pub(super) fn make<E>(config: &DebertaConfig, make: Make<'_, T, E>) -> Result<Self, E> {
        let hidden = config.hidden_size;
        let distances = 2 * config.positions.span();
        Ok(Self {
            embedding: make(matrix(
                "deberta.embeddings.word_embeddings",
                [config.vocab_size, hidden],
            ))?,
            embedding_norm: norm("deberta.embeddings.LayerNorm", hidden, make)?,
            distances: make(matrix("deberta.encoder.rel_embeddings", [distances, hidden]))?,
            distances_norm: match config.positions.normed {
                true => Some(norm("deberta.encoder.LayerNorm", hidden, make)?),
                false => None,
            },
            layers: (0..config.num_hidden_layers)
                .map(|layer| LayerWeights::make(config, layer, make))
                .collect::<Result<_, _>>()?,
            pooler: linear(&["pooler.dense"], [hidden, hidden], make)?,
            classifier: linear(&["classifier"], [1, hidden], make)?,
        })
    }
}

impl<T> LayerWeights<T> {
    fn make<E>(config: &DebertaConfig, layer: i64, make: Make<'_, T, E>) -> Result<Self, E> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let name = |name: &str| format!("deberta.encoder.layer.{layer}.{name}");
        let [query, key, value, attended] =
            ["self.query_proj", "self.key_proj", "self.value_proj", "output.dense"]
                .map(|one| name(&format!("attention.{one}")));
        Ok(Self {
            qkv: linear(&[&query, &key, &value], [hidden, hidden], make)?,
            attended: linear(&[&attended], [hidden, hidden], make)?,
            attended_norm: norm(&name("attention.output.LayerNorm"), hidden, make)?,
            up: linear(&[&name("intermediate.dense")], [intermediate, hidden], make)?,
            down: linear(&[&name("output.dense")], [hidden, intermediate], make)?,
            output_norm: norm(&name("output.LayerNorm"), hidden, make)?,
        })
    }
}

fn part(name: &str, of: &str, rows: i64) -> Part {
    Part { name: format!("{name}.{of}"), rows }
}

fn matrix(name: &str, [rows, columns]: [i64; 2]) -> Slot {
    Slot::matrix(vec![part(name, "weight", rows)], columns)
}

/// Linear layers of one shape, one after another.
fn linear<T, E>(
    names: &[&str],
    [rows, columns]: [i64; 2],
    make: Make<'_, T, E>,
) -> Result<Pair<T>, E> {
    let parts = |of: &str| names.iter().map(|name| part(name, of, rows)).collect();
    Ok(Pair {
        weight: make(Slot::matrix(parts("weight"), columns))?,
        bias: make(Slot::vector(parts("bias")))?,
    })
}

fn norm<T, E>(name: &str, width: i64, make: Make<'_, T, E>) -> Result<Pair<T>, E> {
    let vector = |of: &str| Slot::vector(vec![part(name, of, width)]);
    Ok(Pair { weight: make(vector("weight"))?, bias: make(vector("bias"))? })
}
