//! Attention of rows that decode, page by page.
//!
//! One product has all pages of the pool and the queries of their rows, another the weights
//! and the values; nothing is copied, and hardly anything is padded. With softmax denominators
//! Zₚ, a page's attention aₚ is joined with that of its row's other pages:
//!
//! ```text
//! attention = Σ wₚ aₚ        w = softmax of ln Z over the row's pages
//! ```
//!
//! libtorch's flash kernel for CPUs takes twice as long where few queries are asked of long
//! rows: it multiplies row after row, and on AMD's processors with no instructions for bf16.

use tch::{Device, Kind, TchError, Tensor};

use super::cache::PAGE;
use crate::host;

/// Added to scores of what a query does not see. Not −∞: of a page that is out of sight
/// there are only such, and −∞ less −∞ is no number.
const HIDDEN: f64 = -1e30;

/// A row that decodes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decoding<'a> {
    /// Its pages, in the order of its tokens.
    pub(super) pages: &'a [usize],
    /// Of its tokens, those before the new ones.
    pub(super) before: usize,
    /// New ones.
    pub(super) tokens: usize,
}

impl Decoding<'_> {
    /// Pages that have what its queries see.
    fn needed(&self) -> usize {
        (self.before + self.tokens).div_ceil(PAGE)
    }

    /// What the query in `place` (from 0; those behind the last are as the last) sees of its
    /// `index`-th page: from which token to which.
    fn sees(&self, place: usize, index: usize, window: Option<i64>) -> [i64; 2] {
        let position = (self.before + place.min(self.tokens - 1)) as i64;
        let end = position + 1 - (index * PAGE) as i64;
        let start = window.map_or(0, |window| end - window);
        [start, end].map(|token| token.clamp(0, PAGE as i64))
    }
}

/// What the device is told of the rows, in one piece.
#[derive(Debug, Default)]
struct Lists {
    /// Of each page its row.
    owners: Vec<i64>,
    /// Of each page and query, from which token to which it is in sight.
    starts: Vec<i64>,
    ends: Vec<i64>,
    /// Of each row its pages, and whether each of them only fills up.
    tables: Vec<i64>,
    absent: Vec<i64>,
    /// Of each row's each query its token, and back.
    to: Vec<i64>,
    back: Vec<i64>,
}

