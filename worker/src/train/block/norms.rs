//! A block's norms: ahead of attention and MLP, on heads, and on the way to the residual.

use tch::{TchError, Tensor};

use super::{AddGradient, BlockPass};
use crate::model::ops::RmsNorm;
use crate::model::{Heads, PerBlock};

/// What the backward of a norm ahead of a layer comes to.
pub(super) struct NormBackward {
    /// The norm's output again, `[tokens, hidden]`.
    pub(super) output: Tensor,
    /// Gradient by its input, the residual's included: `[tokens, hidden]`.
    pub(super) by_input: Tensor,
    /// Gradient by its weight, `[hidden]`, fp32.
    pub(super) by_weight: Tensor,
}

impl BlockPass<'_> {
    /// `residual`, the gradient that reaches x past the norm, is added to that by x.
    pub(super) fn norm_backward(
        norm: RmsNorm<'_>,
        x: &Tensor,
        gradient: &Tensor,
        residual: &Tensor,
    ) -> Result<NormBackward, TchError> {
        let (output, by_input) = (x.f_empty_like()?, x.f_empty_like()?);
        let more = [Some(residual), Some(&output)];
        let by_weight = norm.backward(x, gradient, more, &by_input)?;
        Ok(NormBackward { output, by_input, by_weight })
    }

    /// `residual` + `output`, and the output where `norm` is between them.
    pub(super) fn add_to_residual(
        mut output: Tensor,
        norm: Option<RmsNorm<'_>>,
        residual: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>), TchError> {
        match norm {
            None => Ok((output.f_add_(residual)?, None)),
            Some(norm) => Ok((norm.forward(&output)?.f_add_(residual)?, Some(output))),
        }
    }

    /// Gradient by `output`, given that by the sum it went to: the same where no norm, told
    /// with its weight's place, is between them.
    pub(super) fn output_norm_backward(
        norm: Option<(RmsNorm<'_>, usize)>,
        output: Option<Tensor>,
        gradient: &Tensor,
        add: &mut AddGradient<'_>,
    ) -> Result<Tensor, TchError> {
        let Some(((norm, place), output)) = norm.zip(output) else {
            return Ok(gradient.shallow_clone());
        };
        let by_output = output.f_empty_like()?;
        let by_weight = norm.backward(&output, gradient, [None, None], &by_output)?;
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
        of_queries.forward_into(&raw.queries, &queries)?;
        of_keys.forward_into(&raw.keys, &keys)?;
        self.rotary.rotate(&normed)?;
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
        for (norm, place, x, by_x) in [
            (of_queries, places.query_norm, x.queries, by_x.queries),
            (of_keys, places.key_norm, x.keys, by_x.keys),
        ] {
            // To the norm each head is a row, and what it reads of one is read before it is
            // written.
            let by_weight = norm.backward(&x, &by_x, [None, None], &by_x)?;
            if let Some(place) = place {
                add(place, &by_weight)?;
            }
        }
        Ok(())
    }
}
