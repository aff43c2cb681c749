//! Attention's backward on a CPU, in plain products.
//!
//! With α the scale, ℓ the log of the softmax's denominator and a what was attended:
//!
//! ```text
//! p = exp(α q kᵀ − ℓ)       δ = Σ da ⊙ a       ds = p ⊙ (da vᵀ − δ)
//! dv = pᵀ da                dq = α ds k        dk = α dsᵀ q
//! ```
//!
//! libtorch's own kernel multiplies small blocks, bf16 by instructions for fp32, and wants
//! heads of keys written out for each head of queries that shares them. Here the queries that
//! share a head are the rows of one product, a few tokens' at a time ([`SCORES_BYTES`]), with
//! the keys that they see.
//!
//! Products come rounded to their operands' kind. Were ℓ taken from rounded scores, a score
//! of 10 in bf16 would leave p an error of 2 %. So ℓ and δ are taken within the product:
//! they stand in columns beside q and da, against ones beside k and v ([`TERMS`]). What is
//! rounded then is log p, and that errs least where p is large: in p by 0.0007 at most.

use tch::{Kind, TchError, Tensor};

use super::Sight;
use crate::model::ops::{causal_mask, product_kind};
use crate::train::attention::Qkv;
use crate::train::packing::Rows;

/// Scores in existence at once, in bytes of the kind that matrices are multiplied in: they
/// stay in the cores' caches.
const SCORES_BYTES: i64 = 2 << 20;

/// Numbers whose sum is an ℓ or a δ: bf16 has a third of fp32's digits.
const TERMS: i64 = 3;

/// Columns for them, so that rows are whole vectors; the others are zero.
const COLUMNS: i64 = 32;

/// Gradients by what went in, given that by what came out, `gradient`
/// (`[queries, heads, head_dim]`, as `attended`), and ℓ, `[1, heads, queries]`, fp32.
pub(super) fn backward(
    qkv: &Qkv,
    sight: Sight<'_>,
    [attended, gradient]: [&Tensor; 2],
    log_sum_exp: &Tensor,
) -> Result<Qkv, TchError> {
    let (query_count, heads, width) = qkv.queries.size3()?;
    let (key_count, kv_heads, _) = qkv.keys.size3()?;
    let device = attended.device();
    let kind = product_kind(attended.kind(), device);
    let window = sight.window.filter(|&window| window < key_count);
    let stacks = Stacks { group: heads / kv_heads, width, kind };

    let wide = gradient.f_to_kind(Kind::Float)?;
    let delta = wide.f_mul(attended)?.f_sum_dim_intlist(-1, false, Kind::Float)?.f_tr()?;
    let denominator = log_sum_exp.f_squeeze_dim(0)?.f_div_scalar(sight.scale)?;
    let queries = stacks.less(&qkv.queries, &denominator)?;
    let gradients = stacks.less(gradient, &delta)?;
    let (keys, values) = (stacks.with_ones(&qkv.keys)?, stacks.with_ones(&qkv.values)?);

    let by_queries = Tensor::f_empty([query_count, heads, width], (kind, device))?;
    let by_keys = Tensor::f_zeros([kv_heads, key_count, width], (Kind::Float, device))?;
    let by_values = by_keys.f_zeros_like()?;
    let row_bytes = heads * key_count * kind.elt_size_in_bytes() as i64;
    for rows in Rows::cover(query_count, SCORES_BYTES / row_bytes) {
        let seen = seen(rows, key_count - query_count, window);
        let of_seen = |x: &Tensor| x.f_narrow(1, seen.start, seen.length);
        let (keys, values) = (of_seen(&keys)?, of_seen(&values)?);
        let (queries, gradients) = (stacks.rows(&queries, rows)?, stacks.rows(&gradients, rows)?);

        // log p, and then p.
        let mut p = product(&queries, &keys.f_transpose(1, 2)?, sight.scale)?;
        hide(&p.f_view([heads, rows.length, seen.length])?, window)?;
        let _ = p.f_exp_()?;
        let by_scores = product(&gradients, &values.f_transpose(1, 2)?, 1.0)?.f_mul_(&p)?;

        let plain = |x: &Tensor| x.f_narrow(2, 0, width);
        let by = product(&p.f_transpose(1, 2)?, &plain(&gradients)?, 1.0)?;
        let _ = of_seen(&by_values)?.f_add_(&by)?;
        let by = product(&by_scores.f_transpose(1, 2)?, &plain(&queries)?, sight.scale)?;
        let _ = of_seen(&by_keys)?.f_add_(&by)?;
        let by = product(&by_scores, &plain(&keys)?, sight.scale)?;
        let by = by.f_view([heads, rows.length, width])?;
        rows.of(&by_queries)?.f_copy_(&by.f_transpose(0, 1)?)?;
    }
    let token_major = |x: Tensor| x.f_transpose(0, 1);
    Ok(Qkv { queries: by_queries, keys: token_major(by_keys)?, values: token_major(by_values)? })
}

