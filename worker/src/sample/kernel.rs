//! libtorch's fused attention, with what is needed to join parts of it.

use tch::{Device, TchError, Tensor};

/// Attention over some of the keys: its output, and how much weight these keys have.
#[derive(Debug)]
pub(super) struct Part {
    /// `[batch, heads, queries, head_dim]`.
    pub(super) output: Tensor,
    /// Log of the softmax's denominator, `[batch, heads, queries]`, fp32.
    pub(super) log_sum_exp: Tensor,
}

/// Who sees whom.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sight<'a> {
    /// Everything.
    All,
    /// Query i the keys from 0 to i.
    Causal,
    /// What a mask, added to the scores and broadcast over them, leaves.
    Masked(&'a Tensor),
}

/// Attends: `queries` `[batch, heads, n, head_dim]`, `keys` and `values` `[batch, heads,
/// m, head_dim]` with as many heads; scores are multiplied by `scale`.
///
/// On a GPU this is the memory-efficient kernel, which takes masks and tells the denominator
/// too; on a CPU the flash kernel.
pub(super) fn attend(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    sight: Sight<'_>,
    scale: f64,
) -> Result<Part, TchError> {
    let causal = matches!(sight, Sight::Causal);
    let mask = match sight {
        Sight::Masked(mask) => Some(mask),
        Sight::All | Sight::Causal => None,
    };
    let (output, log_sum_exp) = match queries.device() {
        Device::Cpu => Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, mask, scale,
        )?,
        _ => {
            let (output, log_sum_exp, ..) =
                Tensor::f_internal_scaled_dot_product_efficient_attention(
                    queries, keys, values, mask, true, 0.0, causal, scale,
                )?;
            // It pads the number of queries.
            let log_sum_exp = log_sum_exp.f_narrow(2, 0, queries.size()[2])?;
            (output, log_sum_exp)
        }
    };
    Ok(Part { output, log_sum_exp })
}
