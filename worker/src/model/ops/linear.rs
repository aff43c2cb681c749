//! y = x Wᵀ + b.

use tch::{Kind, TchError, Tensor};

use super::product::{multiply, operands};

/// A linear layer over `[rows, in]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linear<'a> {
    /// W, `[out, in]`; packed, if forward is all that is asked.
    pub(crate) weight: &'a Tensor,
    /// b, `[out]`.
    pub(crate) bias: Option<&'a Tensor>,
}

impl Linear<'_> {
    /// `x` (`[rows, in]`) → `[rows, out]`, of x's kind.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        multiply(x, self.weight, self.bias)?.f_to_kind(x.kind())
    }

    /// Gradient by x, `[rows, in]`, given that by y, `[rows, out]`: dy W.
    pub(crate) fn backward(&self, gradient: &Tensor) -> Result<Tensor, TchError> {
        let [by_output, weight] = operands([gradient, self.weight])?;
        by_output.f_mm(&weight)?.f_to_kind(gradient.kind())
    }

    /// Gradient by W, `[out, in]`: dyᵀ x. Where it is summed in fp32 it stays so.
    pub(crate) fn by_weight(gradient: &Tensor, x: &Tensor) -> Result<Tensor, TchError> {
        let [by_output, input] = operands([gradient, x])?;
        by_output.f_tr()?.f_mm(&input)
    }

    /// Gradient by b, `[out]`, in fp32.
    pub(crate) fn by_bias(gradient: &Tensor) -> Result<Tensor, TchError> {
        gradient.f_sum_dim_intlist(0, false, Kind::Float)
    }
}
