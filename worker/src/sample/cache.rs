//! The KV cache: one preallocated pool, in which each shared beginning has a stretch, and
//! rows have pages.

use tch::{Device, Kind, TchError, Tensor};

use super::pages::Copied;
use crate::host;
use crate::model::ModelConfig;

/// Tokens of a page. Fewer leave less of a row's last page empty, and cost attention more
/// for each.
pub(super) const PAGE: usize = 64;

/// Keys and values of every token that later ones attend to.
///
/// ```text
/// pool   | shared beginnings … | page 0 | page 1 | …            tokens, layer by layer
/// ```
///
/// A row's own tokens, the rest of its prompt and its reply, are in its pages, wherever
/// these are (see [`Pages`](super::pages::Pages)).
///
/// Each beginning and each page is a region of `[kv_heads, tokens, head_dim]`: a head's
/// tokens lie side by side, as attention reads them.
#[derive(Debug)]
pub(super) struct KvCache {
    /// Per layer all keys, and behind them all values: `[2 · tokens · kv_heads, head_dim]`.
    layers: Vec<Tensor>,
    kv_heads: i64,
    /// Tokens ahead of the pages.
    shared: i64,
}

/// Where a beginning or a page is in the pool, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) start: i64,
    pub(super) length: i64,
}

/// How a pool is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Division {
    /// Tokens of all shared beginnings.
    pub(super) shared: i64,
    /// Rows that have pages at once.
    pub(super) rows: i64,
    /// Pages of the longest.
    pub(super) pages: i64,
}

impl Division {
    fn tokens(self) -> i64 {
        self.shared + self.rows * self.pages * PAGE as i64
    }
}

/// Bytes that a token's keys and values take over all layers.
pub(super) fn bytes_per_token(config: &ModelConfig, kind: Kind) -> i64 {
    let width = config.num_key_value_heads * config.head_dim;
    2 * config.num_hidden_layers * width * kind.elt_size_in_bytes() as i64
}

impl KvCache {
    /// A pool of no tokens.
    pub(super) fn empty() -> Self {
        Self { layers: Vec::new(), kv_heads: 1, shared: 0 }
    }

    /// Divides the pool anew; what it held is forgotten. It grows when it must.
    pub(super) fn divide(
        &mut self,
        config: &ModelConfig,
        division: Division,
        kind: Kind,
        device: Device,
    ) -> Result<(), TchError> {
        self.kv_heads = config.num_key_value_heads;
        let held = self.held();
        if held < division.tokens() {
            // The old pool goes first: two need not fit.
            self.layers.clear();
            let shape = [2 * division.tokens() * self.kv_heads, config.head_dim];
            for _ in 0..config.num_hidden_layers {
                // Zeros, not empty: a masked NaN would still be a NaN.
                self.layers.push(Tensor::f_zeros(shape, (kind, device))?);
            }
        }
        self.shared = division.shared;
        Ok(())
    }

    /// Tokens that there is room for.
    pub(super) fn held(&self) -> i64 {
        self.layers.first().map_or(0, |layer| layer.size()[0] / (2 * self.kv_heads))
    }

    /// Where a page is.
    pub(super) fn page(&self, page: usize) -> Region {
        let length = PAGE as i64;
        Region { start: self.shared + page as i64 * length, length }
    }

    /// Where the pool takes each head of a region's token, of its keys and then of its values.
    pub(super) fn rows_of(&self, region: Region, token: i64) -> impl Iterator<Item = i64> + use<> {
        let heads = self.kv_heads;
        let of_both = [0, self.held()].map(|ahead| (ahead + region.start) * heads + token);
        let of_heads = move |first| (0..heads).map(move |head| first + head * region.length);
        of_both.into_iter().flat_map(of_heads)
    }

    /// Stores keys and values (`[n, kv_heads, head_dim]`) at `places` (`[2 · n · kv_heads]`,
    /// i64), as [`Self::rows_of`] tells them.
    pub(super) fn store(
        &self,
        layer: usize,
        places: &Tensor,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(), TchError> {
        let new = Tensor::f_cat(&[keys, values], 1)?.f_flatten(0, 1)?;
        self.layers[layer].shallow_clone().f_index_copy_(0, places, &new).map(drop)
    }

    /// Keys and values of a beginning's first `tokens`, `[1, kv_heads, tokens, head_dim]`.
    pub(super) fn beginning(
        &self,
        layer: usize,
        region: Region,
        tokens: i64,
    ) -> Result<[Tensor; 2], TchError> {
        let [keys, values] = self.regions(layer, region, 1)?;
        Ok([keys.f_narrow(2, 0, tokens)?, values.f_narrow(2, 0, tokens)?])
    }

    /// Keys and values of the first `count` pages, `[count, kv_heads, PAGE, head_dim]`.
    pub(super) fn pages(&self, layer: usize, count: i64) -> Result<[Tensor; 2], TchError> {
        self.regions(layer, self.page(0), count)
    }

    /// Keys and values of `count` regions as long as `first`, one after another: views without
    /// a gap, `[count, kv_heads, tokens, head_dim]`.
    fn regions(&self, layer: usize, first: Region, count: i64) -> Result<[Tensor; 2], TchError> {
        let Region { start, length } = first;
        let view = |ahead: i64| {
            self.layers[layer]
                .f_narrow(0, (ahead + start) * self.kv_heads, count * length * self.kv_heads)?
                .f_unflatten(0, [count, self.kv_heads, length])
        };
        Ok([view(0)?, view(self.held())?])
    }

    /// Copies pages, of which none is both read and written.
    pub(super) fn copy(&self, copies: &[Copied]) -> Result<(), TchError> {
        let Some(layer) = self.layers.first() else { return Ok(()) };
        if copies.is_empty() {
            return Ok(());
        }
        let [from, to] = [|copied: &Copied| copied.from, |copied: &Copied| copied.to];
        let both = copies.iter().map(from).chain(copies.iter().map(to));
        let both: Vec<i64> = both.map(|page| page as i64).collect();
        let both = host::upload(&both, layer.device())?.f_chunk(2, 0)?;
        let most = copies.iter().map(|&Copied { from, to }| from.max(to)).max().unwrap_or(0);
        for layer in 0..self.layers.len() {
            for mut pool in self.pages(layer, most as i64 + 1)? {
                let _ = pool.f_index_copy_(0, &both[1], &pool.f_index_select(0, &both[0])?)?;
            }
        }
        Ok(())
    }
}
