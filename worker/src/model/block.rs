//! One transformer block.

use tch::{TchError, Tensor};

use super::ModelConfig;
use super::decoder::Parameter;
use super::layout::PerBlock;
use super::ops::{Activation, Linear, NormScale, RmsNorm};
use super::rope::{Rotary, Rotations};

/// One transformer block: attention and gated MLP, each on a normed residual.
#[derive(Debug)]
pub struct Block {
    constants: Constants,
    weights: PerBlock<Parameter>,
}

/// What a block has beside its weights.
#[derive(Debug, Clone, Copy)]
struct Constants {
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    eps: f64,
    norm_scale: NormScale,
    activation: Activation,
    attention_scale: f64,
    window: Option<i64>,
}

impl Block {
    /// The block of `layer`, from 0.
    pub(super) fn new(config: &ModelConfig, layer: usize, weights: PerBlock<Parameter>) -> Self {
        let constants = Constants {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            eps: config.rms_norm_eps,
            norm_scale: config.norm_scale,
            activation: config.activation,
            attention_scale: config.attention_scale,
            window: config.windows.get(layer).copied().flatten(),
        };
        Self { constants, weights }
    }

    /// The same block with other tensors.
    pub(super) fn try_map<E>(
        &self,
        map: impl FnMut(&Parameter) -> Result<Parameter, E>,
    ) -> Result<Self, E> {
        Ok(Self { constants: self.constants, weights: self.weights.try_map(map)? })
    }

    /// `h` (`[tokens, hidden]`) → the same shape.
    ///
    /// `attend` gets rotated queries `[tokens, heads, head_dim]`, rotated keys
    /// and values `[tokens, kv_heads, head_dim]` (views, not contiguous), and
    /// returns `[tokens, heads, head_dim]`; masks, caches, [`Self::window`] and
    /// [`Self::attention_scale`] are its business.
    pub fn forward(
        &self,
        h: &Tensor,
        rotations: &Rotations,
        attend: &mut dyn FnMut(&Tensor, &Tensor, &Tensor) -> Result<Tensor, TchError>,
    ) -> Result<Tensor, TchError> {
        let Constants { heads, kv_heads, head_dim, .. } = self.constants;
        let qkv = self.qkv().forward(&self.input_norm().forward(h)?)?;
        let parts = self.by_head(&qkv)?;
        let qk = match self.head_norms() {
            None => parts.queries_and_keys,
            Some([of_queries, of_keys]) => {
                let normed = [of_queries.forward(&parts.queries)?, of_keys.forward(&parts.keys)?];
                Tensor::f_cat(&normed, 1)?
            }
        };
        // Queries and keys turn alike: one rotation over both.
        self.rotary(rotations).rotate(&qk)?;
        let (q, k) = (qk.f_narrow(1, 0, heads)?, qk.f_narrow(1, heads, kv_heads)?);
        let attended = attend(&q, &k, &parts.values)?.f_reshape([-1, heads * head_dim])?;
        let attended = self.output().forward(&attended)?;
        let attended = match self.attention_output_norm() {
            None => attended,
            Some(norm) => norm.forward(&attended)?,
        };
        let h = h.f_add(&attended)?;

        let gate_up = self.gate_up().forward(&self.mlp_norm().forward(&h)?)?;
        let mlp = self.down().forward(&self.activation().gated(&gate_up)?)?;
        let mlp = match self.mlp_output_norm() {
            None => mlp,
            Some(norm) => norm.forward(&mlp)?,
        };
        h.f_add(&mlp)
    }

    /// The block's weights, in the order of Hugging Face state dicts.
    pub fn parameters(&self) -> Vec<Parameter> {
        self.weights.iter().map(Parameter::share).collect()
    }

    /// How many tokens a query sees, itself included; none where all before it.
    pub fn window(&self) -> Option<i64> {
        self.constants.window
    }

    /// What scores are multiplied by ahead of the softmax.
    pub fn attention_scale(&self) -> f64 {
        self.constants.attention_scale
    }

    /// Number of query heads.
    pub(crate) fn heads(&self) -> i64 {
        self.constants.heads
    }

