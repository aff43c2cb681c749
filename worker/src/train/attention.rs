//! Who attends to whom: each pair by itself, y⁻ past y⁺.
//!
//! `[x, y⁺]` is plainly causal; y⁻'s queries see `[x, y⁻]`, so x is computed once
//! and y⁻ never sees y⁺. Where a block has a window and a pair is longer, masks say
//! so, by position.

use tch::{TchError, Tensor};

use super::kernel::{Kernel, Sight};
use super::masks::PairMasks;
use super::packing::{Packed, Span};
use crate::model::{Block, Heads};

/// What attention's backward needs beyond what went in and came out.
#[derive(Debug)]
pub(super) struct Attention {
    /// Of each pair, `[x, y⁺]`'s and then y⁻'s.
    calls: Vec<[Kernel; 2]>,
}

impl Attention {
    /// `block`'s, over packed pairs: `attended` is `[tokens, heads, head_dim]`, as the
    /// queries are.
    pub(super) fn forward(
        packed: &Packed,
        block: &Block,
        qkv: &Heads,
        attended: &Tensor,
    ) -> Result<Self, TchError> {
        let pair = |(span, masks): (&Span, &PairMasks)| {
            let [of_chosen, of_rejected] = sights(masks, block);
            let [chosen, rejected] = inputs(span, qkv)?;
            Ok([
                Kernel::forward(&chosen, of_chosen, &span.with_chosen().of(attended)?)?,
                Kernel::forward(&rejected, of_rejected, &span.rejected().of(attended)?)?,
            ])
        };
        let pairs = packed.spans.iter().zip(&packed.masks);
        Ok(Self { calls: pairs.map(pair).collect::<Result<_, TchError>>()? })
    }

    /// Writes the gradients by queries, keys and values to `by_qkv`, given that by
    /// what was attended, `gradient` (`[tokens, heads, head_dim]`).
    pub(super) fn backward(
        self,
        packed: &Packed,
        block: &Block,
        qkv: &Heads,
        attended: &Tensor,
        gradient: &Tensor,
        by_qkv: &Heads,
    ) -> Result<(), TchError> {
        let pairs = packed.spans.iter().zip(&packed.masks).zip(self.calls);
        for ((span, masks), [first, second]) in pairs {
            let [of_chosen, of_rejected] = sights(masks, block);
            let [chosen, rejected] = inputs(span, qkv)?;
            let rows = span.with_chosen();
            let by =
                first.backward(&chosen, of_chosen, &rows.of(attended)?, &rows.of(gradient)?)?;
            rows.of(&by_qkv.queries)?.f_copy_(&by.queries)?;
            rows.of(&by_qkv.keys)?.f_copy_(&by.keys)?;
            rows.of(&by_qkv.values)?.f_copy_(&by.values)?;

            let rows = span.rejected();
            let (attended, gradient) = (rows.of(attended)?, rows.of(gradient)?);
            let by = second.backward(&rejected, of_rejected, &attended, &gradient)?;
            rows.of(&by_qkv.queries)?.f_copy_(&by.queries)?;
            // x was attended to by both: the second time as the beginning of [x, y⁻].
            for (whole, part) in [(&by_qkv.keys, by.keys), (&by_qkv.values, by.values)] {
                let _ = span.prompt().of(whole)?.f_add_(&part.f_narrow(0, 0, span.prompt)?)?;
                rows.of(whole)?.f_copy_(&part.f_narrow(0, span.prompt, span.rejected)?)?;
            }
        }
        Ok(())
    }
}

/// Queries, keys and values of one kernel's call, `[tokens, heads, head_dim]` each.
#[derive(Debug)]
pub(super) struct Qkv {
    pub(super) queries: Tensor,
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
}

/// What `block`'s two calls for a pair see.
fn sights<'a>(masks: &'a PairMasks, block: &Block) -> [Sight<'a>; 2] {
    let (window, scale) = (block.window(), block.attention_scale());
    masks.of(window.is_some()).map(|mask| Sight { mask, window, scale })
}

/// A pair's two calls: those of `[x, y⁺]`, and y⁻'s queries with `[x, y⁻]`.
fn inputs(span: &Span, qkv: &Heads) -> Result<[Qkv; 2], TchError> {
    let (prompt, chosen, rejected) = (span.prompt(), span.with_chosen(), span.rejected());
    let behind_prompt =
        |whole: &Tensor| Tensor::f_cat(&[prompt.of(whole)?, rejected.of(whole)?], 0);
    Ok([
        Qkv {
            queries: chosen.of(&qkv.queries)?,
            keys: chosen.of(&qkv.keys)?,
            values: chosen.of(&qkv.values)?,
        },
        Qkv {
            queries: rejected.of(&qkv.queries)?,
            keys: behind_prompt(&qkv.keys)?,
            values: behind_prompt(&qkv.values)?,
        },
    ])
}
