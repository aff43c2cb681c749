//! The decoder: embedding, blocks, final norm, head.

use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use super::checkpoint::Checkpoint;
use super::layout::{Layout, Outer, Part, PerBlock, Slot};
use super::ops::{Linear, RmsNorm, product_kind, swiglu};
use super::rope::Rotary;
use super::{ModelConfig, ModelError};

/// One weight tensor, with the Hugging Face tensors it is made of.
#[derive(Debug)]
pub struct Parameter {
    /// The weight, sharing storage and autograd state with the model's.
    pub tensor: Tensor,
    /// Consecutive row ranges of `tensor`.
    pub parts: Vec<Part>,
}

impl Parameter {
    fn load(
        slot: &Slot,
        checkpoint: &Checkpoint,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        let tensor = Tensor::f_empty(slot.shape(slot.rows()), (kind, device))?;
        let mut start = 0;
        for part in &slot.parts {
            let source = checkpoint.tensor(&part.name)?;
            tensor.f_narrow(0, start, part.rows)?.f_copy_(&source)?;
            start += part.rows;
        }
        Ok(Self { tensor, parts: slot.parts.clone() })
    }

    fn share(&self) -> Self {
        Self { tensor: self.tensor.shallow_clone(), parts: self.parts.clone() }
    }
}

/// A causal language model: Llama or Qwen2, by its configuration.
///
/// All tensors are packed over tokens (`[tokens, hidden]`), without a batch
/// dimension and without padding; who attends to whom is the caller's to say.
#[derive(Debug)]
pub struct Decoder {
    /// Shape and constants.
    pub config: ModelConfig,
    /// The blocks, first to last.
    pub blocks: Vec<Block>,
    outer: Outer<Parameter>,
    /// `[head_dim / 2]`, fp32.
    inverse_frequencies: Tensor,
    kind: Kind,
    device: Device,
}

impl Decoder {
    /// Loads `config.json` and the safetensors files in `dir`, as `kind` on `device`.
    ///
    /// Every tensor is checked against the configuration before the first is
    /// read. Errors name the file and what is wrong in it.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let config = ModelConfig::read(dir)?;
        let layout = Layout::new(&config);
        let checkpoint = Checkpoint::open(dir)?;
        checkpoint.check(&layout)?;
        Self::build(config, layout, kind, device, |slot| {
            Parameter::load(slot, &checkpoint, kind, device)
        })
    }

    fn build(
        config: ModelConfig,
        layout: Layout,
        kind: Kind,
        device: Device,
        parameter: impl Fn(&Slot) -> Result<Parameter, ModelError>,
    ) -> Result<Self, ModelError> {
        let inverse_frequencies = config.rope.inverse_frequencies(config.head_dim, device)?;
        let outer = Outer {
            embedding: parameter(&layout.outer.embedding)?,
            norm: parameter(&layout.outer.norm)?,
            head: layout.outer.head.as_ref().map(&parameter).transpose()?,
        };
        let block = |slots: &PerBlock<Slot>| {
            let weights = slots.try_map(&parameter)?;
            Ok(Block {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                eps: config.rms_norm_eps,
                weights,
            })
        };
        let blocks = layout.blocks.iter().map(block).collect::<Result<_, ModelError>>()?;
        Ok(Self { config, blocks, outer, inverse_frequencies, kind, device })
    }

    /// A model of random weights, the same for the same seed: for unit tests.
    #[cfg(test)]
    #[allow(clippy::unwrap_used)]
    pub(crate) fn random(config: ModelConfig, seed: i64) -> Self {
        tch::manual_seed(seed);
        let layout = Layout::new(&config);
        let (kind, device) = (Kind::Float, Device::Cpu);
        Self::build(config, layout, kind, device, |slot| {
            let shape = slot.shape(slot.rows());
            // Tokens wide apart and layers that add to them, or every prompt
            // is answered by the same token and tests see nothing.
            let name = slot.parts[0].name.as_str();
            let normal =
                |spread| Tensor::f_randn(shape.as_slice(), (kind, device))?.f_mul_scalar(spread);
            let tensor = match name {
                "model.embed_tokens.weight" => normal(1.0)?,
                _ if name.ends_with("norm.weight") => {
                    Tensor::f_rand(shape.as_slice(), (kind, device))?.f_add_scalar(0.5)?
                }
                _ => normal(0.2)?,
            };
            Ok(Parameter { tensor, parts: slot.parts.clone() })
        })
        .unwrap()
    }

    /// The same model, in the kind in which the device multiplies matrices: these very
    /// weights where that is theirs, else widened copies.
    pub(crate) fn for_products(&self) -> Result<Self, TchError> {
        let kind = product_kind(self.kind, self.device);
        let convert = |parameter: &Parameter| {
            let tensor = parameter.tensor.f_detach()?.f_to_kind(kind)?;
            Ok::<_, TchError>(Parameter { tensor, parts: parameter.parts.clone() })
        };
        let block =
            |block: &Block| Ok(Block { weights: block.weights.try_map(&convert)?, ..*block });
        Ok(Self {
            config: self.config.clone(),
            blocks: self.blocks.iter().map(block).collect::<Result<_, TchError>>()?,
            outer: Outer {
                embedding: convert(&self.outer.embedding)?,
                norm: convert(&self.outer.norm)?,
                head: self.outer.head.as_ref().map(&convert).transpose()?,
            },
            inverse_frequencies: self.inverse_frequencies.shallow_clone(),
            kind,
            device: self.device,
        })
    }

    /// Kind of the weights and of what is computed between the fp32 islands.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Rows of the embedding: `ids` (`[tokens]`, i64) → `[tokens, hidden]`.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor, TchError> {
        // −1 stands for "no padding token": every row gets its gradient.
        let padding = self.config.pad_token_id.unwrap_or(-1);
        Tensor::f_embedding(&self.outer.embedding.tensor, ids, padding, false, false)
    }

    /// Rotations for `positions` (`[tokens]`, i64).
    pub fn rotary(&self, positions: &Tensor) -> Result<Rotary, TchError> {
        Rotary::new(&self.inverse_frequencies, positions, self.kind)
    }

    /// The norm between the last block and the head: `[tokens, hidden]` → same.
    pub fn final_norm(&self, h: &Tensor) -> Result<Tensor, TchError> {
        self.last_norm().forward(h)
    }

    /// As [`Self::final_norm`], with its backward.
    pub(crate) fn last_norm(&self) -> RmsNorm<'_> {
        RmsNorm { weight: &self.outer.norm.tensor, eps: self.config.rms_norm_eps }
    }

    /// The head's weight, `[vocab, hidden]`: the embedding's where they are tied.
    pub fn head_weight(&self) -> &Tensor {
        &self.outer.head.as_ref().unwrap_or(&self.outer.embedding).tensor
    }

    /// Embedding, final norm, and head; a tied head is not listed twice.
    pub fn outer_parameters(&self) -> Vec<Parameter> {
        let Outer { embedding, norm, head } = &self.outer;
        [Some(embedding), Some(norm), head.as_ref()]
            .into_iter()
            .flatten()
            .map(Parameter::share)
            .collect()
    }
}

