//! Weights as oneDNN lays them out for products with few rows.
//!
//! Such a product takes as long as reading its weight, and from a weight that lies row after
//! row libtorch's libraries read at half the memory's rate or less. Of SmolLM2's blocks a
//! product with 16 rows takes 26 ms in bf16 (AVX-512 BF16, no AMX) and 69 ms in fp32, from
//! packed weights 16 and 29; with one row 17 and 40, and 13 and 26.
//!
//! libtorch has the operators for `torch.compile`, which uses them for frozen weights.

use tch::{Device, TchError, Tensor};

use crate::kernels;

/// Rows that weights are laid out for; with others they are multiplied, too.
const ROWS: i64 = 16;

/// `weight` (`[out, in]`) for [`multiply`]: a copy that nothing else can read. Itself on a
/// GPU, and on processors whose libraries lay nothing out.
pub(crate) fn pack(weight: &Tensor) -> Result<Tensor, TchError> {
    if cfg!(not(target_arch = "x86_64")) || weight.device() != Device::Cpu {
        return Ok(weight.shallow_clone());
    }
    kernels::pack(weight, ROWS)
}

/// `x` (`[rows, in]`) times a packed `weight`'s transpose, plus `bias` (`[out]`):
/// `[rows, out]`.
pub(super) fn multiply(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, TchError> {
    // Of a single row oneDNN takes the sums in another order. With a second one it takes as
    // long, and a row's bits do not tell whether others are beside it.
    let rows = x.size()[0];
    let x = if rows == 1 { x.f_repeat([2, 1])? } else { x.shallow_clone() };
    kernels::multiply(&x, weight, bias)?.f_narrow(0, 0, rows)
}
