//! One decoder block on one micro-batch: forward, and backward by hand.
//!
//! ```text
//! n₁ = norm₁(h)        qkv = rotate(n₁ Wqkvᵀ)      a = attention(qkv)      m = h + o,   o = a Wₒᵀ
//! n₂ = norm₂(m)        [g, u] = n₂ Wguᵀ            s = φ(g) ⊙ u            h' = m + d,  d = s W𝒹ᵀ
//! ```
//!
//! Some families norm each head of queries and keys ahead of the rotation, and some what
//! attention and MLP add to the residual, o and d.
//!
//! Kept for backward are h, qkv, a, m and [g, u], and o and d where they are normed; n₁, n₂
//! and s are made again, and so is what comes of qkv where its heads are normed. All of it
//! runs over all rows at once: libtorch gives products of some hundred rows and narrow outputs
//! to one core alone.

mod norms;

use tch::{Kind, TchError, Tensor};

use super::attention::Attention;
use super::packing::Packed;
use crate::model::ops::Linear;
use crate::model::{Block, ModelConfig, PerBlock, Rotary};

/// A block, and what it computes on.
pub(super) struct BlockPass<'a> {
    pub(super) block: &'a Block,
    pub(super) packed: &'a Packed,
    pub(super) rotary: &'a Rotary,
}

/// What a block's backward needs of its forward.
#[derive(Debug)]
pub(super) struct Kept {
    /// h, `[tokens, hidden]`.
    input: Tensor,
    /// `[tokens, (heads + 2 kv_heads) · head_dim]`: rotated, or as projected where its heads
    /// are normed.
    qkv: Tensor,
    attention: Attention,
    /// a, `[tokens, heads · head_dim]`.
    attended: Tensor,
    /// o, `[tokens, hidden]`, where it is normed.
    attention_output: Option<Tensor>,
    /// m, `[tokens, hidden]`.
    middle: Tensor,
    mlp: KeptMlp,
}

/// What the MLP's backward needs beside m.
#[derive(Debug)]
struct KeptMlp {
    /// [g, u], `[tokens, 2 · intermediate]`.
    gate_up: Tensor,
    /// d, `[tokens, hidden]`, where it is normed.
    output: Option<Tensor>,
}

/// Takes the gradient by one of the block's weights, named by its place.
pub(super) type AddGradient<'a> = dyn FnMut(usize, &Tensor) -> Result<(), TchError> + 'a;

