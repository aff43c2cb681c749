//! By two products: one has all pages of the pool and the queries of their rows, another the
//! weights and the values. Nothing of the cache is copied, and hardly anything is padded.
//!
//! Between them a row's scores are put side by side, and behind them its pages' parts are
//! added up:
//!
//! ```text
//! queries ─▶ each page's ─▶ scores ─▶ each row's ─▶ softmax ─▶ each page's ─▶ parts ─▶ Σ
//! ```
//!
//! What moves moves by lines, whose places are told once for all layers ([`Lines`]).

use tch::{Device, Kind, TchError, Tensor};

use super::{Decoding, PAGE};
use crate::host;

/// How many of what.
#[derive(Debug, Clone, Copy)]
struct Counts {
    heads: usize,
    /// Heads that share a head of keys.
    group: usize,
    /// New tokens of the row that has most: each page is asked as many.
    queries: usize,
    /// Pages of the row that has most.
    pages: usize,
}

impl Counts {
    /// Which line of the products is a page's and a query's: they go by page, head of keys,
    /// query and head.
    fn line(&self, page: usize, head: usize, query: usize) -> usize {
        let Self { heads, group, queries, .. } = *self;
        ((page * (heads / group) + head / group) * queries + query) * group + head % group
    }
}

/// Where lines come from, and what the device is told besides: in one piece.
///
/// Queries and parts are lines of `head_dim`, scores and weights of a page's tokens. A row's
/// go by its tokens and heads.
#[derive(Debug, Default)]
struct Lines {
    /// Of each of the products' queries, the row's.
    queries: Vec<i64>,
    /// Of each row's scores, the products', for as many pages as the longest has.
    scores: Vec<i64>,
    /// Of each of the products' weights, the row's.
    weights: Vec<i64>,
    /// Of all rows' parts, the products'.
    parts: Vec<i64>,
    /// With which of them each token's and head's begin.
    firsts: Vec<i64>,
    /// Of each token, from which of its row's to which it sees them.
    starts: Vec<i64>,
    ends: Vec<i64>,
}

