//! RMSNorm: y = s ⊙ x̂, x̂ = x / √(mean(x²) + ε), with s = w or 1 + w.

use tch::{Kind, TchError, Tensor};

use crate::kernels;

/// What a norm's weight w says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormScale {
    /// s = w, applied to x̂ rounded to the kind of x: Llama and all that follow it.
    Weight,
    /// s = 1 + w, applied in fp32, and rounded once: Gemma.
    OnePlusWeight,
}

/// RMSNorm over the last dimension.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    /// w, `[width]`.
    pub(crate) weight: &'a Tensor,
    /// What w says.
    pub(crate) scale: NormScale,
    /// ε.
    pub(crate) eps: f64,
}

impl RmsNorm<'_> {
    /// As transformers computes it: `x` (`[…, width]`) → the same shape and kind. Handing
    /// libtorch w would multiply before rounding.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let out = x.f_empty_like()?;
        self.forward_into(x, &out)?;
        Ok(out)
    }

    /// As [`Self::forward`], into `out`, which is shaped as `x`.
    pub(crate) fn forward_into(&self, x: &Tensor, out: &Tensor) -> Result<(), TchError> {
        if kernels::are_for(x.kind(), x.device()) {
            let one_plus = self.scale == NormScale::OnePlusWeight;
            return kernels::rms_norm(x, self.weight, self.eps, one_plus, out);
        }
        let normed = self.normed(x)?;
        match self.scale {
            NormScale::Weight => normed.f_mul_out(out, self.weight).map(drop),
            NormScale::OnePlusWeight => {
                out.shallow_clone().f_copy_(&normed.f_mul(&self.factor()?)?)
            }
        }
    }

    /// x̂, in the kind in which s is applied.
    fn normed(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let x = match self.scale {
            NormScale::Weight => x.shallow_clone(),
            NormScale::OnePlusWeight => x.f_to_kind(Kind::Float)?,
        };
        x.f_rms_norm(self.weight.size(), None::<&Tensor>, self.eps)
    }

    /// s, `[width]`, fp32.
    fn factor(&self) -> Result<Tensor, TchError> {
        let weight = self.weight.f_to_kind(Kind::Float)?;
        match self.scale {
            NormScale::Weight => Ok(weight),
            NormScale::OnePlusWeight => weight.f_add_scalar(1.0),
        }
    }

    /// With r = 1 / √(mean(x²) + ε), g = s ⊙ dy and `gradient` = dy, `[…, width]` as `x`:
    ///
    /// ```text
    /// dx = r (g − x̂ · mean(g ⊙ x̂))        dw = Σ over rows of dy ⊙ x̂
    /// ```
    ///
    /// dx, plus the gradient that reaches x past the norm, `residual`, goes to `by_input`, and
    /// y again to `output`, where it is wanted: it was not kept, and the layer behind the norm
    /// needs it for its own weight's gradient. Returned is dw, `[width]`, fp32.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        gradient: &Tensor,
        [residual, output]: [Option<&Tensor>; 2],
        by_input: &Tensor,
    ) -> Result<Tensor, TchError> {
        if kernels::are_for(x.kind(), x.device()) {
            let norm = (self.eps, self.scale == NormScale::OnePlusWeight);
            let more = [residual, output];
            return kernels::rms_norm_backward(x, self.weight, norm, gradient, more, by_input);
        }
        let width = self.weight.size1()?;
        let factor = self.factor()?;
        let rows = |x: &Tensor| x.f_reshape([-1, width])?.f_to_kind(Kind::Float);
        let x32 = rows(x)?;
        // The 2-norm reads x once and makes no x².
        let reciprocal = x32
            .f_norm_scalaropt_dim(2, [1i64].as_slice(), true)?
            .f_square_()?
            .f_div_scalar_(width as f64)?
            .f_add_scalar_(self.eps)?
            .f_rsqrt_()?;
        let normed = x32.f_mul(&reciprocal)?;
        if let Some(output) = output {
            let kept = match self.scale {
                NormScale::Weight => normed.f_to_kind(x.kind())?.f_mul(self.weight)?,
                NormScale::OnePlusWeight => normed.f_mul(&factor)?,
            };
            output.shallow_clone().f_copy_(&kept.f_view_as(output)?)?;
        }

        let gradient = rows(gradient)?;
        // dy ⊙ x̂ serves both sums: over rows it is dw, and times s over columns n · mean(g ⊙ x̂).
        let product = normed.f_mul(&gradient)?;
        let by_weight = product.f_sum_dim_intlist(0, false, Kind::Float)?;
        let mean = product.f_mv(&factor)?.f_div_scalar_(-(width as f64))?.f_unsqueeze(1)?;
        let mut by_x = gradient.f_mul(&factor)?.f_addcmul_(&normed, &mean)?.f_mul_(&reciprocal)?;
        if let Some(residual) = residual {
            by_x = by_x.f_add_(&rows(residual)?)?;
        }
        by_input.shallow_clone().f_copy_(&by_x.f_view_as(by_input)?)?;
        Ok(by_weight)
    }
}