    /// Elements of one head.
    pub(crate) fn head_dim(&self) -> i64 {
        self.constants.head_dim
    }

    /// The MLP's.
    pub(crate) fn activation(&self) -> Activation {
        self.constants.activation
    }

    /// This block's rotations.
    pub(crate) fn rotary<'a>(&self, rotations: &'a Rotations) -> &'a Rotary {
        rotations.of(self.constants.window.is_some())
    }

    /// Where each weight stands in [`Self::parameters`].
    pub(crate) fn places(&self) -> PerBlock<usize> {
        let mut next = 0..;
        self.weights.map(|_| next.next().unwrap_or_default())
    }

    /// The norm ahead of attention.
    pub(crate) fn input_norm(&self) -> RmsNorm<'_> {
        self.norm(&self.weights.input_norm)
    }

    /// Queries, keys and values, all heads of each after one another.
    pub(crate) fn qkv(&self) -> Linear<'_> {
        linear(&self.weights.qkv, self.weights.qkv_bias.as_ref())
    }

    /// The norms on each head of queries and of keys, where the family has them.
    pub(crate) fn head_norms(&self) -> Option<[RmsNorm<'_>; 2]> {
        let PerBlock { query_norm, key_norm, .. } = &self.weights;
        Some([self.norm(query_norm.as_ref()?), self.norm(key_norm.as_ref()?)])
    }

    /// From attended values to the residual.
    pub(crate) fn output(&self) -> Linear<'_> {
        linear(&self.weights.output, self.weights.output_bias.as_ref())
    }

    /// The norm between attention and the residual, where the family has one.
    pub(crate) fn attention_output_norm(&self) -> Option<RmsNorm<'_>> {
        self.weights.attention_output_norm.as_ref().map(|weight| self.norm(weight))
    }

    /// The norm ahead of the MLP.
    pub(crate) fn mlp_norm(&self) -> RmsNorm<'_> {
        self.norm(&self.weights.mlp_norm)
    }

    /// The MLP's gate, then what it gates.
    pub(crate) fn gate_up(&self) -> Linear<'_> {
        linear(&self.weights.gate_up, None)
    }

    /// From the gated to the residual.
    pub(crate) fn down(&self) -> Linear<'_> {
        linear(&self.weights.down, None)
    }

    /// The norm between the MLP and the residual, where the family has one.
    pub(crate) fn mlp_output_norm(&self) -> Option<RmsNorm<'_>> {
        self.weights.mlp_output_norm.as_ref().map(|weight| self.norm(weight))
    }

    fn norm<'a>(&self, weight: &'a Parameter) -> RmsNorm<'a> {
        let Constants { norm_scale: scale, eps, .. } = self.constants;
        RmsNorm { weight: &weight.tensor, scale, eps }
    }

    /// `qkv`, `[tokens, (heads + 2 kv_heads) · head_dim]`, by heads: views.
    pub(crate) fn by_head(&self, qkv: &Tensor) -> Result<Heads, TchError> {
        let Constants { heads, kv_heads, head_dim, .. } = self.constants;
        let turned = heads + kv_heads;
        let all = qkv.f_view([-1, turned + kv_heads, head_dim])?;
        Ok(Heads {
            queries: all.f_narrow(1, 0, heads)?,
            keys: all.f_narrow(1, heads, kv_heads)?,
            values: all.f_narrow(1, turned, kv_heads)?,
            queries_and_keys: all.f_narrow(1, 0, turned)?,
        })
    }
}

/// Views by heads, each `[tokens, heads, head_dim]` with its number of heads.
#[derive(Debug)]
pub(crate) struct Heads {
    pub(crate) queries: Tensor,
    pub(crate) keys: Tensor,
    pub(crate) values: Tensor,
    /// Both of them, which positions turn.
    pub(crate) queries_and_keys: Tensor,
}

fn linear<'a>(weight: &'a Parameter, bias: Option<&'a Parameter>) -> Linear<'a> {
    Linear { weight: &weight.tensor, bias: bias.map(|bias| &bias.tensor) }
}