/// The keys that queries `rows` see together, where the first query stands `before` tokens
/// behind the first key.
fn seen(rows: Rows, before: i64, window: Option<i64>) -> Rows {
    let first = before + rows.start;
    let start = window.map_or(0, |window| (first + 1 - window).max(0));
    Rows { start, length: first + rows.length - start }
}

/// Makes what a query does not see −∞ in `logarithms`, `[heads, queries, keys]`, of which the
/// last key is the last query's own.
fn hide(logarithms: &Tensor, window: Option<i64>) -> Result<(), TchError> {
    let (_, queries, keys) = logarithms.size3()?;
    // Without a window all see what is ahead of them all.
    let columns = if window.is_some() { keys } else { queries };
    let options = (logarithms.kind(), logarithms.device());
    let mask = causal_mask(columns - queries, [queries, columns], window, options)?;
    logarithms.f_narrow(2, keys - columns, columns)?.f_add_(&mask).map(drop)
}

/// `scale` · `left` (`[heads, n, k]`) times `right` (`[heads, k, m]`), scaled ahead of rounding.
fn product(left: &Tensor, right: &Tensor, scale: f64) -> Result<Tensor, TchError> {
    let nothing = Tensor::f_zeros([1, 1, 1], (left.kind(), left.device()))?;
    nothing.f_baddbmm(left, right, 0.0, scale)
}

/// How operands are laid out: a matrix for each head of keys.
struct Stacks {
    /// Heads of queries that share one of keys.
    group: i64,
    width: i64,
    kind: Kind,
}

impl Stacks {
    /// `x` (`[tokens, heads, width]`) beside terms of −`less` (`[heads, tokens]`, fp32):
    /// `[heads, tokens, width + COLUMNS]`.
    fn less(&self, x: &Tensor, less: &Tensor) -> Result<Tensor, TchError> {
        let stack = self.beside_zeros(x)?;
        let mut rest = less.f_neg()?;
        for column in self.width..self.width + TERMS {
            let mut term = stack.f_select(2, column)?;
            term.f_copy_(&rest)?;
            let _ = rest.f_sub_(&term)?;
        }
        Ok(stack)
    }

    /// As [`Self::less`], with ones for terms.
    fn with_ones(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let stack = self.beside_zeros(x)?;
        let _ = stack.f_narrow(2, self.width, TERMS)?.f_fill_(1.0)?;
        Ok(stack)
    }

    fn beside_zeros(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let (tokens, heads, width) = x.size3()?;
        let options = (self.kind, x.device());
        let stack = Tensor::f_zeros([heads, tokens, width + COLUMNS], options)?;
        stack.f_narrow(2, 0, width)?.f_copy_(&x.f_transpose(0, 1)?)?;
        Ok(stack)
    }

    /// Some tokens of a stack of queries, those that share a head under one another:
    /// `[kv_heads, group · rows, width + COLUMNS]`.
    fn rows(&self, stack: &Tensor, rows: Rows) -> Result<Tensor, TchError> {
        let some = stack.f_narrow(1, rows.start, rows.length)?;
        some.f_reshape([-1, self.group * rows.length, self.width + COLUMNS])
    }
}