impl Lines {
    fn of(rows: &[Decoding<'_>], used: usize, window: Option<i64>, counts: Counts) -> Self {
        let Counts { heads, queries, pages, .. } = counts;
        // Pages of rows that do not decode are asked too, whatever it is, and nobody hears.
        let any = || vec![0; used * queries * heads];
        let mut lines = Self { queries: any(), weights: any(), ..Self::default() };
        let mut first = 0;
        for row in rows {
            let needed = row.needed();
            for (query, head) in (0..queries * heads).map(|at| (at / heads, at % heads)) {
                // Queries behind a row's last are as the last.
                let asking = (first + query.min(row.tokens - 1)) * heads + head;
                let of_pages = needed.iter().map(|&page| counts.line(page, head, query));
                for (index, line) in of_pages.clone().enumerate() {
                    lines.queries[line] = asking as i64;
                    lines.weights[line] = (asking * pages + index) as i64;
                }
                if query < row.tokens {
                    let of_pages = of_pages.map(|line| line as i64);
                    let hidden = std::iter::repeat(0);
                    lines.scores.extend(of_pages.clone().chain(hidden).take(pages));
                    lines.firsts.push(lines.parts.len() as i64);
                    lines.parts.extend(of_pages);
                }
            }
            for query in 0..row.tokens {
                let [start, end] = row.sees(query, window);
                lines.starts.push(start);
                lines.ends.push(end);
            }
            first += row.tokens;
        }
        lines
    }

    fn in_order(self) -> [Vec<i64>; 7] {
        let Self { queries, scores, weights, parts, firsts, starts, ends } = self;
        [queries, scores, weights, parts, firsts, starts, ends]
    }
}

/// A step's, for all layers.
#[derive(Debug)]
pub(in crate::sample) struct Products {
    heads: i64,
    /// These and the next are as in [`Lines`].
    queries: Tensor,
    scores: Tensor,
    weights: Tensor,
    parts: Tensor,
    firsts: Tensor,
    /// `[tokens, 1, tokens of a row with most pages]`, fp32: hides what is out of sight.
    mask: Tensor,
}

impl Products {
    /// See [`Paged::new`](super::Paged::new).
    pub(super) fn new(
        rows: &[Decoding<'_>],
        used: usize,
        window: Option<i64>,
        [heads, kv_heads]: [i64; 2],
        device: Device,
    ) -> Result<Self, TchError> {
        let counts = Counts {
            heads: heads as usize,
            group: (heads / kv_heads) as usize,
            queries: rows.iter().map(|row| row.tokens).max().unwrap_or(1),
            pages: rows.iter().map(|row| row.needed().len()).max().unwrap_or(1),
        };
        let all = Lines::of(rows, used, window, counts).in_order();
        let lengths = all.each_ref().map(|values| values.len() as i64);
        let all = host::upload(&all.concat(), device)?.f_split_with_sizes(lengths, 0)?;
        let [queries, scores, weights, parts, firsts, starts, ends] = &all[..] else {
            return Err(TchError::Shape(format!("{lengths:?} split into {}", all.len())));
        };
        let places = Tensor::f_arange((counts.pages * PAGE) as i64, (Kind::Int64, device))?;
        let per_token = |x: &Tensor| x.f_view([-1, 1, 1]);
        let hidden = places.f_ge_tensor(&per_token(ends)?)?;
        let hidden = hidden.f_logical_or(&places.f_lt_tensor(&per_token(starts)?)?)?;
        let mask = Tensor::f_zeros(hidden.size(), (Kind::Float, device))?;
        Ok(Self {
            heads,
            queries: queries.shallow_clone(),
            scores: scores.shallow_clone(),
            weights: weights.shallow_clone(),
            parts: parts.shallow_clone(),
            firsts: firsts.shallow_clone(),
            mask: mask.f_masked_fill(&hidden, f64::NEG_INFINITY)?,
        })
    }

    /// See [`Paged::tokens`](super::Paged::tokens).
    pub(super) fn tokens(&self) -> i64 {
        self.mask.size()[0]
    }

    /// See [`Paged::attend`](super::Paged::attend).
    pub(super) fn attend(
        &self,
        queries: &Tensor,
        [keys, values]: [&Tensor; 2],
        scale: f64,
        wants_sums: bool,
    ) -> Result<(Tensor, Option<Tensor>), TchError> {
        let (pages, kv_heads, page, head_dim) = keys.size4()?;
        let (heads, kind) = (pages * kv_heads, values.kind());
        // Heads that share a key head stand as its queries, so nothing is repeated.
        let queries = lines(queries, head_dim, &self.queries)?.f_view([heads, -1, head_dim])?;
        let nothing = Tensor::f_zeros([1, 1, 1], (kind, keys.device()))?;
        let keys = keys.f_flatten(0, 1)?.f_transpose(1, 2)?;
        let scores = nothing.f_baddbmm(&queries, &keys, 0.0, scale)?;
        let scores = lines(&scores, page, &self.scores)?.f_view([self.tokens(), self.heads, -1])?;
        let scores = scores.f_add(&self.mask)?;
        let weights = scores.f_softmax(-1, Kind::Float)?.f_to_kind(kind)?;
        let weights = lines(&weights, page, &self.weights)?.f_view([heads, -1, page])?;
        let parts = weights.f_bmm(&values.f_flatten(0, 1)?)?.f_view([-1, head_dim])?;
        // One part after the other, in fp32, and rounded once: a guess changes no bit.
        let (attended, ..) = Tensor::f_embedding_bag(
            &parts,
            &self.parts,
            &self.firsts,
            false,
            SUM,
            false,
            None::<&Tensor>,
            false,
        )?;
        let sums = wants_sums.then(|| scores.f_logsumexp([-1], false)).transpose()?;
        Ok((attended.f_view([-1, self.heads, head_dim])?, sums))
    }
}

/// What `embedding_bag` does to the lines of a bag.
const SUM: i64 = 0;

/// Of `x`, in lines of `width`, those in `places`.
fn lines(x: &Tensor, width: i64, places: &Tensor) -> Result<Tensor, TchError> {
    x.f_reshape([-1, width])?.f_index_select(0, places)
}
