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
//! the keys that they see. What can be is one product for two: [q, da] by [k, v], and
//! [p, ds] by [da, q].
//!
//! Products come rounded to their operands' kind. Were ℓ taken from rounded scores, a score
//! of 10 in bf16 would leave p an error of 2 %. So ℓ and δ are taken within the product:
//! they stand in columns beside q and da, against ones beside k and v ([`TERMS`]). What is
//! rounded then is log p, and that errs least where p is large: in p by 0.0007 at most.

use tch::{Kind, TchError, Tensor};

use super::Sight;
use crate::kernels;
use crate::model::ops::product_kind;
use crate::train::attention::Qkv;
use crate::train::packing::Rows;

/// p's in existence at once, in bytes of the kind that matrices are multiplied in. With
/// fewer, products are small; with more, much is computed that is hidden.
const SCORES_BYTES: i64 = 8 << 20;

/// Numbers whose sum is an ℓ or a δ: bf16 has a third of fp32's digits.
const TERMS: i64 = 3;

/// Columns for them, so that rows are whole vectors; the others are zero.
const COLUMNS: i64 = 32;

/// Gradients by what went in, given that by what came out, `gradient`
/// (`[queries, heads, head_dim]`, as `attended`), and ℓ, `[heads, queries]`, fp32.
pub(super) fn backward(
    qkv: &Qkv,
    sight: Sight<'_>,
    [attended, gradient]: [&Tensor; 2],
    log_sum_exp: &Tensor,
) -> Result<Qkv, TchError> {
    let call = Call::new(qkv, sight, [attended, gradient], log_sum_exp)?;
    let (key_count, kv_heads, width) = qkv.keys.size3()?;
    let by_queries = qkv.queries.f_empty_like()?;
    let options = (Kind::Float, by_queries.device());
    let by_seen = Tensor::f_zeros([2 * kv_heads, key_count, width], options)?;
    for rows in call.tiles()? {
        call.add(rows, &by_queries, &by_seen)?;
    }
    let of_heads = |first| by_seen.f_narrow(0, first, kv_heads);
    let token_major = |x: Tensor| x.f_transpose(0, 1);
    Ok(Qkv {
        queries: by_queries,
        keys: token_major(of_heads(kv_heads)?.f_mul_scalar_(sight.scale)?)?,
        values: token_major(of_heads(0)?)?,
    })
}

/// One call's operands.
struct Call<'a> {
    qkv: &'a Qkv,
    /// da, `[queries, heads, head_dim]`.
    gradient: &'a Tensor,
    window: Option<i64>,
    /// α, and its largest power of two: that costs queries no digits.
    scale: [f64; 2],
    /// Of matrices.
    kind: Kind,
    /// −ℓ, as scores are ahead of what is left of the scale, and −δ:
    /// `[2, heads, queries, TERMS]`.
    less: Tensor,
    /// Keys, and then values, beside ones: `[2 · kv_heads, keys, head_dim + COLUMNS]`.
    with_ones: Tensor,
    /// `[kv_heads, keys, head_dim]`.
    keys: Tensor,
}

