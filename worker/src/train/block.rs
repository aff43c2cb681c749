//! One decoder block on one micro-batch: forward, and backward by hand.
//!
//! ```text
//! n₁ = norm₁(h)        qkv = rotate(n₁ Wqkvᵀ)      a = attention(qkv)      m = h + a Wₒᵀ
//! n₂ = norm₂(m)        [g, u] = n₂ Wguᵀ            s = silu(g) ⊙ u         h' = m + s W𝒹ᵀ
//! ```
//!
//! Kept for backward are h, qkv, a, m and [g, u]; n₁, n₂ and s are made again. Matrix
//! products run over all rows at once: libtorch gives those of some hundred rows and
//! narrow outputs to one core alone. What lies between them goes through a few rows
//! at a time ([`Tiles`]), so that its many small passes stay in the cores' caches.

use tch::{Device, Kind, TchError, Tensor};

use super::attention::Attention;
use super::packing::{Packed, Rows};
use crate::model::ops::{Linear, NormGradients, RmsNorm, swiglu_backward, swiglu_into};
use crate::model::{Block, ModelConfig, PerBlock, Rotary};

/// Bytes of a tile of [g, u], where it is widest, on a CPU. From a quarter of this to
/// twice it makes no difference; without tiles long micro-batches take 4 % more time.
const TILE_BYTES: i64 = 3 << 20;

/// How a micro-batch's rows are walked by what is no matrix product: a few at a time on
/// a CPU, all at once on a GPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    rows: i64,
    length: i64,
}

impl Tiles {
    /// Of `rows` rows whose widest activation has `width` elements of `kind`.
    pub(super) fn new(rows: i64, width: i64, kind: Kind, device: Device) -> Self {
        let length = match device {
            Device::Cpu => TILE_BYTES / (width * kind.elt_size_in_bytes() as i64),
            _ => rows,
        };
        Self { rows, length }
    }

    fn iter(self) -> impl Iterator<Item = Rows> {
        Rows::cover(self.rows, self.length)
    }
}

/// A block, and what it computes on.
pub(super) struct BlockPass<'a> {
    pub(super) block: &'a Block,
    pub(super) packed: &'a Packed,
    pub(super) rotary: &'a Rotary,
    pub(super) tiles: Tiles,
}

/// What a block's backward needs of its forward.
#[derive(Debug)]
pub(super) struct Kept {
    /// h, `[tokens, hidden]`.
    input: Tensor,
    /// Rotated, `[tokens, (heads + 2 kv_heads) · head_dim]`.
    qkv: Tensor,
    attention: Attention,
    /// a, `[tokens, heads · head_dim]`.
    attended: Tensor,
    /// m, `[tokens, hidden]`.
    middle: Tensor,
    /// [g, u], `[tokens, 2 · intermediate]`.
    gate_up: Tensor,
}

/// Takes the gradient by one of the block's weights, named by its place.
pub(super) type AddGradient<'a> = dyn FnMut(usize, &Tensor) -> Result<(), TchError> + 'a;

