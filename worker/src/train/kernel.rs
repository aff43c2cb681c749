//! libtorch's fused attention, forward and backward, on either kind of device.
//!
//! The one operation whose derivative is not written out here: both directions are
//! fused kernels of libtorch's. On a CPU they are called as such, and nothing is
//! kept but a number per query; elsewhere libtorch chooses the kernel, and autograd
//! remembers which.

use tch::{Device, TchError, Tensor};

use super::attention::Qkv;
use crate::model::ops::operands;

/// Which scores a call takes, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight<'a> {
    /// `[queries, keys]`, added to the scores, of the kind in which matrices are multiplied;
    /// where there is none, query i sees the keys from 0 to i.
    pub(super) mask: Option<&'a Tensor>,
    /// What scores are multiplied by.
    pub(super) scale: f64,
}

impl Sight<'_> {
    fn is_causal(&self) -> bool {
        self.mask.is_none()
    }
}

/// What one call leaves for its backward.
#[derive(Debug)]
pub(super) enum Kernel {
    /// Log of the softmax's denominator, `[1, heads, queries]`, fp32.
    Flash(Tensor),
    /// Leaves and output of a recorded graph, `[1, heads, tokens, head_dim]` each.
    Recorded {
        /// Queries, keys and values.
        leaves: [Tensor; 3],
        output: Tensor,
    },
}

impl Kernel {
    /// Attends; to `attended`, `[queries, heads, head_dim]`.
    pub(super) fn forward(
        qkv: &Qkv,
        sight: Sight<'_>,
        attended: &Tensor,
    ) -> Result<Self, TchError> {
        match attended.device() {
            // A reply that is not there; kernels want queries.
            _ if attended.size()[0] == 0 => Ok(Self::Flash(attended.shallow_clone())),
            Device::Cpu => Self::flash(qkv, sight, attended),
            _ => Self::recorded(qkv, sight, attended),
        }
    }

    fn flash(qkv: &Qkv, sight: Sight<'_>, attended: &Tensor) -> Result<Self, TchError> {
        let group = group(qkv);
        let [queries, keys, values] = operands([&qkv.queries, &qkv.keys, &qkv.values])?;
        let (output, log_sum_exp) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
            &head_major(&queries)?,
            &repeated(&keys, group)?,
            &repeated(&values, group)?,
            0.0,
            sight.is_causal(),
            sight.mask,
            sight.scale,
        )?;
        attended.shallow_clone().f_copy_(&token_major(&output)?)?;
        Ok(Self::Flash(log_sum_exp))
    }

    fn recorded(qkv: &Qkv, sight: Sight<'_>, attended: &Tensor) -> Result<Self, TchError> {
        let leaf =
            |x: &Tensor| Ok::<_, TchError>(head_major(x)?.f_detach()?.set_requires_grad(true));
        let leaves = [leaf(&qkv.queries)?, leaf(&qkv.keys)?, leaf(&qkv.values)?];
        let [queries, keys, values] = &leaves;
        // On a GPU, the flash kernel shares heads but takes no mask, and the memory-efficient one
        // takes a mask but wants as many heads of keys as of queries: with both, libtorch would
        // write the scores out.
        let group = group(qkv);
        let repeat = !sight.is_causal() && group > 1;
        let output = tch::with_grad(|| {
            let spread = |x: &Tensor| match repeat {
                true => x.f_repeat_interleave_self_int(group, 1, None),
                false => Ok(x.shallow_clone()),
            };
            Tensor::f_scaled_dot_product_attention(
                queries,
                &spread(keys)?,
                &spread(values)?,
                sight.mask,
                0.0,
                sight.is_causal(),
                sight.scale,
                group > 1 && !repeat,
            )
        })?;
        attended.shallow_clone().f_copy_(&token_major(&output.f_detach()?)?)?;
        Ok(Self::Recorded { leaves, output })
    }

    /// Gradients by what went in, given that by what came out, `gradient`
    /// (`[queries, heads, head_dim]`).
    pub(super) fn backward(
        self,
        qkv: &Qkv,
        sight: Sight<'_>,
        attended: &Tensor,
        gradient: &Tensor,
    ) -> Result<Qkv, TchError> {
        match self {
            Self::Flash(log_sum_exp) => {
                let group = group(qkv);
                let [queries, keys, values] = operands([&qkv.queries, &qkv.keys, &qkv.values])?;
                let [attended, gradient] = operands([attended, gradient])?;
                let (queries, keys, values) =
                    Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward(
                        &head_major(&gradient)?,
                        &head_major(&queries)?,
                        &repeated(&keys, group)?,
                        &repeated(&values, group)?,
                        &head_major(&attended)?,
                        &log_sum_exp,
                        0.0,
                        sight.is_causal(),
                        sight.mask,
                        sight.scale,
                    )?;
                Ok(Qkv {
                    queries: token_major(&queries)?,
                    keys: summed(&keys, group)?,
                    values: summed(&values, group)?,
                })
            }
            Self::Recorded { leaves, output } => {
                // The engine starts from ones, and the product with a constant makes them
                // `gradient`.
                let weighted = tch::with_grad(|| output.f_mul(&head_major(gradient)?))?;
                let by = Tensor::f_run_backward(&[weighted], &leaves, false, false)?;
                Ok(Qkv {
                    queries: token_major(&by[0])?,
                    keys: token_major(&by[1])?,
                    values: token_major(&by[2])?,
                })
            }
        }
    }
}

