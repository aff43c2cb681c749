//! Attention of one step: rows with one new token together, longer runs by themselves,
//! shared beginnings once for everybody who has them.
//!
//! A token attends to the shared beginnings of its row and to the row's own tokens. These
//! are attended to apart, and joined: with softmax denominators Z₁ and Z₂,
//!
//! ```text
//! attention = (Z₁ a₁ + Z₂ a₂) / (Z₁ + Z₂) = a₁ + σ(ln Z₂ − ln Z₁) (a₂ − a₁)
//! ```
//!
//! Layers with a window have calls of their own in steps that reach beyond it: the cache
//! holds all tokens for them too, and masks hide those that are too far behind.

use tch::{TchError, Tensor};

use super::cache::{KvCache, Region};
use super::kernel::{Part, Sight, attend};
use crate::model::Block;

/// Rows with one new token each, in slots that follow one another.
#[derive(Debug)]
pub(super) struct Group {
    /// Of the step's tokens, its first.
    pub(super) start: i64,
    pub(super) rows: i64,
    pub(super) first_slot: usize,
    /// Tokens of its longest row, the new one included.
    pub(super) columns: i64,
    /// `[rows, 1, 1, columns]`; none where all rows are as long, and see all they have.
    pub(super) mask: Option<Tensor>,
}

/// Several new tokens that follow one another.
#[derive(Debug)]
pub(super) struct Run {
    /// Of the step's tokens, its first.
    pub(super) start: i64,
    pub(super) length: i64,
    /// Where the pool has what it goes on with.
    pub(super) region: Region,
    /// Tokens there before it.
    pub(super) before: i64,
    /// `[length · group, before + length]`; none where nothing is before it, or out of sight.
    pub(super) mask: Option<Tensor>,
}

/// A shared beginning, and who of the step attends to it.
#[derive(Debug)]
pub(super) struct Beginning {
    /// Where it is in the pool.
    pub(super) region: Region,
    /// Indices of the step's tokens, `[n]`, i64.
    pub(super) members: Tensor,
    /// `[n · group, tokens]`; none where all of them see all of it.
    pub(super) mask: Option<Tensor>,
}

/// A layer's calls.
#[derive(Debug)]
pub(super) struct Calls {
    pub(super) groups: Vec<Group>,
    pub(super) runs: Vec<Run>,
    pub(super) beginnings: Vec<Beginning>,
}

/// Who attends to what in one step.
#[derive(Debug)]
pub(super) struct Attention<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) calls: Calls,
    /// Those of layers with a window, where it makes a difference.
    pub(super) windowed: Option<Calls>,
    /// Where the pool takes the step's tokens, `[tokens · kv_heads]`, i64.
    pub(super) places: Tensor,
}

impl Attention<'_> {
    /// `block`'s, the `layer`-th: `q` `[tokens, heads, head_dim]`, `k` and `v` `[tokens,
    /// kv_heads, head_dim]` → as `q`.
    pub(super) fn forward(
        &self,
        layer: usize,
        block: &Block,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor, TchError> {
        self.cache.store(layer, &self.places, k, v)?;
        let heads = Heads { all: q.size()[1], kv: k.size()[1] };
        let windowed = self.windowed.as_ref().filter(|_| block.window().is_some());
        let Calls { groups, runs, beginnings } = windowed.unwrap_or(&self.calls);
        let pass = LayerPass { cache: self.cache, layer, heads, scale: block.attention_scale(), q };
        if let ([group], [], []) = (&groups[..], &runs[..], &beginnings[..]) {
            return Ok(pass.of_group(group)?.output);
        }
        let mut parts = Vec::with_capacity(groups.len() + runs.len());
        for group in groups {
            parts.push(pass.of_group(group)?);
        }
        for run in runs {
            parts.push(pass.of_run(run)?);
        }
        let (outputs, log_sums): (Vec<_>, Vec<_>) =
            parts.into_iter().map(|part| (part.output, part.log_sum_exp)).unzip();
        let output = Tensor::f_cat(&outputs, 0)?;
        if beginnings.is_empty() {
            return Ok(output);
        }
        let log_sum_exp = Tensor::f_cat(&log_sums, 0)?;
        for beginning in beginnings {
            pass.join(beginning, [&output, &log_sum_exp])?;
        }
        Ok(output)
    }
}

/// One layer's queries, and what they are asked of.
#[derive(Debug)]
struct LayerPass<'a> {
    cache: &'a KvCache,
    layer: usize,
    heads: Heads,
    /// What scores are multiplied by.
    scale: f64,
    q: &'a Tensor,
}

