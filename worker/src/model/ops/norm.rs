//! RMSNorm: y = w ⊙ x̂, x̂ = x / √(mean(x²) + ε).

use tch::{Kind, TchError, Tensor};

/// RMSNorm over the last dimension.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    /// w, `[hidden]`.
    pub(crate) weight: &'a Tensor,
    /// ε.
    pub(crate) eps: f64,
}

/// What comes out of a norm's backward.
#[derive(Debug)]
pub(crate) struct NormGradients {
    /// By x, `[rows, hidden]`, fp32.
    pub(crate) by_input: Tensor,
    /// By w, `[hidden]`, fp32.
    pub(crate) by_weight: Tensor,
}

impl RmsNorm<'_> {
    /// As transformers computes it: fp32 inside, rounded to the kind of `x`, then
    /// times w. Handing libtorch the weight would multiply before rounding.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_rms_norm(self.weight.size(), None::<&Tensor>, self.eps)?.f_mul(self.weight)
    }

    /// As [`Self::forward`], into `out`, which is shaped as `x`.
    pub(crate) fn forward_into(&self, x: &Tensor, out: &Tensor) -> Result<(), TchError> {
        let normed = x.f_rms_norm(self.weight.size(), None::<&Tensor>, self.eps)?;
        normed.f_mul_out(out, self.weight).map(drop)
    }

    /// With r = 1 / √(mean(x²) + ε), g = w ⊙ dy and `gradient` = dy:
    ///
    /// ```text
    /// dx = r (g − x̂ · mean(g ⊙ x̂))        dw = Σ over rows of dy ⊙ x̂
    /// ```
    ///
    /// y is written again to `output`, `[rows, hidden]`: it was not kept, and the
    /// layer behind the norm needs it for its own weight's gradient.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        gradient: &Tensor,
        output: &Tensor,
    ) -> Result<NormGradients, TchError> {
        let width = self.weight.size1()?;
        let weight = self.weight.f_to_kind(Kind::Float)?;
        let x32 = x.f_to_kind(Kind::Float)?;
        // The 2-norm reads x once and makes no x².
        let reciprocal = x32
            .f_norm_scalaropt_dim(2, [1i64].as_slice(), true)?
            .f_square_()?
            .f_div_scalar_(width as f64)?
            .f_add_scalar_(self.eps)?
            .f_rsqrt_()?;
        let normed = x32.f_mul(&reciprocal)?;
        let _ = normed.f_to_kind(x.kind())?.f_mul_out(output, self.weight)?;

        let gradient = gradient.f_to_kind(Kind::Float)?;
        // dy ⊙ x̂ serves both sums: over rows it is dw, and times w over columns n · mean(g ⊙ x̂).
        let product = normed.f_mul(&gradient)?;
        let by_weight = product.f_sum_dim_intlist(0, false, Kind::Float)?;
        let mean = product.f_mv(&weight)?.f_div_scalar_(-(width as f64))?.f_unsqueeze(1)?;
        let by_input = gradient.f_mul(&weight)?.f_addcmul_(&normed, &mean)?.f_mul_(&reciprocal)?;
        Ok(NormGradients { by_input, by_weight })
    }
}
