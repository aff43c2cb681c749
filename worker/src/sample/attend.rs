//! Attention of one step: rows that decode together, longer runs by themselves, shared
//! beginnings once for everybody who has them.
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
use super::paged::Paged;
use crate::model::Block;

/// Several new tokens that follow one another.
#[derive(Debug)]
pub(super) struct Run {
    /// Of the step's tokens, its first.
    pub(super) start: i64,
    pub(super) length: i64,
    /// Where the pool has it, if it goes on with something.
    pub(super) held: Option<Held>,
    /// `[length · group, before + length]`; none where nothing is before it, or out of sight.
    pub(super) mask: Option<Tensor>,
}

/// Where the pool has a run and what is before it.
#[derive(Debug)]
pub(super) enum Held {
    /// A shared beginning's first tokens.
    Beginning { region: Region, tokens: i64 },
    /// A row's tokens, in these pages (i64).
    Pages { pages: Tensor, tokens: i64 },
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
    /// The rows that decode, whose tokens are the step's first.
    pub(super) paged: Option<Paged>,
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
    /// Where the pool takes the step's tokens, `[2 · tokens · kv_heads]`, i64.
    pub(super) places: Tensor,
    /// Pages in use.
    pub(super) pages: i64,
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
        let Calls { paged, runs, beginnings } = windowed.unwrap_or(&self.calls);
        let scale = block.attention_scale();
        let pass = LayerPass { attention: self, layer, heads, scale, qkv: [q, k, v] };
        let (mut outputs, mut log_sums) = (Vec::new(), Vec::new());
        if let Some(paged) = paged {
            let [keys, values] = self.cache.pages(layer, self.pages)?;
            let queries = q.f_narrow(0, 0, paged.tokens())?;
            let wants_sums = !beginnings.is_empty();
            let (output, sums) = paged.attend(&queries, [&keys, &values], scale, wants_sums)?;
            outputs.push(output);
            log_sums.extend(sums);
        }
        for run in runs {
            let Part { output, log_sum_exp } = pass.of_run(run)?;
            outputs.push(output);
            log_sums.push(log_sum_exp);
        }
        let output = match &outputs[..] {
            [output] => output.shallow_clone(),
            outputs => Tensor::f_cat(outputs, 0)?,
        };
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
    attention: &'a Attention<'a>,
    layer: usize,
    heads: Heads,
    /// What scores are multiplied by.
    scale: f64,
    /// Of the step's tokens.
    qkv: [&'a Tensor; 3],
}

impl LayerPass<'_> {
    fn of_run(&self, run: &Run) -> Result<Part, TchError> {
        let Run { start, length, ref held, ref mask } = *run;
        let new = |x: &Tensor| x.f_narrow(0, start, length);
        let [queries, keys, values] = self.qkv;
        let queries = new(queries)?;
        let held = match held {
            Some(held) => self.held(held)?,
            None => [head_major(&new(keys)?)?, head_major(&new(values)?)?],
        };
        match mask {
            Some(mask) => self.of_tokens(&queries, held, Sight::Masked(mask)),
            None => each_head(self.heads, &queries, held, Sight::Causal, self.scale),
        }
    }

    /// Keys and values, `[1, kv_heads, tokens, head_dim]`; a row's are gathered.
    fn held(&self, held: &Held) -> Result<[Tensor; 2], TchError> {
        let Attention { cache, pages: used, .. } = *self.attention;
        match *held {
            Held::Beginning { region, tokens } => cache.beginning(self.layer, region, tokens),
            Held::Pages { ref pages, tokens } => {
                let [keys, values] = cache.pages(self.layer, used)?;
                let gather = |x: &Tensor| {
                    let theirs = x.f_index_select(0, pages)?.f_transpose(0, 1)?.f_flatten(1, 2)?;
                    theirs.f_narrow(1, 0, tokens)?.f_unsqueeze(0)
                };
                Ok([gather(&keys)?, gather(&values)?])
            }
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
        let [queries, ..] = self.qkv;
        let queries = queries.f_index_select(0, members)?;
        let held = self.attention.cache.beginning(self.layer, *region, region.length)?;
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
    let queries = head_major(queries)?;
    let [keys, values] = [heads.repeated(&keys)?, heads.repeated(&values)?];
    let part = attend(&queries, &keys, &values, sight, scale)?;
    let token_major = |x: &Tensor| x.f_squeeze_dim(0)?.f_transpose(0, 1);
    Ok(Part { output: token_major(&part.output)?, log_sum_exp: token_major(&part.log_sum_exp)? })
}

/// `[tokens, heads, head_dim]` → `[1, heads, tokens, head_dim]`: a view.
fn head_major(x: &Tensor) -> Result<Tensor, TchError> {
    x.f_transpose(0, 1)?.f_unsqueeze(0)
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
