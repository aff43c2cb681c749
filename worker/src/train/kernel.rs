//! Attention, forward and backward, on either kind of device.
//!
//! On a CPU forward is a fused kernel, ours or libtorch's, which leaves a number per query, and
//! [`backward`] goes from there. Elsewhere both directions are libtorch's: it chooses the
//! kernel, and autograd remembers which.

mod backward;

use tch::{Device, TchError, Tensor};

use super::attention::Qkv;
use crate::kernels;
use crate::model::ops::operands;

/// Which scores a call takes, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight<'a> {
    /// `[queries, keys]`, added to the scores, of the kind in which matrices are multiplied;
    /// where there is none, query i sees the keys from 0 to i.
    pub(super) mask: Option<&'a Tensor>,
    /// How many keys a query sees, the last of which is its own, where that is not all.
    pub(super) window: Option<i64>,
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
    /// Log of the softmax's denominator, `[heads, queries]`, fp32.
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
            device
                if kernels::are_for(attended.kind(), device)
                    && kernels::multiplies_by_vectors() =>
            {
                Self::by_vectors(qkv, sight, attended)
            }
            Device::Cpu => Self::flash(qkv, sight, attended),
            _ => Self::recorded(qkv, sight, attended),
        }
    }

    fn by_vectors(qkv: &Qkv, sight: Sight<'_>, attended: &Tensor) -> Result<Self, TchError> {
        let Qkv { queries, keys, values } = qkv;
        let window = sight.window.unwrap_or(i64::MAX);
        kernels::causal_attention([queries, keys, values], sight.scale, window, attended)
            .map(Self::Flash)
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
        Ok(Self::Flash(log_sum_exp.f_squeeze_dim(0)?))
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
                backward::backward(qkv, sight, [attended, gradient], &log_sum_exp)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::model::ops::{causal_mask, product_kind};

    /// Queries, keys ahead of them, a window; heads of queries and of keys, and elements of one.
    /// 900 queries are several tiles.
    type Call = (i64, i64, Option<i64>, [i64; 3]);
    const CALLS: [Call; 10] = [
        (5, 0, None, [4, 4, 16]),
        (5, 4, None, [6, 2, 16]),
        (900, 0, None, [4, 4, 16]),
        (900, 0, None, [6, 2, 16]),
        (900, 130, None, [6, 2, 16]),
        (900, 0, Some(40), [6, 2, 16]),
        (900, 130, Some(500), [4, 4, 16]),
        (300, 21, None, [14, 2, 64]),
        (300, 0, Some(40), [5, 5, 40]),
        (100, 7, None, [4, 1, 96]),
    ];

    /// How far a call's output and gradients by its inputs are from fp64's, in `kind`. Queries
    /// and keys are normal numbers times `spread`.
    fn errors(
        (queries, before, window, [heads, kv_heads, width]): Call,
        kind: Kind,
        spread: f64,
        run: fn(&Qkv, Sight<'_>, &Tensor) -> Result<Kernel, TchError>,
    ) -> [f64; 4] {
        tch::manual_seed(4);
        let random = |tokens: i64, heads: i64| {
            Tensor::randn([tokens, heads, width], (Kind::Float, Device::Cpu)).to_kind(kind)
        };
        let mask = |kind| {
            let mask =
                causal_mask(before, [queries, before + queries], window, (kind, Device::Cpu));
            (before > 0 || window.is_some()).then(|| mask.unwrap())
        };
        let qkv = Qkv {
            queries: random(queries, heads) * spread,
            keys: random(before + queries, kv_heads) * spread,
            values: random(before + queries, kv_heads),
        };
        let gradient = random(queries, heads);
        let of = |qkv: &Qkv, gradient: &Tensor, run: fn(&Qkv, Sight<'_>, &Tensor) -> _| {
            let mask = mask(product_kind(gradient.kind(), Device::Cpu));
            let scale = 1.2 / (width as f64).sqrt();
            let sight = Sight { mask: mask.as_ref(), window, scale };
            let attended = gradient.empty_like();
            let kernel: Result<Kernel, TchError> = run(qkv, sight, &attended);
            let by = kernel.unwrap().backward(qkv, sight, &attended, gradient).unwrap();
            [attended, by.queries, by.keys, by.values].map(|x| x.to_kind(Kind::Double))
        };
        let double = |x: &Tensor| x.to_kind(Kind::Double);
        let [queries, keys, values] = [&qkv.queries, &qkv.keys, &qkv.values].map(double);
        let exact = of(&Qkv { queries, keys, values }, &double(&gradient), Kernel::recorded);
        let ours = of(&qkv, &gradient, run);
        std::array::from_fn(|at| {
            assert_eq!(ours[at].size(), exact[at].size());
            ((&ours[at] - &exact[at]).norm() / exact[at].norm()).double_value(&[])
        })
    }

    #[test]
    fn by_hand_is_what_autograd_has() {
        for call in CALLS {
            for kernel in [Kernel::flash, Kernel::by_vectors] {
                let errors = errors(call, Kind::Float, 1.0, kernel);
                assert!(errors.iter().all(|&error| error < 1e-6), "{call:?}: {errors:?}");
            }
        }
    }

    /// Of libtorch's kernels, which keep scores in fp32, and ours, which round their
    /// logarithms, gradients err by less than 1 %: bf16 itself has steps of 0.4 %.
    #[test]
    fn in_bf16_gradients_err_as_bf16_does() {
        // Of a few tokens' gradients the first ones, which all but cancel, are most.
        for call in CALLS.into_iter().filter(|call| call.0 > 5) {
            let theirs = errors(call, Kind::BFloat16, 2.0, Kernel::recorded);
            for kernel in [Kernel::flash, Kernel::by_vectors] {
                let ours = errors(call, Kind::BFloat16, 2.0, kernel);
                for (ours, theirs) in ours.iter().zip(theirs) {
                    let close = *ours < 0.01 && *ours < 3.0 * theirs;
                    assert!(close, "{call:?}: {ours:.1e} {theirs:.1e}");
                }
            }
        }
    }
}