impl<'a> Call<'a> {
    fn new(
        qkv: &'a Qkv,
        sight: Sight<'_>,
        [attended, gradient]: [&'a Tensor; 2],
        log_sum_exp: &Tensor,
    ) -> Result<Self, TchError> {
        let (key_count, kv_heads, width) = qkv.keys.size3()?;
        let kind = product_kind(attended.kind(), attended.device());
        let scale = [sight.scale, sight.scale.log2().floor().exp2()];
        let delta = gradient.f_to_kind(Kind::Float)?.f_mul(attended)?;
        let delta = delta.f_sum_dim_intlist(-1, false, Kind::Float)?.f_tr()?;
        let denominator = log_sum_exp.f_div_scalar(scale[0] / scale[1])?;
        let with_ones = stack([&qkv.keys, &qkv.values], COLUMNS, kind)?;
        let _ = with_ones.f_narrow(3, width, TERMS)?.f_fill_(1.0)?;
        Ok(Self {
            qkv,
            gradient,
            window: sight.window.filter(|&window| window < key_count),
            scale,
            kind,
            less: terms(&Tensor::f_stack(&[denominator, delta], 0)?, kind)?,
            with_ones: with_ones.f_view([2 * kv_heads, key_count, width + COLUMNS])?,
            keys: qkv.keys.f_transpose(0, 1)?.f_to_kind(kind)?.f_contiguous()?,
        })
    }

    /// Queries that are taken at once.
    fn tiles(&self) -> Result<impl Iterator<Item = Rows> + use<>, TchError> {
        let (queries, heads, _) = self.qkv.queries.size3()?;
        let row_bytes = heads * self.qkv.keys.size()[0] * self.kind.elt_size_in_bytes() as i64;
        Ok(Rows::cover(queries, SCORES_BYTES / row_bytes))
    }

    /// Writes the gradient by the queries `rows` to `by_queries` (`[queries, heads, head_dim]`),
    /// and adds what they give to those by values, and then by keys less the scale, `by_seen`
    /// (`[2 · kv_heads, keys, head_dim]`).
    fn add(&self, rows: Rows, by_queries: &Tensor, by_seen: &Tensor) -> Result<(), TchError> {
        let (query_count, heads, width) = self.qkv.queries.size3()?;
        let (key_count, kv_heads, _) = self.qkv.keys.size3()?;
        let [scale, power] = self.scale;
        let (queries, gradients) = (rows.of(&self.qkv.queries)?, rows.of(self.gradient)?);
        let seen = seen(rows, key_count - query_count, self.window);
        let of_seen = |x: &Tensor| x.f_narrow(1, seen.start, seen.length);
        // Those that share a head under one another.
        let grouped = |x: &Tensor| x.f_view([2 * kv_heads, -1, x.size()[3]]);

        let left = stack([&queries, &gradients], COLUMNS, self.kind)?;
        let _ = left.f_select(0, 0)?.f_narrow(2, 0, width)?.f_mul_scalar_(power)?;
        let less = self.less.f_narrow(2, rows.start, rows.length)?;
        left.f_narrow(3, width, TERMS)?.f_copy_(&less)?;
        // log p and da vᵀ − δ, and then p and ds.
        let both = grouped(&left)?.f_bmm(&of_seen(&self.with_ones)?.f_transpose(1, 2)?)?;
        let by_head = both.f_view([2, heads, rows.length, seen.length])?;
        kernels::softmax_backward(&by_head, scale / power, self.window.unwrap_or(i64::MAX))?;

        let right = grouped(&stack([&gradients, &queries], 0, self.kind)?)?;
        let _ = of_seen(by_seen)?.f_add_(&both.f_transpose(1, 2)?.f_bmm(&right)?)?;
        // Scaled ahead of rounding.
        let nothing = Tensor::f_zeros([1, 1, 1], (self.kind, both.device()))?;
        let by_scores = both.f_narrow(0, kv_heads, kv_heads)?;
        let by = nothing.f_baddbmm(&by_scores, &of_seen(&self.keys)?, 0.0, scale)?;
        let by = by.f_view([heads, rows.length, width])?.f_transpose(0, 1)?;
        rows.of(by_queries)?.f_copy_(&by)
    }
}

/// The keys that queries `rows` see together, where the first query stands `before` tokens
/// behind the first key.
fn seen(rows: Rows, before: i64, window: Option<i64>) -> Rows {
    let first = before + rows.start;
    let start = window.map_or(0, |window| (first + 1 - window).max(0));
    Rows { start, length: first + rows.length - start }
}

/// −`less`, fp32, as numbers of `kind` whose sum it is: `[…]` → `[…, TERMS]`.
fn terms(less: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
    let mut rest = less.f_neg()?;
    let mut terms = Vec::new();
    for _ in 0..TERMS {
        let term = rest.f_to_dtype(kind, false, true)?;
        let _ = rest.f_sub_(&term)?;
        terms.push(term);
    }
    Tensor::f_stack(&terms, -1)
}

/// Both of `parts` (`[tokens, heads, width]`) beside `columns` zeros:
/// `[2, heads, tokens, width + columns]`.
fn stack(parts: [&Tensor; 2], columns: i64, kind: Kind) -> Result<Tensor, TchError> {
    let (tokens, heads, width) = parts[0].size3()?;
    let options = (kind, parts[0].device());
    let stack = Tensor::f_empty([2, heads, tokens, width + columns], options)?;
    let _ = stack.f_narrow(3, width, columns)?.f_zero_()?;
    for (at, part) in (0..).zip(parts) {
        stack.f_select(0, at)?.f_narrow(2, 0, width)?.f_copy_(&part.f_transpose(0, 1)?)?;
    }
    Ok(stack)
}
