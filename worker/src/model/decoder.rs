//! The decoder: embedding, blocks, final norm, head.

use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use super::block::Block;
use super::checkpoint::{Checkpoint, Untouched};
use super::layout::{Layout, Outer, Part, Slot};
use super::ops::{RmsNorm, pack, product_kind};
use super::rope::{Rotary, Rotations};
use super::{ModelConfig, ModelError};
use crate::host;

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
        Ok(Self { tensor: checkpoint.read(slot, kind, device)?, parts: slot.parts.clone() })
    }

    pub(super) fn share(&self) -> Self {
        Self { tensor: self.tensor.shallow_clone(), parts: self.parts.clone() }
    }
}

/// A causal model of one of the supported families, by its configuration, which writes text
/// or rates it.
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
    /// What its files hold beside it, for the files that it is saved to.
    pub(super) untouched: Vec<Untouched>,
    frequencies: Frequencies,
    /// Of embeddings, where the family has one: √hidden, rounded to the kind of the weights
    /// as they were loaded.
    embedding_scale: Option<f64>,
    kind: Kind,
    device: Device,
}

/// Inverse frequencies of the rotary embeddings, `[head_dim / 2]` in fp32.
#[derive(Debug)]
struct Frequencies {
    global: Tensor,
    /// Of blocks with a window, where they are others.
    local: Option<Tensor>,
}

impl Decoder {
    /// Loads a language model: `config.json` and the safetensors files in `dir`, as `kind` on
    /// `device`.
    ///
    /// Every tensor is checked against the configuration before the first is
    /// read. Errors name the file and what is wrong in it.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self, ModelError> {
        Self::load_as(ModelConfig::read(dir)?, dir, kind, device)
    }

    /// As [`Self::load`], for a `config` that was read.
    pub(crate) fn load_as(
        config: ModelConfig,
        dir: &Path,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        let checkpoint = Checkpoint::open(dir)?;
        let layout = Layout::new(&config, checkpoint.prefix(config.multimodal));
        checkpoint.check_decoder(&layout)?;
        let mut model = Self::build(config, &layout, kind, device, |slot| {
            Parameter::load(slot, &checkpoint, kind, device)
        })?;
        model.untouched = checkpoint.untouched(&layout)?;
        Ok(model)
    }

    fn build(
        config: ModelConfig,
        layout: &Layout,
        kind: Kind,
        device: Device,
        parameter: impl Fn(&Slot) -> Result<Parameter, ModelError>,
    ) -> Result<Self, ModelError> {
        let frequencies = Frequencies {
            global: config.rope.inverse_frequencies(config.head_dim, device)?,
            local: match &config.local_rope {
                Some(rope) => Some(rope.inverse_frequencies(config.head_dim, device)?),
                None => None,
            },
        };
        let embedding_scale = match config.scaled_embedding {
            true => Some(rounded((config.hidden_size as f64).sqrt(), kind)?),
            false => None,
        };
        let outer = Outer {
            embedding: parameter(&layout.outer.embedding)?,
            norm: parameter(&layout.outer.norm)?,
            head: layout.outer.head.as_ref().map(&parameter).transpose()?,
        };
        let blocks = layout.blocks.iter().enumerate().map(|(layer, slots)| {
            Ok::<_, ModelError>(Block::new(&config, layer, slots.try_map(&parameter)?))
        });
        Ok(Self {
            blocks: blocks.collect::<Result<_, _>>()?,
            config,
            outer,
            untouched: Vec::new(),
            frequencies,
            embedding_scale,
            kind,
            device,
        })
    }

    /// A model of random weights, the same for the same seed: for unit tests.
    #[cfg(test)]
    #[allow(clippy::unwrap_used)]
    pub(crate) fn random(config: ModelConfig, seed: i64) -> Self {
        tch::manual_seed(seed);
        let [prefix, _] = super::layout::Prefix::PLAIN;
        let layout = Layout::new(&config, prefix);
        let (kind, device) = (Kind::Float, Device::Cpu);
        Self::build(config, &layout, kind, device, |slot| {
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

    /// The same model for many steps of few tokens: in the kind in which the device multiplies
    /// matrices, and on a CPU with matrices packed. What needs neither is shared.
    pub(crate) fn for_products(&self) -> Result<Self, TchError> {
        let kind = product_kind(self.kind, self.device);
        let convert = |parameter: &Parameter| {
            let tensor = parameter.tensor.f_detach()?.f_to_kind(kind)?;
            Ok::<_, TchError>(Parameter { tensor, parts: parameter.parts.clone() })
        };
        let for_products = |parameter: &Parameter| match parameter.tensor.dim() {
            2 => {
                let tensor = pack(&parameter.tensor.f_detach()?)?;
                Ok(Parameter { tensor, parts: parameter.parts.clone() })
            }
            _ => convert(parameter),
        };
        let blocks = self.blocks.iter().map(|block| block.try_map(for_products));
        let Outer { embedding, norm, head } = &self.outer;
        Ok(Self {
            config: self.config.clone(),
            blocks: blocks.collect::<Result<_, TchError>>()?,
            outer: Outer {
                embedding: convert(embedding)?,
                norm: convert(norm)?,
                // Tokens are looked up in a tied one: it stays as it is there.
                head: Some(for_products(head.as_ref().unwrap_or(embedding))?),
            },
            // It is computed with, and not saved.
            untouched: Vec::new(),
            frequencies: Frequencies {
                global: self.frequencies.global.shallow_clone(),
                local: self.frequencies.local.as_ref().map(Tensor::shallow_clone),
            },
            embedding_scale: self.embedding_scale,
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
        let rows = Tensor::f_embedding(&self.outer.embedding.tensor, ids, padding, false, false)?;
        match self.embedding_scale {
            Some(scale) => rows.f_mul_scalar(scale),
            None => Ok(rows),
        }
    }

    /// What rows of the embedding are multiplied by.
    pub(crate) fn embedding_scale(&self) -> Option<f64> {
        self.embedding_scale
    }

    /// The longest stretch of tokens that queries of blocks with a window see; none where no
    /// block has one.
    pub fn window(&self) -> Option<i64> {
        self.config.windows.iter().copied().flatten().max()
    }

    /// Rotations for `positions` (`[tokens]`, i64).
    pub fn rotations(&self, positions: &Tensor) -> Result<Rotations, TchError> {
        let Frequencies { global, local } = &self.frequencies;
        let rotary = |frequencies| Rotary::new(frequencies, positions, self.kind);
        Ok(Rotations { global: rotary(global)?, local: local.as_ref().map(rotary).transpose()? })
    }

    /// The norm between the last block and the head: `[tokens, hidden]` → same.
    pub fn final_norm(&self, h: &Tensor) -> Result<Tensor, TchError> {
        self.last_norm().forward(h)
    }

    /// As [`Self::final_norm`], with its backward.
    pub(crate) fn last_norm(&self) -> RmsNorm<'_> {
        let ModelConfig { norm_scale: scale, rms_norm_eps: eps, .. } = self.config;
        RmsNorm { weight: &self.outer.norm.tensor, scale, eps }
    }

    /// The head's weight: `[vocab, hidden]`, the embedding's where they are tied, or
    /// `[1, hidden]` of a model that rates.
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

/// `value` as `kind` has it.
fn rounded(value: f64, kind: Kind) -> Result<f64, TchError> {
    host::read_one(&host::upload(&[value], Device::Cpu)?.f_to_kind(kind)?)
}