impl BlockPass<'_> {
    /// h → h', keeping nothing.
    pub(super) fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        let qkv = self.queries_keys_values(input)?;
        let attended = self.like_queries(&qkv)?;
        let heads = self.block.by_head(&qkv)?;
        Attention::forward(self.packed, &heads, &self.by_query_head(&attended)?)?;
        drop((heads, qkv));
        let middle = self.add_attended(input, &attended)?;
        Ok(self.add_mlp(&middle)?.0)
    }

    /// h → h', and what [`Self::backward`] needs: the same bits as [`Self::forward`].
    pub(super) fn record(&self, input: &Tensor) -> Result<(Tensor, Kept), TchError> {
        let qkv = self.queries_keys_values(input)?;
        let attended = self.like_queries(&qkv)?;
        let heads = self.block.by_head(&qkv)?;
        let attention = Attention::forward(self.packed, &heads, &self.by_query_head(&attended)?)?;
        let middle = self.add_attended(input, &attended)?;
        let (output, gate_up) = self.add_mlp(&middle)?;
        let input = input.shallow_clone();
        Ok((output, Kept { input, qkv, attention, attended, middle, gate_up }))
    }

    /// Bytes that [`Self::record`] keeps of a block for `tokens` tokens.
    pub(super) fn kept_bytes(block: &Block, tokens: i64, kind: Kind) -> u64 {
        let out = |layer: Linear<'_>| layer.weight.size()[0];
        let hidden = out(block.output());
        let attended = block.output().weight.size()[1];
        let width = 2 * hidden + out(block.qkv()) + attended + out(block.gate_up());
        (tokens * width) as u64 * kind.elt_size_in_bytes() as u64
    }

    /// Bytes of a block's input alone.
    pub(super) fn input_bytes(config: &ModelConfig, tokens: i64, kind: Kind) -> u64 {
        (tokens * config.hidden_size) as u64 * kind.elt_size_in_bytes() as u64
    }

    /// Gradient by h, given that by h', `gradient`; those by weights go to `add`.
    pub(super) fn backward(
        &self,
        kept: Kept,
        gradient: &Tensor,
        add: &mut AddGradient<'_>,
    ) -> Result<Tensor, TchError> {
        let places = self.block.places();
        let Kept { input, qkv, attention, attended, middle, gate_up } = kept;
        let by_middle = self.mlp_backward(&middle, &gate_up, gradient, &places, add)?;
        drop((middle, gate_up));

        let by_attended = self.block.output().backward(&by_middle)?;
        add(places.output, &Linear::by_weight(&by_middle, &attended)?)?;
        if let Some(place) = places.output_bias {
            add(place, &Linear::by_bias(&by_middle)?)?;
        }
        let by_qkv = qkv.f_empty_like()?;
        attention.backward(
            self.packed,
            &self.block.by_head(&qkv)?,
            &self.by_query_head(&attended)?,
            &self.by_query_head(&by_attended)?,
            &self.block.by_head(&by_qkv)?,
        )?;
        drop((attended, qkv, by_attended));
        self.queries_keys_values_backward(&input, &by_qkv, &by_middle, &places, add)
    }

    /// qkv = rotate(norm₁(h) Wqkvᵀ).
    fn queries_keys_values(&self, input: &Tensor) -> Result<Tensor, TchError> {
        let normed = self.norm(self.block.input_norm(), input)?;
        let qkv = self.block.qkv().forward(&normed)?;
        self.turn(&qkv, self.rotary)?;
        Ok(qkv)
    }

    /// m = h + a Wₒᵀ.
    fn add_attended(&self, input: &Tensor, attended: &Tensor) -> Result<Tensor, TchError> {
        self.block.output().forward(attended)?.f_add_(input)
    }

    /// h' = m + s W𝒹ᵀ, and [g, u].
    fn add_mlp(&self, middle: &Tensor) -> Result<(Tensor, Tensor), TchError> {
        let normed = self.norm(self.block.mlp_norm(), middle)?;
        let gate_up = self.block.gate_up().forward(&normed)?;
        drop(normed);
        let activated = empty_like(middle, self.block.down().weight.size()[1])?;
        for rows in self.tiles.iter() {
            swiglu_into(&rows.of(&gate_up)?, &rows.of(&activated)?)?;
        }
        let output = self.block.down().forward(&activated)?.f_add_(middle)?;
        Ok((output, gate_up))
    }

    /// Gradient by m. `gate_up` is overwritten with the gradient by it.
    fn mlp_backward(
        &self,
        middle: &Tensor,
        gate_up: &Tensor,
        gradient: &Tensor,
        places: &PerBlock<usize>,
        add: &mut AddGradient<'_>,
    ) -> Result<Tensor, TchError> {
        let by_activated = self.block.down().backward(gradient)?;
        let activated = by_activated.f_empty_like()?;
        for rows in self.tiles.iter() {
            swiglu_backward(&rows.of(gate_up)?, &rows.of(&by_activated)?, &rows.of(&activated)?)?;
        }
        add(places.down, &Linear::by_weight(gradient, &activated)?)?;
        drop((activated, by_activated));

        let by_normed = self.block.gate_up().backward(gate_up)?;
        let norm = self.norm_backward(self.block.mlp_norm(), middle, &by_normed, gradient)?;
        add(places.gate_up, &Linear::by_weight(gate_up, &norm.output)?)?;
        add(places.mlp_norm, &norm.by_weight)?;
        Ok(norm.by_input)
    }

    /// Gradient by h, given those by qkv, which is turned back, and by m, on the
    /// residual's way.
    fn queries_keys_values_backward(
        &self,
        input: &Tensor,
        by_qkv: &Tensor,
        by_middle: &Tensor,
        places: &PerBlock<usize>,
        add: &mut AddGradient<'_>,
    ) -> Result<Tensor, TchError> {
        self.turn(by_qkv, &self.rotary.inverse()?)?;
        if let Some(place) = places.qkv_bias {
            add(place, &Linear::by_bias(by_qkv)?)?;
        }
        let by_normed = self.block.qkv().backward(by_qkv)?;
        let norm = self.norm_backward(self.block.input_norm(), input, &by_normed, by_middle)?;
        add(places.qkv, &Linear::by_weight(by_qkv, &norm.output)?)?;
        add(places.input_norm, &norm.by_weight)?;
        Ok(norm.by_input)
    }

    /// Turns queries and keys, tile by tile, in place.
    fn turn(&self, qkv: &Tensor, rotary: &Rotary) -> Result<(), TchError> {
        for rows in self.tiles.iter() {
            let mut turned = self.block.by_head(&rows.of(qkv)?)?.queries_and_keys;
            turned.f_copy_(&rotary.narrow(rows.start, rows.length)?.rotate(&turned)?)?;
        }
        Ok(())
    }

    fn norm(&self, norm: RmsNorm<'_>, x: &Tensor) -> Result<Tensor, TchError> {
        let output = x.f_empty_like()?;
        for rows in self.tiles.iter() {
            norm.forward_into(&rows.of(x)?, &rows.of(&output)?)?;
        }
        Ok(output)
    }

    /// `residual`, the gradient that reaches x past the norm, is added to that by x.
    fn norm_backward(
        &self,
        norm: RmsNorm<'_>,
        x: &Tensor,
        gradient: &Tensor,
        residual: &Tensor,
    ) -> Result<NormBackward, TchError> {
        let (output, by_input) = (x.f_empty_like()?, x.f_empty_like()?);
        let mut by_weight = Tensor::f_zeros(norm.weight.size(), (Kind::Float, x.device()))?;
        for rows in self.tiles.iter() {
            let NormGradients { by_input: mut by_x, by_weight: by_w } =
                norm.backward(&rows.of(x)?, &rows.of(gradient)?, &rows.of(&output)?)?;
            rows.of(&by_input)?.f_copy_(&by_x.f_add_(&rows.of(residual)?)?)?;
            let _ = by_weight.f_add_(&by_w)?;
        }
        Ok(NormBackward { output, by_input, by_weight })
    }

    fn like_queries(&self, qkv: &Tensor) -> Result<Tensor, TchError> {
        empty_like(qkv, self.block.output().weight.size()[1])
    }

    /// `[tokens, heads · head_dim]` → `[tokens, heads, head_dim]`: a view.
    fn by_query_head(&self, attended: &Tensor) -> Result<Tensor, TchError> {
        attended.f_view([-1, self.block.heads(), self.block.head_dim()])
    }
}

/// What a norm's backward comes to over all tiles.
struct NormBackward {
    /// The norm's output again, `[tokens, hidden]`.
    output: Tensor,
    /// Gradient by its input, the residual's included: `[tokens, hidden]`.
    by_input: Tensor,
    /// Gradient by its weight, `[hidden]`, fp32.
    by_weight: Tensor,
}

/// As many rows as `like` has, of `width` elements.
fn empty_like(like: &Tensor, width: i64) -> Result<Tensor, TchError> {
    Tensor::f_empty([like.size2()?.0, width], (like.kind(), like.device()))
}