impl LayerPass<'_> {
    /// Each row's query heads stand as queries of the key head that they share, so
    /// nothing is repeated: `[rows, kv_heads, group, head_dim]`.
    fn of_group(&self, group: &Group) -> Result<Part, TchError> {
        let Group { start, rows, first_slot, columns, ref mask } = *group;
        let queries = self.heads.apart(&self.q.f_narrow(0, start, rows)?)?;
        let [keys, values] = self.cache.slots(self.layer, first_slot, rows, columns)?;
        let sight = mask.as_ref().map_or(Sight::All, Sight::Masked);
        let part = attend(&queries, &keys, &values, sight, self.scale)?;
        let [output, log_sum_exp] =
            [&part.output, &part.log_sum_exp].map(|x| self.heads.together(x));
        Ok(Part { output: output?, log_sum_exp: log_sum_exp? })
    }

    fn of_run(&self, run: &Run) -> Result<Part, TchError> {
        let Run { start, length, region, before, ref mask } = *run;
        let queries = self.q.f_narrow(0, start, length)?;
        let held = self.cache.region(self.layer, region, before + length)?;
        match mask {
            Some(mask) => self.of_tokens(&queries, held, Sight::Masked(mask)),
            None => each_head(self.heads, &queries, held, Sight::Causal, self.scale),
        }
    }

    /// Tokens that are asked of the same keys and values, as [`each_head`] does, but for the
    /// mask, `[n · group, m]`: the queries of all tokens and heads that share a key head stand
    /// as its queries, token after token, so nothing is repeated.
    fn of_tokens(
        &self,
        queries: &Tensor,
        [keys, values]: [Tensor; 2],
        sight: Sight<'_>,
    ) -> Result<Part, TchError> {
        let count = queries.size()[0];
        let queries = self.heads.apart(queries)?.f_transpose(0, 1)?.f_flatten(1, 2)?;
        let Part { output, log_sum_exp } =
            attend(&queries.f_unsqueeze(0)?, &keys, &values, sight, self.scale)?;
        let by_token = |x: &Tensor| {
            let tokens = x.f_squeeze_dim(0)?.f_unflatten(1, [count, -1])?.f_transpose(0, 1)?;
            self.heads.together(&tokens)
        };
        Ok(Part { output: by_token(&output)?, log_sum_exp: by_token(&log_sum_exp)? })
    }

    /// Adds a beginning's part to the `output` and `log_sum_exp` of its members.
    fn join(
        &self,
        beginning: &Beginning,
        [output, log_sum_exp]: [&Tensor; 2],
    ) -> Result<(), TchError> {
        let Beginning { region, members, mask } = beginning;
        let queries = self.q.f_index_select(0, members)?;
        let held = self.cache.region(self.layer, *region, region.length)?;
        let sight = mask.as_ref().map_or(Sight::All, Sight::Masked);
        let theirs = self.of_tokens(&queries, held, sight)?;
        let ours = output.f_index_select(0, members)?;
        let our_sum = log_sum_exp.f_index_select(0, members)?;
        let weight = theirs.log_sum_exp.f_sub(&our_sum)?.f_sigmoid()?.f_unsqueeze(-1)?;
        let joined = ours.f_lerp_tensor(&theirs.output, &weight.f_to_kind(ours.kind())?)?;
        let _ = output.shallow_clone().f_index_copy_(0, members, &joined)?;
        let sum = our_sum.f_logaddexp(&theirs.log_sum_exp)?;
        let _ = log_sum_exp.shallow_clone().f_index_copy_(0, members, &sum)?;
        Ok(())
    }
}

/// Attention among tokens that follow one another, with nothing before them: `q` `[tokens,
/// heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]` → as `q`. Scores are
/// multiplied by `scale`; a `mask`, `[tokens, tokens]`, says where a window ends.
pub(super) fn causal(
    [q, k, v]: [&Tensor; 3],
    mask: Option<&Tensor>,
    scale: f64,
) -> Result<Tensor, TchError> {
    let heads = Heads { all: q.size()[1], kv: k.size()[1] };
    let head_major = |x: &Tensor| x.f_transpose(0, 1)?.f_unsqueeze(0);
    let sight = mask.map_or(Sight::Causal, Sight::Masked);
    Ok(each_head(heads, q, [head_major(k)?, head_major(v)?], sight, scale)?.output)
}

/// Tokens, `[n, heads, head_dim]`, that are asked of the same `keys` and `values`, `[1,
/// kv_heads, m, head_dim]`, which are repeated for the heads that share them: `[n, heads, …]`.
fn each_head(
    heads: Heads,
    queries: &Tensor,
    [keys, values]: [Tensor; 2],
    sight: Sight<'_>,
    scale: f64,
) -> Result<Part, TchError> {
    let queries = queries.f_transpose(0, 1)?.f_unsqueeze(0)?;
    let [keys, values] = [heads.repeated(&keys)?, heads.repeated(&values)?];
    let part = attend(&queries, &keys, &values, sight, scale)?;
    let token_major = |x: &Tensor| x.f_squeeze_dim(0)?.f_transpose(0, 1);
    Ok(Part { output: token_major(&part.output)?, log_sum_exp: token_major(&part.log_sum_exp)? })
}

/// How many heads there are.
#[derive(Debug, Clone, Copy)]
struct Heads {
    all: i64,
    kv: i64,
}

impl Heads {
    /// Query heads to a head of keys and values.
    fn group(self) -> i64 {
        self.all / self.kv
    }

    /// `[n, heads, …]` → `[n, kv_heads, heads / kv_heads, …]`.
    fn apart(self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_unflatten(1, [self.kv, self.group()])
    }

    /// And back.
    fn together(self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_flatten(1, 2)
    }

    /// `[1, kv_heads, n, head_dim]`, each head as often as it is asked.
    fn repeated(self, x: &Tensor) -> Result<Tensor, TchError> {
        match self.group() {
            1 => Ok(x.shallow_clone()),
            group => x.f_repeat_interleave_self_int(group, 1, None),
        }
    }
}