impl BlockPass<'_> {
    /// h → h', keeping nothing.
    pub(super) fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        let qkv = self.queries_keys_values(input)?;
        let attended = self.like_queries(&qkv)?;
        let heads = self.attended_heads(&qkv)?;
        Attention::forward(self.packed, self.block, &heads, &self.by_query_head(&attended)?)?;
        drop((heads, qkv));
        let (middle, _) = self.add_attended(input, &attended)?;
        Ok(self.add_mlp(&middle)?.0)
    }

    /// h → h', and what [`Self::backward`] needs: the same bits as [`Self::forward`].
    pub(super) fn record(&self, input: &Tensor) -> Result<(Tensor, Kept), TchError> {
        let qkv = self.queries_keys_values(input)?;
        let attended = self.like_queries(&qkv)?;
        let heads = self.attended_heads(&qkv)?;
        let by_head = self.by_query_head(&attended)?;
        let attention = Attention::forward(self.packed, self.block, &heads, &by_head)?;
        let (middle, attention_output) = self.add_attended(input, &attended)?;
        let (output, mlp) = self.add_mlp(&middle)?;
        let input = input.shallow_clone();
        Ok((output, Kept { input, qkv, attention, attended, attention_output, middle, mlp }))
    }

    /// Bytes that [`Self::record`] keeps of a block for `tokens` tokens.
    pub(super) fn kept_bytes(block: &Block, tokens: i64, kind: Kind) -> u64 {
        let out = |layer: Linear<'_>| layer.weight.size()[0];
        let hidden = out(block.output());
        let attended = block.output().weight.size()[1];
        let normed_outputs = [block.attention_output_norm(), block.mlp_output_norm()];
        let of_hidden = 2 + normed_outputs.iter().flatten().count() as i64;
        let width = of_hidden * hidden + out(block.qkv()) + attended + out(block.gate_up());
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
        let Kept { input, qkv, attention, attended, attention_output, middle, mlp } = kept;
        let by_middle = self.mlp_backward(&middle, mlp, gradient, &places, add)?;
        drop(middle);

        let norm = self.block.attention_output_norm().zip(places.attention_output_norm);
        let by_output = Self::output_norm_backward(norm, attention_output, &by_middle, add)?;
        let by_attended = self.block.output().backward(&by_output)?;
        add(places.output, &Linear::by_weight(&by_output, &attended)?)?;
        if let Some(place) = places.output_bias {
            add(place, &Linear::by_bias(&by_output)?)?;
        }
        drop(by_output);
        let by_qkv = qkv.f_empty_like()?;
        attention.backward(
            self.packed,
            self.block,
            &self.attended_heads(&qkv)?,
            &self.by_query_head(&attended)?,
            &self.by_query_head(&by_attended)?,
            &self.block.by_head(&by_qkv)?,
        )?;
        drop((attended, by_attended));
        self.turn(&by_qkv, &self.rotary.inverse()?)?;
        self.head_norms_backward(&qkv, &by_qkv, &places, add)?;
        drop(qkv);
        self.queries_keys_values_backward(&input, &by_qkv, &by_middle, &places, add)
    }

    /// qkv = norm₁(h) Wqkvᵀ, and rotated where its heads are not normed ahead of that.
    fn queries_keys_values(&self, input: &Tensor) -> Result<Tensor, TchError> {
        let normed = self.block.input_norm().forward(input)?;
        let qkv = self.block.qkv().forward(&normed)?;
        if self.block.head_norms().is_none() {
            self.turn(&qkv, self.rotary)?;
        }
        Ok(qkv)
    }

    /// m = h + o, and o where it is normed on its way.
    fn add_attended(
        &self,
        input: &Tensor,
        attended: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>), TchError> {
        let output = self.block.output().forward(attended)?;
        Self::add_to_residual(output, self.block.attention_output_norm(), input)
    }

    /// h' = m + d, and what is kept.
    fn add_mlp(&self, middle: &Tensor) -> Result<(Tensor, KeptMlp), TchError> {
        let normed = self.block.mlp_norm().forward(middle)?;
        let gate_up = self.block.gate_up().forward(&normed)?;
        drop(normed);
        let activated = self.block.activation().gated(&gate_up)?;
        let output = self.block.down().forward(&activated)?;
        let (sum, output) = Self::add_to_residual(output, self.block.mlp_output_norm(), middle)?;
        Ok((sum, KeptMlp { gate_up, output }))
    }

    /// Gradient by m. [g, u] is overwritten with the gradient by it.
    fn mlp_backward(
        &self,
        middle: &Tensor,
        kept: KeptMlp,
        gradient: &Tensor,
        places: &PerBlock<usize>,
        add: &mut AddGradient<'_>,
    ) -> Result<Tensor, TchError> {
        let KeptMlp { gate_up, output } = kept;
        let norm = self.block.mlp_output_norm().zip(places.mlp_output_norm);
        let by_output = Self::output_norm_backward(norm, output, gradient, add)?;
        let by_activated = self.block.down().backward(&by_output)?;
        let activated = by_activated.f_empty_like()?;
        self.block.activation().gated_backward(&gate_up, &by_activated, &activated)?;
        add(places.down, &Linear::by_weight(&by_output, &activated)?)?;
        drop((activated, by_activated, by_output));

        let by_normed = self.block.gate_up().backward(&gate_up)?;
        let norm = Self::norm_backward(self.block.mlp_norm(), middle, &by_normed, gradient)?;
        add(places.gate_up, &Linear::by_weight(&gate_up, &norm.output)?)?;
        add(places.mlp_norm, &norm.by_weight)?;
        Ok(norm.by_input)
    }

    /// Gradient by h, given those by qkv as it was projected, and by m, on the residual's way.
    fn queries_keys_values_backward(
        &self,
        input: &Tensor,
        by_qkv: &Tensor,
        by_middle: &Tensor,
        places: &PerBlock<usize>,
        add: &mut AddGradient<'_>,
    ) -> Result<Tensor, TchError> {
        if let Some(place) = places.qkv_bias {
            add(place, &Linear::by_bias(by_qkv)?)?;
        }
        let by_normed = self.block.qkv().backward(by_qkv)?;
        let norm = Self::norm_backward(self.block.input_norm(), input, &by_normed, by_middle)?;
        add(places.qkv, &Linear::by_weight(by_qkv, &norm.output)?)?;
        add(places.input_norm, &norm.by_weight)?;
        Ok(norm.by_input)
    }

    /// Turns queries and keys in place.
    fn turn(&self, qkv: &Tensor, rotary: &Rotary) -> Result<(), TchError> {
        rotary.rotate(&self.block.by_head(qkv)?.queries_and_keys)
    }

    fn like_queries(&self, qkv: &Tensor) -> Result<Tensor, TchError> {
        empty_like(qkv, self.block.output().weight.size()[1])
    }

    /// `[tokens, heads · head_dim]` → `[tokens, heads, head_dim]`: a view.
    fn by_query_head(&self, attended: &Tensor) -> Result<Tensor, TchError> {
        attended.f_view([-1, self.block.heads(), self.block.head_dim()])
    }
}

/// As many rows as `like` has, of `width` elements.
fn empty_like(like: &Tensor, width: i64) -> Result<Tensor, TchError> {
    Tensor::f_empty([like.size2()?.0, width], (like.kind(), like.device()))
}
