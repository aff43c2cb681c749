//! y = x Wᵀ + b.

use tch::{Kind, TchError, Tensor};

/// A linear layer over `[rows, in]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linear<'a> {
    /// W, `[out, in]`.
    pub(crate) weight: &'a Tensor,
    /// b, `[out]`.
    pub(crate) bias: Option<&'a Tensor>,
}

impl Linear<'_> {
    /// `x` (`[rows, in]`) → `[rows, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_linear(self.weight, self.bias)
    }

    /// Gradient by x, `[rows, in]`, given that by y, `[rows, out]`: dy W.
    pub(crate) fn backward(&self, gradient: &Tensor) -> Result<Tensor, TchError> {
        gradient.f_mm(self.weight)
    }

    /// Gradient by W, `[out, in]`: dyᵀ x.
    pub(crate) fn by_weight(gradient: &Tensor, x: &Tensor) -> Result<Tensor, TchError> {
        gradient.f_tr()?.f_mm(x)
    }

    /// Gradient by b, `[out]`, in fp32.
    pub(crate) fn by_bias(gradient: &Tensor) -> Result<Tensor, TchError> {
        gradient.f_sum_dim_intlist(0, false, Kind::Float)
    }
}
