//! A block's norms, tile by tile: ahead of attention and MLP, on heads, and on the way to
//! the residual.

use tch::{Kind, TchError, Tensor};

use super::{AddGradient, BlockPass};
use crate::model::ops::{NormGradients, RmsNorm};
use crate::model::{Heads, PerBlock};

/// What the backward of a norm ahead of a layer comes to over all tiles.
pub(super) struct NormBackward {
    /// The norm's output again, `[tokens, hidden]`.
    pub(super) output: Tensor,
    /// Gradient by its input, the residual's included: `[tokens, hidden]`.
    pub(super) by_input: Tensor,
    /// Gradient by its weight, `[hidden]`, fp32.
    pub(super) by_weight: Tensor,
}

impl BlockPass<'_> {
    pub(super) fn norm(&self, norm: RmsNorm<'_>, x: &Tensor) -> Result<Tensor, TchError> {
        let output = x.f_empty_like()?;
        for rows in self.tiles.iter() {
            norm.forward_into(&rows.of(x)?, &rows.of(&output)?)?;
        }
        Ok(output)
    }

    /// `residual`, the gradient that reaches x past the norm, is added to that by x.
    pub(super) fn norm_backward(
        &self,
        norm: RmsNorm<'_>,
        x: &Tensor,
        gradient: &Tensor,
        residual: &Tensor,
    ) -> Result<NormBackward, TchError> {
        let (output, by_input) = (x.f_empty_like()?, x.f_empty_like()?);
        let mut by_weight = no_gradient(norm)?;
        for rows in self.tiles.iter() {
            let NormGradients { by_input: mut by_x, by_weight: by_w } =
                norm.backward(&rows.of(x)?, &rows.of(gradient)?, Some(&rows.of(&output)?))?;
            rows.of(&by_input)?.f_copy_(&by_x.f_add_(&rows.of(residual)?)?)?;
            let _ = by_weight.f_add_(&by_w)?;
        }
        Ok(NormBackward { output, by_input, by_weight })
    }

    /// `residual` + `output`, and the output where `norm` is between them.
    pub(super) fn add_to_residual(
        &self,
        mut output: Tensor,
        norm: Option<RmsNorm<'_>>,
        residual: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>), TchError> {
        match norm {
            None => Ok((output.f_add_(residual)?, None)),
            Some(norm) => Ok((self.norm(norm, &output)?.f_add_(residual)?, Some(output))),
        }
    }

    /// Gradient by `output`, given that by the sum it went to: the same where no norm, told
    /// with its weight's place, is between them.
    pub(super) fn output_norm_backward(
        &self,
        norm: Option<(RmsNorm<'_>, usize)>,
        output: Option<Tensor>,
        gradient: &Tensor,
        add: &mut AddGradient<'_>,
    ) -> Result<Tensor, TchError> {
        let Some(((norm, place), output)) = norm.zip(output) else {
            return Ok(gradient.shallow_clone());
        };
        let by_output = output.f_empty_like()?;
        let mut by_weight = no_gradient(norm)?;
        for rows in self.tiles.iter() {
            let by = norm.backward(&rows.of(&output)?, &rows.of(gradient)?, None)?;
            rows.of(&by_output)?.f_copy_(&by.by_input)?;
            let _ = by_weight.f_add_(&by.by_weight)?;
        }
        add(place, &by_weight)?;
        Ok(by_output)
    }

    /// What attention is given of qkv: views, where its heads are not normed, and else its
    /// queries and keys normed and rotated.
    pub(super) fn attended_heads(&self, qkv: &Tensor) -> Result<Heads, TchError> {
        let raw = self.block.by_head(qkv)?;
        let Some([of_queries, of_keys]) = self.block.head_norms() else { return Ok(raw) };
        let normed = Tensor::f_empty(raw.queries_and_keys.size(), (qkv.kind(), qkv.device()))?;
        let heads = self.block.heads();
        let queries = normed.f_narrow(1, 0, heads)?;
        let keys = normed.f_narrow(1, heads, raw.keys.size()[1])?;
        for rows in self.tiles.iter() {
            of_queries.forward_into(&rows.of(&raw.queries)?, &rows.of(&queries)?)?;
            of_keys.forward_into(&rows.of(&raw.keys)?, &rows.of(&keys)?)?;
            let mut both = rows.of(&normed)?;
            both.f_copy_(&self.rotary.narrow(rows.start, rows.length)?.rotate(&both)?)?;
        }
        Ok(Heads { queries, keys, values: raw.values, queries_and_keys: normed })
    }

    /// Turns the gradient by normed queries and keys in `by_qkv` into that by them as they
    /// were projected; nothing to do where they are not normed.
    pub(super) fn head_norms_backward(
        &self,
        qkv: &Tensor,
        by_qkv: &Tensor,
        places: &PerBlock<usize>,
        add: &mut AddGradient<'_>,
    ) -> Result<(), TchError> {
        let Some([of_queries, of_keys]) = self.block.head_norms() else { return Ok(()) };
        let (x, by_x) = (self.block.by_head(qkv)?, self.block.by_head(by_qkv)?);
        // To the norm each head is a row.
        let by_row = |x: &Tensor| x.f_reshape([-1, self.block.head_dim()]);
        for (norm, place, x, by_x) in [
            (of_queries, places.query_norm, x.queries, by_x.queries),
            (of_keys, places.key_norm, x.keys, by_x.keys),
        ] {
            let mut by_weight = no_gradient(norm)?;
            for rows in self.tiles.iter() {
                let mut by_some = rows.of(&by_x)?;
                let by = norm.backward(&by_row(&rows.of(&x)?)?, &by_row(&by_some)?, None)?;
                by_some.f_copy_(&by.by_input.f_view_(by_some.size())?)?;
                let _ = by_weight.f_add_(&by.by_weight)?;
            }
            if let Some(place) = place {
                add(place, &by_weight)?;
            }
        }
        Ok(())
    }
}

/// Of a norm's weight, before there is any: zeros in fp32.
fn no_gradient(norm: RmsNorm<'_>) -> Result<Tensor, TchError> {
    Tensor::f_zeros(norm.weight.size(), (Kind::Float, norm.weight.device()))
}