/// One transformer block: attention and gated MLP, each on a normed residual.
#[derive(Debug)]
pub struct Block {
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    eps: f64,
    weights: PerBlock<Parameter>,
}

impl Block {
    /// `h` (`[tokens, hidden]`) → the same shape.
    ///
    /// `attend` gets rotated queries `[tokens, heads, head_dim]`, rotated keys
    /// and values `[tokens, kv_heads, head_dim]` (views, not contiguous), and
    /// returns `[tokens, heads, head_dim]`; masks, caches and the scale
    /// `1 / √head_dim` are its business.
    pub fn forward(
        &self,
        h: &Tensor,
        rotary: &Rotary,
        attend: &mut dyn FnMut(&Tensor, &Tensor, &Tensor) -> Result<Tensor, TchError>,
    ) -> Result<Tensor, TchError> {
        let qkv = self.qkv().forward(&self.input_norm().forward(h)?)?;
        let heads = self.by_head(&qkv)?;
        // Queries and keys turn alike: one rotation over both.
        let qk = rotary.rotate(&heads.queries_and_keys)?;
        let q = qk.f_narrow(1, 0, self.heads)?;
        let k = qk.f_narrow(1, self.heads, self.kv_heads)?;
        let attended = attend(&q, &k, &heads.values)?;
        let attended = attended.f_reshape([-1, self.heads * self.head_dim])?;
        let h = h.f_add(&self.output().forward(&attended)?)?;

        let gate_up = self.gate_up().forward(&self.mlp_norm().forward(&h)?)?;
        h.f_add(&self.down().forward(&swiglu(&gate_up)?)?)
    }

    /// The block's weights, in the order of Hugging Face state dicts.
    pub fn parameters(&self) -> Vec<Parameter> {
        self.weights.iter().map(Parameter::share).collect()
    }

    /// Number of query heads.
    pub(crate) fn heads(&self) -> i64 {
        self.heads
    }

    /// Elements of one head.
    pub(crate) fn head_dim(&self) -> i64 {
        self.head_dim
    }

    /// Where each weight stands in [`Self::parameters`].
    pub(crate) fn places(&self) -> PerBlock<usize> {
        let mut next = 0..;
        self.weights.map(|_| next.next().unwrap_or_default())
    }

    /// The norm ahead of attention.
    pub(crate) fn input_norm(&self) -> RmsNorm<'_> {
        RmsNorm { weight: &self.weights.input_norm.tensor, eps: self.eps }
    }

    /// Queries, keys and values, all heads of each after one another.
    pub(crate) fn qkv(&self) -> Linear<'_> {
        linear(&self.weights.qkv, self.weights.qkv_bias.as_ref())
    }

    /// From attended values to the residual.
    pub(crate) fn output(&self) -> Linear<'_> {
        linear(&self.weights.output, self.weights.output_bias.as_ref())
    }

    /// The norm ahead of the MLP.
    pub(crate) fn mlp_norm(&self) -> RmsNorm<'_> {
        RmsNorm { weight: &self.weights.mlp_norm.tensor, eps: self.eps }
    }

    /// The MLP's gate, then what it gates.
    pub(crate) fn gate_up(&self) -> Linear<'_> {
        linear(&self.weights.gate_up, None)
    }

    /// From the gated to the residual.
    pub(crate) fn down(&self) -> Linear<'_> {
        linear(&self.weights.down, None)
    }

    /// `qkv`, `[tokens, (heads + 2 kv_heads) · head_dim]`, by heads: views.
    pub(crate) fn by_head(&self, qkv: &Tensor) -> Result<Heads, TchError> {
        let turned = self.heads + self.kv_heads;
        let all = qkv.f_view([-1, turned + self.kv_heads, self.head_dim])?;
        Ok(Heads {
            queries: all.f_narrow(1, 0, self.heads)?,
            keys: all.f_narrow(1, self.heads, self.kv_heads)?,
            values: all.f_narrow(1, turned, self.kv_heads)?,
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
