//! Attention of one step: rows with one new token together, longer runs by themselves,
//! shared beginnings once for everybody who has them.
//!
//! A token attends to the shared beginnings of its row and to the row's own tokens. These
//! are attended to apart, and joined: with softmax denominators Z₁ and Z₂,
//!
//! ```text
//! attention = (Z₁ a₁ + Z₂ a₂) / (Z₁ + Z₂) = a₁ + σ(ln Z₂ − ln Z₁) (a₂ − a₁)
//! ```

use tch::{TchError, Tensor};

use super::cache::{KvCache, Region};
use super::kernel::{Part, Sight, attend};

/// Rows with one new token each, in slots that follow one another.
#[derive(Debug)]
pub(super) struct Group {
    /// Of the step's tokens, its first.
    pub(super) start: i64,
    pub(super) rows: i64,
    pub(super) first_slot: usize,
    /// Tokens of its longest row, the new one included.
    pub(super) columns: i64,
    /// `[rows, 1, 1, columns]`; none where all rows are as long.
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
    /// `[length, before + length]`; none where nothing is before it.
    pub(super) mask: Option<Tensor>,
}

/// A shared beginning, and who of the step attends to it.
#[derive(Debug)]
pub(super) struct Beginning {
    /// Where it is in the pool.
    pub(super) region: Region,
    /// Indices of the step's tokens, `[n]`, i64.
    pub(super) members: Tensor,
}

/// Who attends to what in one step.
#[derive(Debug)]
pub(super) struct Attention<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) groups: Vec<Group>,
    pub(super) runs: Vec<Run>,
    pub(super) beginnings: Vec<Beginning>,
    /// Where the pool takes the step's tokens, `[tokens · kv_heads]`, i64.
    pub(super) places: Tensor,
}

impl Attention<'_> {
    /// `q` `[tokens, heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]` → as `q`.
    pub(super) fn forward(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor, TchError> {
        self.cache.store(layer, &self.places, k, v)?;
        let heads = Heads { all: q.size()[1], kv: k.size()[1] };
        if let ([group], [], []) = (&self.groups[..], &self.runs[..], &self.beginnings[..]) {
            return heads.together(&self.of_group(layer, heads, group, q)?.output);
        }
        let mut parts = Vec::with_capacity(self.groups.len() + self.runs.len());
        for group in &self.groups {
            let part = self.of_group(layer, heads, group, q)?;
            parts.push((heads.together(&part.output)?, heads.together(&part.log_sum_exp)?));
        }
        for run in &self.runs {
            let part = self.of_run(layer, heads, run, q)?;
            let token_major = |x: &Tensor| x.f_squeeze_dim(0)?.f_transpose(0, 1);
            parts.push((token_major(&part.output)?, token_major(&part.log_sum_exp)?));
        }
        let (outputs, log_sums): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        let output = Tensor::f_cat(&outputs, 0)?;
        if self.beginnings.is_empty() {
            return Ok(output);
        }
        let log_sum_exp = Tensor::f_cat(&log_sums, 0)?;
        for beginning in &self.beginnings {
            self.join(layer, heads, beginning, q, [&output, &log_sum_exp])?;
        }
        Ok(output)
    }

    /// Each row's query heads stand as queries of the key head that they share, so
    /// nothing is repeated: `[rows, kv_heads, group, head_dim]`.
    fn of_group(
        &self,
        layer: usize,
        heads: Heads,
        group: &Group,
        q: &Tensor,
    ) -> Result<Part, TchError> {
        let queries = heads.apart(&q.f_narrow(0, group.start, group.rows)?)?;
        let [keys, values] =
            self.cache.slots(layer, group.first_slot, group.rows, group.columns)?;
        let sight = group.mask.as_ref().map_or(Sight::All, Sight::Masked);
        attend(&queries, &keys, &values, sight)
    }

    fn of_run(&self, layer: usize, heads: Heads, run: &Run, q: &Tensor) -> Result<Part, TchError> {
        let queries = q.f_narrow(0, run.start, run.length)?.f_transpose(0, 1)?.f_unsqueeze(0)?;
        let [keys, values] = self.cache.region(layer, run.region, run.before + run.length)?;
        let sight = run.mask.as_ref().map_or(Sight::Causal, Sight::Masked);
        attend(&queries, &heads.repeated(&keys)?, &heads.repeated(&values)?, sight)
    }

    /// Adds a beginning's part to the `output` and `log_sum_exp` of its members.
    fn join(
        &self,
        layer: usize,
        heads: Heads,
        beginning: &Beginning,
        q: &Tensor,
        [output, log_sum_exp]: [&Tensor; 2],
    ) -> Result<(), TchError> {
        let Beginning { region, members } = beginning;
        // All members' queries of a key head at once: [1, kv_heads, members · group, head_dim].
        let queries = heads.apart(&q.f_index_select(0, members)?)?;
        let count = queries.size()[0];
        let queries = queries.f_transpose(0, 1)?.f_flatten(1, 2)?.f_unsqueeze(0)?;
        let [keys, values] = self.cache.region(layer, *region, region.length)?;
        let part = attend(&queries, &keys, &values, Sight::All)?;
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
/// heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]` → as `q`.
pub(super) fn causal(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TchError> {
    let heads = Heads { all: q.size()[1], kv: k.size()[1] };
    let head_major = |x: &Tensor| x.f_transpose(0, 1)?.f_unsqueeze(0);
    let [keys, values] = [heads.repeated(&head_major(k)?)?, heads.repeated(&head_major(v)?)?];
    let part = attend(&head_major(q)?, &keys, &values, Sight::Causal)?;
    part.output.f_squeeze_dim(0)?.f_transpose(0, 1)
}

/// How many heads there are.
#[derive(Debug, Clone, Copy)]
struct Heads {
    all: i64,
    kv: i64,
}

impl Heads {
    /// `[n, heads, …]` → `[n, kv_heads, heads / kv_heads, …]`.
    fn apart(self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_unflatten(1, [self.kv, self.all / self.kv])
    }

    /// And back.
    fn together(self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_flatten(1, 2)
    }

    /// `[1, kv_heads, n, head_dim]`, each head as often as it is asked.
    fn repeated(self, x: &Tensor) -> Result<Tensor, TchError> {
        match self.all / self.kv {
            1 => Ok(x.shallow_clone()),
            group => x.f_repeat_interleave_self_int(group, 1, None),
        }
    }
}
