//! libtorch's fused attention, with what is needed to join parts of it.

use tch::{Device, Kind, TchError, Tensor};

/// Queries of a head for which products are faster than the flash kernel.
const FEW_QUERIES: i64 = 16;

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
/// too; on a CPU the flash kernel, but for a few queries in fp32, which plain products serve
/// faster: 64 rows of 400 tokens take SmolLM2's layers 104 ms instead of 144.
pub(super) fn attend(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    sight: Sight<'_>,
    scale: f64,
) -> Result<Part, TchError> {
    if queries.device() == Device::Cpu
        && queries.kind() == Kind::Float
        && queries.size()[2] <= FEW_QUERIES
        && !matches!(sight, Sight::Causal)
    {
        return by_products(queries, keys, values, sight, scale);
    }
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

/// Attention as it is written down, with the softmax's parts kept apart.
fn by_products(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    sight: Sight<'_>,
    scale: f64,
) -> Result<Part, TchError> {
    let mut scores = queries.f_mul_scalar(scale)?.f_matmul(&keys.f_transpose(2, 3)?)?;
    if let Sight::Masked(mask) = sight {
        let _ = scores.f_add_(mask)?;
    }
    let highest = scores.f_amax([-1], true)?;
    let weights = scores.f_sub_(&highest)?.f_exp_()?;
    let sums = weights.f_sum_dim_intlist(-1, true, None)?;
    let output = weights.f_matmul(values)?.f_div_(&sums)?;
    let log_sum_exp = sums.f_log()?.f_add_(&highest)?.f_squeeze_dim(-1)?;
    Ok(Part { output, log_sum_exp })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn products_give_what_the_flash_kernel_gives() {
        tch::manual_seed(9);
        let random = |n: i64| Tensor::randn([3, 2, n, 16], (Kind::Float, Device::Cpu));
        let (queries, keys, values) = (random(4), random(50), random(50));
        let mask = Tensor::zeros([3, 1, 1, 50], (Kind::Float, Device::Cpu));
        let _ = mask.narrow(0, 1, 1).narrow(3, 20, 30).fill_(f64::NEG_INFINITY);
        for sight in [Sight::All, Sight::Masked(&mask)] {
            let ours = by_products(&queries, &keys, &values, sight, 0.3).unwrap();
            let many = |x: &Tensor| x.repeat([1, 1, 5, 1]);
            let flash = attend(&many(&queries), &keys, &values, sight, 0.3).unwrap();
            for (ours, flash) in
                [(ours.output, flash.output), (ours.log_sum_exp, flash.log_sum_exp)]
            {
                let difference = (ours - flash.narrow(2, 0, 4)).abs().max().double_value(&[]);
                assert!(difference < 1e-5, "{sight:?}: {difference:e}");
            }
        }
    }
}
