//! Weights laid out for products with few rows.
//!
//! Such a product takes as long as reading its weight, and from a weight that lies row after
//! row libtorch's libraries read at half the memory's rate or less. Of SmolLM2's blocks a
//! product with 16 rows takes 26 ms in bf16 (AVX-512 BF16, no AMX), packed by oneDNN 16; with one
//! row 17, and 13. In fp32 (AVX2) it takes 79 ms, packed by oneDNN 50, laid out for a kernel of
//! ours 30; with one row 45, 31 and 22, and 12 if the weight is kept in bf16.
//!
//! libtorch has oneDNN's operators for `torch.compile`, which uses them for frozen weights.

use tch::{Device, Kind, TchError, Tensor};

use super::product::product_kind;
use crate::kernels;

/// Rows that oneDNN lays weights out for; with others they are multiplied, too.
const ROWS: i64 = 16;

/// `weight` (`[out, in]`) for [`multiply`](super::multiply): a copy that nothing else can read.
/// Products of bf16 are oneDNN's, of fp32 ours, which widens weights in bf16 as it reads them. On
/// a GPU, and where nothing is laid out, it is the weight in the kind in which it is multiplied.
pub(crate) fn pack(weight: &Tensor) -> Result<Tensor, TchError> {
    let kind = product_kind(weight.kind(), weight.device());
    if weight.device() == Device::Cpu
        && kind == Kind::Float
        && let Some(panels) = kernels::lay_out(weight)?
    {
        return Ok(panels);
    }
    let weight = weight.f_to_kind(kind)?;
    if cfg!(not(target_arch = "x86_64")) || weight.device() != Device::Cpu {
        return Ok(weight);
    }
    kernels::pack(&weight, ROWS)
}

/// `x` (`[rows, in]`) times a packed `weight`'s transpose, plus `bias` (`[out]`):
/// `[rows, out]`; nothing if it is not packed.
pub(super) fn multiply(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>, TchError> {
    if weight.is_mkldnn() {
        // Of a single row oneDNN takes the sums in another order. With a second one it takes as
        // long, and a row's bits do not tell whether others are beside it.
        let rows = x.size()[0];
        let x = if rows == 1 { x.f_repeat([2, 1])? } else { x.shallow_clone() };
        return kernels::multiply(&x, weight, bias)?.f_narrow(0, 0, rows).map(Some);
    }
    if weight.dim() == 3 {
        return kernels::multiply_laid_out(x, weight, bias).map(Some);
    }
    Ok(None)
}