impl Lists {
    /// With as many `queries` and pages (`most`) for each row.
    fn of(
        rows: &[Decoding<'_>],
        used: usize,
        window: Option<i64>,
        [queries, most]: [usize; 2],
    ) -> Self {
        let mut lists = Self {
            owners: vec![0; used],
            starts: vec![0; used * queries],
            ends: vec![PAGE as i64; used * queries],
            ..Self::default()
        };
        for (at, row) in rows.iter().enumerate() {
            for (index, &page) in row.pages.iter().enumerate() {
                lists.owners[page] = at as i64;
                for place in 0..queries {
                    let entry = page * queries + place;
                    [lists.starts[entry], lists.ends[entry]] = row.sees(place, index, window);
                }
            }
            let last = row.needed() - 1;
            lists.tables.extend((0..most).map(|index| row.pages[index.min(last)] as i64));
            lists.absent.extend((0..most).map(|index| i64::from(index > last)));
            let first = lists.back.len();
            lists.to.extend((0..queries).map(|place| (first + place.min(row.tokens - 1)) as i64));
            lists.back.extend((0..row.tokens).map(|place| (at * queries + place) as i64));
        }
        lists
    }

    fn in_order(self) -> [Vec<i64>; 7] {
        let Self { owners, starts, ends, tables, absent, to, back } = self;
        [owners, starts, ends, tables, absent, to, back]
    }
}

/// The rows of a step that decode, with as many queries each as the most has.
#[derive(Debug)]
pub(super) struct Paged {
    rows: i64,
    queries: i64,
    /// Of each row's each query its token, `[rows · queries]`, and of each token its place
    /// among these; none where all rows have one.
    spread: Option<[Tensor; 2]>,
    /// Of each page in use its row, `[pages]`; those of rows that do not decode have any.
    owners: Tensor,
    /// What is added to scores, as they are laid out.
    mask: Tensor,
    /// Each row's pages, `[rows, most]` flat; the last one again where a row has fewer.
    tables: Tensor,
    /// `[rows, most, 1, 1, 1, 1]`, fp32: hides those.
    absent: Tensor,
}

impl Paged {
    /// For `rows`, of which there is one at least, in a pool of which `used` pages are in use.
    pub(super) fn new(
        rows: &[Decoding<'_>],
        used: usize,
        window: Option<i64>,
        [heads, kv_heads]: [i64; 2],
        (kind, device): (Kind, Device),
    ) -> Result<Self, TchError> {
        let queries = rows.iter().map(|row| row.tokens).max().unwrap_or(1);
        let most = rows.iter().map(Decoding::needed).max().unwrap_or(1);
        let all = Lists::of(rows, used, window, [queries, most]).in_order();
        let lengths = all.each_ref().map(|values| values.len() as i64);
        let all = host::upload(&all.concat(), device)?.f_split_with_sizes(lengths, 0)?;
        let [owners, starts, ends, tables, absent, to, back] = &all[..] else {
            return Err(TchError::Shape(format!("{lengths:?} split into {}", all.len())));
        };
        let [rows, queries, most] = [rows.len(), queries, most].map(|count| count as i64);
        let per_query = |x: &Tensor| x.f_view([-1, 1, queries, 1, 1]);
        let places = Tensor::f_arange(PAGE as i64, (Kind::Int64, device))?;
        let hidden = places.f_ge_tensor(&per_query(ends)?)?;
        let hidden = hidden.f_logical_or(&places.f_lt_tensor(&per_query(starts)?)?)?;
        let hide = |hidden: &Tensor, kind| hidden.f_to_kind(kind)?.f_mul_scalar(HIDDEN);
        let of_heads = [-1, kv_heads, queries, heads / kv_heads, PAGE as i64];
        Ok(Self {
            rows,
            queries,
            spread: (queries > 1).then(|| [to.shallow_clone(), back.shallow_clone()]),
            owners: owners.shallow_clone(),
            mask: hide(&hidden, kind)?
                .f_expand(of_heads, false)?
                .f_flatten(2, 3)?
                .f_flatten(0, 1)?,
            tables: tables.shallow_clone(),
            absent: hide(&absent.f_view([rows, most, 1, 1, 1, 1])?, Kind::Float)?,
        })
    }

    /// How many tokens its rows have.
    pub(super) fn tokens(&self) -> i64 {
        self.spread.as_ref().map_or(self.rows, |[_, back]| back.size()[0])
    }

    /// Attends: `queries` `[tokens, heads, head_dim]`, the rows' new tokens one after another,
    /// `keys` and `values` `[pages, kv_heads, PAGE, head_dim]`; scores are multiplied by
    /// `scale`. What comes out, as `queries`, and where it is wanted the log of the softmax's
    /// denominator, `[tokens, heads]`.
    pub(super) fn attend(
        &self,
        queries: &Tensor,
        [keys, values]: [&Tensor; 2],
        scale: f64,
        wants_sums: bool,
    ) -> Result<(Tensor, Option<Tensor>), TchError> {
        let (pages, kv_heads, _, head_dim) = keys.size4()?;
        let group = queries.size()[1] / kv_heads;
        let queries = match &self.spread {
            Some([to, _]) => queries.f_index_select(0, to)?,
            None => queries.shallow_clone(),
        };
        // Heads that share a key head stand as its queries, so nothing is repeated.
        let by_row = queries.f_reshape([self.rows, self.queries, kv_heads, group, head_dim])?;
        let by_page = by_row.f_transpose(1, 2)?.f_index_select(0, &self.owners)?;
        let queries = by_page.f_view([pages * kv_heads, -1, head_dim])?;
        let keys = keys.f_flatten(0, 1)?.f_transpose(1, 2)?;
        // On a CPU fp32 is quicker from here on, and it is more exact.
        let scores = self.mask.f_baddbmm(&queries, &keys, 1.0, scale)?.f_to_kind(Kind::Float)?;
        let weights = scores.f_softmax(-1, Kind::Float)?;
        let attended = weights.f_to_kind(values.kind())?.f_bmm(&values.f_flatten(0, 1)?)?;
        // The largest weight is that of the highest score s: exp(s) / Z.
        let largest = |x: &Tensor| x.f_amax([-1], true);
        let log_sums = largest(&scores)?.f_sub_(&largest(&weights)?.f_log_()?)?;

        let by_row = |x: &Tensor| {
            x.f_view([pages, kv_heads, self.queries, group, -1])?
                .f_index_select(0, &self.tables)?
                .f_unflatten(0, [self.rows, -1])
        };
        let by_token = |x: &Tensor| {
            let all = x.f_transpose(1, 2)?.f_flatten(2, 3)?.f_flatten(0, 1)?;
            match &self.spread {
                Some([_, back]) => all.f_index_select(0, back),
                None => Ok(all),
            }
        };
        let log_sums = by_row(&log_sums)?.f_add_(&self.absent)?;
        let highest = log_sums.f_amax([1], true)?;
        let shares = log_sums.f_sub(&highest)?.f_exp_()?;
        let parts = by_row(&attended)?.f_to_kind(Kind::Float)?.f_mul_(&shares)?;
        // Spread over whole vectors, sums are taken in one order however many queries there
        // are: a guess then changes no bit.
        let spread = shares.f_expand_as(&parts)?;
        let sum = |x: &Tensor| x.f_sum_dim_intlist(1, false, Kind::Float);
        let whole = sum(&spread)?;
        let joined = sum(&parts)?.f_div_(&whole)?.f_to_kind(values.kind())?;
        let sums = match wants_sums {
            true => {
                let log_sums = whole.f_select(-1, 0)?.f_log()?;
                let highest = highest.f_squeeze_dim(1)?.f_squeeze_dim(-1)?;
                Some(by_token(&log_sums.f_add(&highest)?)?)
            }
            false => None,
        };
        Ok((by_token(&joined)?, sums))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::ops::causal_mask;

    const HEADS: [i64; 2] = [6, 2];
    const HEAD_DIM: i64 = 16;
    const SCALE: f64 = 0.3;

    /// What `row`'s queries (`[tokens, heads, head_dim]`) get, and the log of the denominator,
    /// as it is written down.
    fn plainly(
        row: &Decoding<'_>,
        queries: &Tensor,
        pool: [&Tensor; 2],
        window: Option<i64>,
    ) -> [Tensor; 2] {
        let length = (row.before + row.tokens) as i64;
        let pages: Vec<i64> = row.pages.iter().map(|&page| page as i64).collect();
        let [keys, values] = pool.map(|pool| {
            let theirs = pool.index_select(0, &Tensor::from_slice(&pages)).transpose(0, 1);
            let theirs = theirs.flatten(1, 2).narrow(1, 0, length).to_kind(Kind::Double);
            theirs.repeat_interleave_self_int(HEADS[0] / HEADS[1], 0, None)
        });
        let queries = queries.to_kind(Kind::Double).transpose(0, 1);
        let shape = [row.tokens as i64, length];
        let options = (Kind::Double, Device::Cpu);
        let mask = causal_mask(row.before as i64, shape, window, options).unwrap();
        let scores = queries.matmul(&keys.transpose(1, 2)) * SCALE + mask;
        let attended = scores.softmax(-1, Kind::Double).matmul(&values);
        [attended.transpose(0, 1), scores.logsumexp([-1], false).transpose(0, 1)]
    }

    /// Rows of a few pages and of one, with guesses and without, over pages in any order; of
    /// two pages nobody asks. A guess ends at a page's end, and one goes beyond.
    #[test]
    fn pages_joined_are_the_whole_row() {
        tch::manual_seed(8);
        let pages = [vec![7, 2, 5], vec![0], vec![4, 1], vec![3, 8]];
        for kind in [Kind::Float, Kind::BFloat16] {
            let random = |shape: &[i64]| Tensor::randn(shape, (kind, Device::Cpu));
            let pool = || random(&[9, HEADS[1], PAGE as i64, HEAD_DIM]);
            let (keys, values) = (pool(), pool());
            for (window, tokens) in [(None, [1; 4]), (None, [1, 1, 5, 3]), (Some(40), [4, 1, 2, 9])]
            {
                let before = [2 * PAGE + 9, 0, 2 * PAGE - 5, PAGE - 2];
                let row = |at: usize| Decoding {
                    pages: &pages[at],
                    before: before[at],
                    tokens: tokens[at],
                };
                let rows: Vec<Decoding<'_>> = (0..4).map(row).collect();
                let count = tokens.iter().sum::<usize>() as i64;
                let queries = random(&[count, HEADS[0], HEAD_DIM]);
                let options = (kind, Device::Cpu);
                let paged = Paged::new(&rows, 9, window, HEADS, options).unwrap();
                assert_eq!(paged.tokens(), count);
                let (output, sums) = paged.attend(&queries, [&keys, &values], SCALE, true).unwrap();
                let mut start = 0;
                for row in &rows {
                    let theirs = |x: &Tensor| x.narrow(0, start, row.tokens as i64);
                    let expected = plainly(row, &theirs(&queries), [&keys, &values], window);
                    let bound = if kind == Kind::Float { 1e-6 } else { 1e-2 };
                    for (ours, expected) in [&output, sums.as_ref().unwrap()].iter().zip(expected) {
                        let error = (theirs(ours) - &expected).norm() / expected.norm();
                        let error = error.double_value(&[]);
                        assert!(error < bound, "{kind:?} {window:?} {row:?}: {error:.1e}");
                    }
                    start += row.tokens as i64;
                }
            }
        }
    }
}
