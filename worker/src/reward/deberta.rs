//! DeBERTa-v3 with a classifier of one label, as transformers'
//! `DebertaV2ForSequenceClassification` computes it.
//!
//! ```text
//! h = norm(embedded)                               n = norm(h + attended W + b)
//! h = norm(n + gelu(n Wᵤ + bᵤ) W𝒹 + b𝒹)            rating = gelu(h₀ Wₚ + bₚ) · w + b
//! ```

mod attention;
mod config;
mod distances;
mod weights;

use std::convert::Infallible;
use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use crate::host;
use crate::model::{Checkpoint, ConfigFile, ModelError};
use attention::Attention;
use config::DebertaConfig;
use weights::{LayerWeights, Weights};

/// The class of transformers that this is.
pub(super) const CLASS: &str = "DebertaV2ForSequenceClassification";

/// What libtorch calls GELU by the error function.
const EXACT: &str = "none";

/// The encoder with its classifier.
#[derive(Debug)]
pub(super) struct Deberta {
    config: DebertaConfig,
    weights: Weights<Tensor>,
    /// A layer each.
    attention: Vec<Attention>,
    device: Device,
}

impl Deberta {
    /// Loads the safetensors files in `dir`, whose configuration is `file`.
    pub(super) fn load(
        file: ConfigFile,
        dir: &Path,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        let config = DebertaConfig::of(file)?;
        let checkpoint = Checkpoint::open(dir)?;
        let mut slots = Vec::new();
        let Ok(_) = Weights::make(&config, &mut |slot| {
            slots.push(slot);
            Ok::<_, Infallible>(())
        });
        checkpoint.check(slots.iter(), is_unused)?;
        let weights = Weights::make(&config, &mut |slot| checkpoint.read(&slot, kind, device))?;
        let attention = tch::no_grad(|| attention(&config, &weights))?;
        Ok(Self { config, weights, attention, device })
    }

    pub(super) fn vocab_size(&self) -> i64 {
        self.config.vocab_size
    }

    /// Tokens that a sequence has at most. Distances would go on; the model was not made for
    /// more, and attention's memory grows with their square.
    pub(super) fn longest(&self) -> i64 {
        self.config.max_position_embeddings
    }

    /// The rating of `tokens`: `[1, 1]`.
    pub(super) fn rate(&self, tokens: &[u32]) -> Result<Tensor, TchError> {
        let Self { config, weights, device, .. } = self;
        let eps = config.layer_norm_eps;
        let ids: Vec<i64> = tokens.iter().copied().map(i64::from).collect();
        let rows = distances::rows(&config.positions, ids.len() as i64, *device)?;
        let embedded = weights.embedding.f_index_select(0, &host::upload(&ids, *device)?)?;
        let mut h = weights.embedding_norm.norm(&embedded, eps)?;
        for (layer, attention) in weights.layers.iter().zip(&self.attention) {
            h = self.layer(layer, attention, &h, &rows)?;
        }
        let first = h.f_narrow(0, 0, 1)?;
        weights.classifier.linear(&weights.pooler.linear(&first)?.f_gelu(EXACT)?)
    }

    /// `h` (`[tokens, hidden]`) → the same shape.
    fn layer(
        &self,
        layer: &LayerWeights<Tensor>,
        attention: &Attention,
        h: &Tensor,
        rows: &Tensor,
    ) -> Result<Tensor, TchError> {
        let eps = self.config.layer_norm_eps;
        let attended = layer.attended.linear(&attention.forward(&layer.qkv, h, rows)?)?;
        let n = layer.attended_norm.norm(&attended.f_add(h)?, eps)?;
        let fed = layer.down.linear(&layer.up.linear(&n)?.f_gelu(EXACT)?)?;
        layer.output_norm.norm(&fed.f_add(&n)?, eps)
    }
}

/// All layers' attention. Projecting the distances for each sequence again would double what
/// a short one costs; kept, they take as much as 2 · span tokens' queries and keys.
fn attention(
    config: &DebertaConfig,
    weights: &Weights<Tensor>,
) -> Result<Vec<Attention>, TchError> {
    let distances = match &weights.distances_norm {
        Some(norm) => norm.norm(&weights.distances, config.layer_norm_eps)?,
        None => weights.distances.shallow_clone(),
    };
    weights.layers.iter().map(|layer| Attention::new(config, layer, &distances)).collect()
}

/// Tensors that old files hold and nothing is computed from: the numbers of places, and
/// absolute positions, which DeBERTa-v3 pre-trains another part of its model with.
fn is_unused(name: &str) -> bool {
    ["position_ids", "position_embeddings.weight"]
        .iter()
        .any(|unused| name.strip_prefix("deberta.embeddings.") == Some(unused))
}

/// Writes weights, the same for the same seed, for the `config.json` in `dir`: for unit tests.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) fn write_random(dir: &Path, seed: i64) {
    tch::manual_seed(seed);
    let config = DebertaConfig::of(ConfigFile::read(dir).unwrap()).unwrap();
    let mut tensors = Vec::new();
    let Ok(_) = Weights::make(&config, &mut |slot| {
        for part in &slot.parts {
            let random = Tensor::randn(slot.shape(part.rows), (Kind::Float, Device::Cpu));
            // Wide enough that distances and content matter.
            let spread = if part.name.ends_with("LayerNorm.weight") { 1.0 } else { 0.3 };
            tensors.push((part.name.clone(), random * spread));
        }
        Ok::<_, Infallible>(())
    });
    Tensor::write_safetensors(&tensors, dir.join("model.safetensors")).unwrap();
}
