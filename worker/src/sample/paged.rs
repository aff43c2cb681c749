//! Attention of rows that decode, over their pages of the cache.
//!
//! On a CPU a kernel of ours reads each page once, where it is. Elsewhere it is libtorch's
//! products ([`products`]).
//!
//! libtorch's flash kernel for CPUs takes four times as long where few queries are asked of long
//! rows: it multiplies row after row, and on AMD's processors with no instructions for bf16.

mod products;

use tch::{Device, Kind, TchError, Tensor};

use self::products::Products;
use super::cache::PAGE;
use crate::{host, kernels};

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
    fn needed(&self) -> &[usize] {
        &self.pages[..(self.before + self.tokens).div_ceil(PAGE)]
    }

    /// From which of the row's tokens to which the `query`-th new one sees them.
    fn sees(&self, query: usize, window: Option<i64>) -> [i64; 2] {
        let end = (self.before + query) as i64 + 1;
        [window.map_or(0, |window| (end - window).max(0)), end]
    }
}

/// The rows of a step that decode.
#[derive(Debug)]
pub(super) enum Paged {
    Kernel {
        /// Each token's row's pages, `[tokens, most]`; any, where it has fewer.
        tables: Tensor,
        /// From which of its row's tokens to which each token sees them, `[tokens, 2]`.
        sights: Tensor,
    },
    Products(Products),
}

