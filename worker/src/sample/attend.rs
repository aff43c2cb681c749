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
    /// `[length, before + length]`; none where nothing is before it, or out of sight.
    pub(super) mask: Option<Tensor>,
}

/// A shared beginning, and who of the step attends to it.
#[derive(Debug)]
pub(super) struct Beginning {
    /// Where it is in the pool.
    pub(super) region: Region,
    /// Indices of the step's tokens, `[n]`, i64.
    pub(super) members: Tensor,
    /// `[n, tokens]`; none where all of them see all of it.
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
            return heads.together(&pass.of_group(group)?.output);
        }
        let mut parts = Vec::with_capacity(groups.len() + runs.len());
        for group in groups {
            let part = pass.of_group(group)?;
            parts.push((heads.together(&part.output)?, heads.together(&part.log_sum_exp)?));
        }
        for run in runs {
            let part = pass.of_run(run)?;
            let token_major = |x: &Tensor| x.f_squeeze_dim(0)?.f_transpose(0, 1);
            parts.push((token_major(&part.output)?, token_major(&part.log_sum_exp)?));
        }
        let (outputs, log_sums): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
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
        attend(&queries, &keys, &values, sight, self.scale)
    }

    fn of_run(&self, run: &Run) -> Result<Part, TchError> {
        let Run { start, length, region, before, ref mask } = *run;
        let queries = self.q.f_narrow(0, start, length)?.f_transpose(0, 1)?.f_unsqueeze(0)?;
        let [keys, values] = self.cache.region(self.layer, region, before + length)?;
        let [keys, values] = [self.heads.repeated(&keys)?, self.heads.repeated(&values)?];
        let sight = mask.as_ref().map_or(Sight::Causal, Sight::Masked);
        attend(&queries, &keys, &values, sight, self.scale)
    }

    /// Adds a beginning's part to the `output` and `log_sum_exp` of its members.
    fn join(
        &self,
        beginning: &Beginning,
        [output, log_sum_exp]: [&Tensor; 2],
    ) -> Result<(), TchError> {
        let Beginning { region, members, mask } = beginning;
        let heads = self.heads;
        // All members' queries of a key head at once: [1, kv_heads, members · group, head_dim].
        let queries = heads.apart(&self.q.f_index_select(0, members)?)?;
        let count = queries.size()[0];
        let queries = queries.f_transpose(0, 1)?.f_flatten(1, 2)?.f_unsqueeze(0)?;
        let [keys, values] = self.cache.region(self.layer, *region, region.length)?;
        let mask = match mask {
            Some(mask) => Some(mask.f_repeat_interleave_self_int(heads.group(), 0, None)?),
            None => None,
        };
        let sight = mask.as_ref().map_or(Sight::All, Sight::Masked);
        let part = attend(&queries, &keys, &values, sight, self.scale)?;
        let by_member = |x: &Tensor| {
            heads.together(&x.f_squeeze_dim(0)?.f_unflatten(1, [count, -1])?.f_transpose(0, 1)?)
        };
        let (theirs, their_sum) = (by_member(&part.output)?, by_member(&part.log_sum_exp)?);
        let ours = output.f_index_select(0, members)?;
        let our_sum = log_sum_exp.f_index_select(0, members)?;
        let weight = their_sum.f_sub(&our_sum)?.f_sigmoid()?.f_unsqueeze(-1)?;
        let joined = ours.f_lerp_tensor(&theirs, &weight.f_to_kind(ours.kind())?)?;
        let _ = output.shallow_clone().f_index_copy_(0, members, &joined)?;
        let sum = our_sum.f_logaddexp(&their_sum)?;
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
    let [keys, values] = [heads.repeated(&head_major(k)?)?, heads.repeated(&head_major(v)?)?];
    let sight = mask.map_or(Sight::Causal, Sight::Masked);
    let part = attend(&head_major(q)?, &keys, &values, sight, scale)?;
    part.output.f_squeeze_dim(0)?.f_transpose(0, 1)
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