/// Query heads to a head of keys and values.
fn group(qkv: &Qkv) -> i64 {
    qkv.queries.size()[1] / qkv.keys.size()[1]
}

/// `[tokens, heads, head_dim]` → `[1, heads, tokens, head_dim]`, as libtorch wants it: a view.
fn head_major(x: &Tensor) -> Result<Tensor, TchError> {
    x.f_transpose(0, 1)?.f_unsqueeze(0)
}

/// And back.
fn token_major(x: &Tensor) -> Result<Tensor, TchError> {
    x.f_squeeze_dim(0)?.f_transpose(0, 1)
}

/// As [`head_major`], each head as often as it is asked.
fn repeated(x: &Tensor, group: i64) -> Result<Tensor, TchError> {
    let x = head_major(x)?;
    if group == 1 { Ok(x) } else { x.f_repeat_interleave_self_int(group, 1, None) }
}

/// Back from [`repeated`]: `[1, heads · group, tokens, head_dim]` → `[tokens, heads, head_dim]`.
fn summed(x: &Tensor, group: i64) -> Result<Tensor, TchError> {
    if group == 1 {
        return token_major(x);
    }
    let x = x.f_unflatten(1, [x.size()[1] / group, group])?;
    token_major(&x.f_sum_dim_intlist(2, false, None)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tch::Kind;

    use super::*;

    /// The fused kernels by hand and by autograd: the same numbers.
    #[test]
    fn both_ways_agree_with_and_without_a_mask_and_groups() {
        tch::manual_seed(4);
        let random = |heads: i64, tokens: i64| {
            Tensor::randn([tokens, heads, 16], (Kind::Float, Device::Cpu))
        };
        for (heads, kv_heads) in [(4, 4), (6, 2)] {
            for masked in [false, true] {
                let keys = if masked { 9 } else { 5 };
                let mask = masked.then(|| {
                    Tensor::full([5, keys], f64::NEG_INFINITY, (Kind::Float, Device::Cpu)).triu(5)
                });
                let qkv = Qkv {
                    queries: random(heads, 5),
                    keys: random(kv_heads, keys),
                    values: random(kv_heads, keys),
                };
                let gradient = random(heads, 5);
                let sight = Sight { mask: mask.as_ref(), scale: 0.3 };
                let run = |forward: fn(&Qkv, Sight<'_>, &Tensor) -> Result<Kernel, TchError>| {
                    let attended = gradient.empty_like();
                    let kernel = forward(&qkv, sight, &attended).unwrap();
                    let by = kernel.backward(&qkv, sight, &attended, &gradient).unwrap();
                    [attended, by.queries, by.keys, by.values]
                };
                for (ours, theirs) in run(Kernel::flash).iter().zip(&run(Kernel::recorded)) {
                    assert_eq!(ours.size(), theirs.size());
                    let difference = ((ours - theirs).norm() / theirs.norm()).double_value(&[]);
                    assert!(difference < 1e-6, "{heads}/{kv_heads} {masked}: {difference:.1e}");
                }
            }
        }
    }
}