impl Paged {
    /// For `rows`, of which there is one at least, in a pool of which `used` pages are in use.
    pub(super) fn new(
        rows: &[Decoding<'_>],
        used: usize,
        window: Option<i64>,
        heads: [i64; 2],
        (kind, device): (Kind, Device),
    ) -> Result<Self, TchError> {
        if !kernels::are_for(kind, device) {
            return Products::new(rows, used, window, heads, device).map(Self::Products);
        }
        let most = rows.iter().map(|row| row.needed().len()).max().unwrap_or(1);
        let (mut tables, mut sights) = (Vec::new(), Vec::new());
        for row in rows {
            for query in 0..row.tokens {
                let pages = row.needed().iter().map(|&page| page as i64);
                tables.extend(pages.chain(std::iter::repeat(0)).take(most));
                sights.extend(row.sees(query, window));
            }
        }
        let lengths = [&tables, &sights].map(|values| values.len() as i64);
        let both = host::upload(&[tables, sights].concat(), device)?;
        Ok(Self::Kernel {
            tables: both.f_narrow(0, 0, lengths[0])?.f_view([-1, most as i64])?,
            sights: both.f_narrow(0, lengths[0], lengths[1])?.f_view([-1, 2])?,
        })
    }

    /// How many tokens its rows have.
    pub(super) fn tokens(&self) -> i64 {
        match self {
            Self::Kernel { sights, .. } => sights.size()[0],
            Self::Products(products) => products.tokens(),
        }
    }

    /// Attends: `queries` `[tokens, heads, head_dim]`, the rows' new tokens one after another,
    /// `keys` and `values` `[pages, kv_heads, PAGE, head_dim]`; scores are multiplied by
    /// `scale`. What comes out, as `queries`, and where it is wanted the log of the softmax's
    /// denominator, `[tokens, heads]`.
    pub(super) fn attend(
        &self,
        queries: &Tensor,
        keys_and_values: [&Tensor; 2],
        scale: f64,
        wants_sums: bool,
    ) -> Result<(Tensor, Option<Tensor>), TchError> {
        match self {
            Self::Kernel { tables, sights } => {
                let [output, sums] =
                    kernels::paged_attention(queries, keys_and_values, [tables, sights], scale)?;
                Ok((output, wants_sums.then_some(sums)))
            }
            Self::Products(products) => {
                products.attend(queries, keys_and_values, scale, wants_sums)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::ops::causal_mask;

    /// What `row`'s queries (`[tokens, heads, head_dim]`) get, and the log of the denominator,
    /// as it is written down.
    fn plainly(
        row: &Decoding<'_>,
        queries: &Tensor,
        pool: [&Tensor; 2],
        scale: f64,
        window: Option<i64>,
    ) -> [Tensor; 2] {
        let length = (row.before + row.tokens) as i64;
        let pages: Vec<i64> = row.pages.iter().map(|&page| page as i64).collect();
        let [keys, values] = pool.map(|pool| {
            let theirs = pool.index_select(0, &Tensor::from_slice(&pages)).transpose(0, 1);
            let theirs = theirs.flatten(1, 2).narrow(1, 0, length).to_kind(Kind::Double);
            let group = queries.size()[1] / theirs.size()[0];
            theirs.repeat_interleave_self_int(group, 0, None)
        });
        let queries = queries.to_kind(Kind::Double).transpose(0, 1);
        let shape = [row.tokens as i64, length];
        let options = (Kind::Double, Device::Cpu);
        let mask = causal_mask(row.before as i64, shape, window, options).unwrap();
        let scores = queries.matmul(&keys.transpose(1, 2)) * scale + mask;
        let attended = scores.softmax(-1, Kind::Double).matmul(&values);
        [attended.transpose(0, 1), scores.logsumexp([-1], false).transpose(0, 1)]
    }

    /// How new tokens of four rows come out by `by_kernel` or products: rows of a few pages and
    /// of one, over pages in any order; of two pages nobody asks.
    fn check(
        by_kernel: bool,
        queries: &Tensor,
        pool: [&Tensor; 2],
        scale: f64,
        (window, tokens): (Option<i64>, [usize; 4]),
        bound: f64,
    ) {
        let pages = [vec![7, 2, 5], vec![0], vec![4, 1], vec![3, 8]];
        let before = [2 * PAGE + 9, 0, 2 * PAGE - 5, PAGE - 2];
        let row =
            |at: usize| Decoding { pages: &pages[at], before: before[at], tokens: tokens[at] };
        let rows: Vec<Decoding<'_>> = (0..4).map(row).collect();
        let heads = [queries.size()[1], pool[0].size()[1]];
        let options = (queries.kind(), Device::Cpu);
        let paged = match by_kernel {
            true => Paged::new(&rows, 9, window, heads, options),
            false => Products::new(&rows, 9, window, heads, options.1).map(Paged::Products),
        };
        let paged = paged.unwrap();
        assert_eq!(matches!(paged, Paged::Kernel { .. }), by_kernel);
        assert_eq!(paged.tokens(), queries.size()[0]);
        let (output, sums) = paged.attend(queries, pool, scale, true).unwrap();
        let mut start = 0;
        for row in &rows {
            let theirs = |x: &Tensor| x.narrow(0, start, row.tokens as i64);
            let expected = plainly(row, &theirs(queries), pool, scale, window);
            for (ours, expected) in [&output, sums.as_ref().unwrap()].iter().zip(expected) {
                let error = (theirs(ours) - &expected).norm() / expected.norm();
                let error = error.double_value(&[]);
                assert!(error < bound, "{queries:?} {window:?} {row:?}: {error:.1e}");
            }
            start += row.tokens as i64;
        }
    }

    /// A window and new tokens of each row: with guesses and without. A guess ends at a page's
    /// end, and one goes beyond.
    const CASES: [(Option<i64>, [usize; 4]); 3] =
        [(None, [1; 4]), (None, [1, 1, 5, 3]), (Some(40), [4, 1, 2, 9])];

    #[test]
    fn pages_joined_are_the_whole_row() {
        tch::manual_seed(8);
        for kind in [Kind::Float, Kind::BFloat16] {
            let random = |shape: &[i64]| Tensor::randn(shape, (kind, Device::Cpu));
            let pool = || random(&[9, 2, PAGE as i64, 16]);
            let (keys, values) = (pool(), pool());
            for case in CASES {
                let queries = random(&[case.1.iter().sum::<usize>() as i64, 6, 16]);
                let bound = if kind == Kind::Float { 1e-6 } else { 1e-2 };
                for by_kernel in [true, false] {
                    check(by_kernel, &queries, [&keys, &values], 0.3, case, bound);
                }
            }
        }
    }

    /// Heads of whole vectors, with more behind them, and of less; groups that go through the
    /// pages at once, and in two parts. The kernel rounds to bf16 what comes out alone.
    #[test]
    fn heads_of_any_width_and_number_are_attended_to() {
        tch::manual_seed(10);
        for [heads, kv_heads, width] in [[6, 2, 16], [14, 2, 64], [5, 5, 40], [4, 1, 96]] {
            let scale = 1.2 / (width as f64).sqrt();
            for (kind, bound) in [(Kind::Float, 1e-6), (Kind::BFloat16, 4e-3)] {
                let random = |shape: &[i64]| Tensor::randn(shape, (kind, Device::Cpu));
                let pool = || random(&[9, kv_heads, PAGE as i64, width]);
                let (keys, values) = (pool(), pool());
                for case in CASES {
                    // As they lie in what is projected: keys behind them.
                    let count = case.1.iter().sum::<usize>() as i64;
                    let queries = random(&[count, heads + kv_heads, width]).narrow(1, 0, heads);
                    check(true, &queries, [&keys, &values], scale, case, bound);
                    if kind == Kind::Float {
                        check(false, &queries, [&keys, &values], scale, case, bound);
                    }
                }
            }
        }
    }

    /// To the last bit, whoever is beside it, and with its guesses or without.
    #[test]
    fn what_a_row_gets_is_its_own() {
        tch::manual_seed(9);
        let pages = [vec![2, 0], vec![1]];
        let row = |at: usize, before, tokens| Decoding { pages: &pages[at], before, tokens };
        for kind in [Kind::Float, Kind::BFloat16] {
            let random = |shape: &[i64]| Tensor::randn(shape, (kind, Device::Cpu));
            let (keys, values) =
                (random(&[3, 2, PAGE as i64, 64]), random(&[3, 2, PAGE as i64, 64]));
            let queries = random(&[4, 6, 64]);
            let attend = |rows: &[Decoding<'_>], queries: &Tensor| {
                let paged = Paged::new(rows, 3, None, [6, 2], (kind, Device::Cpu)).unwrap();
                paged.attend(queries, [&keys, &values], 0.15, false).unwrap().0
            };
            let together = attend(&[row(0, 70, 3), row(1, 20, 1)], &queries);
            let alone = attend(&[row(0, 70, 1)], &queries.narrow(0, 0, 1));
            assert_eq!(together.narrow(0, 0, 1), alone);
        }
    }
}
