//! The KV cache: one preallocated pool, in which each row has a slot and each shared
//! beginning a stretch.

use tch::{Device, Kind, TchError, Tensor};

use crate::model::ModelConfig;

/// Keys and values of every token that later ones attend to.
///
/// ```text
/// pool   | shared beginnings … | slot 0 | slot 1 | …            tokens, layer by layer
/// ```
///
/// A slot holds a row's own tokens from its start: the rest of its prompt, and its
/// reply. Rows are moved together when one ends, so live rows have the first slots.
///
/// Each beginning and each slot is a region of `[kv_heads, tokens, head_dim]`: a head's
/// tokens lie side by side, as attention reads them, and the heads of neighbouring slots
/// at equal distances.
#[derive(Debug)]
pub(super) struct KvCache {
    /// Per layer, `[tokens · kv_heads, head_dim]` of keys and of values.
    layers: Vec<[Tensor; 2]>,
    kv_heads: i64,
    /// Tokens of all shared beginnings.
    shared: i64,
    /// Tokens of a slot.
    columns: i64,
}

/// Where a beginning or a slot is in the pool, in tokens.
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
    /// Slots.
    pub(super) rows: i64,
    /// Tokens of a slot.
    pub(super) columns: i64,
}

impl Division {
    fn tokens(self) -> i64 {
        self.shared + self.rows * self.columns
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
        Self { layers: Vec::new(), kv_heads: 1, shared: 0, columns: 0 }
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
            let shape = [division.tokens() * self.kv_heads, config.head_dim];
            // Zeros, not empty: a masked NaN would still be a NaN.
            let zeros = || Tensor::f_zeros(shape, (kind, device));
            for _ in 0..config.num_hidden_layers {
                self.layers.push([zeros()?, zeros()?]);
            }
        }
        (self.shared, self.columns) = (division.shared, division.columns);
        Ok(())
    }

    /// Tokens that there is room for.
    pub(super) fn held(&self) -> i64 {
        self.layers.first().map_or(0, |[keys, _]| keys.size()[0] / self.kv_heads)
    }

    /// Where a slot is.
    pub(super) fn slot(&self, slot: usize) -> Region {
        Region { start: self.shared + slot as i64 * self.columns, length: self.columns }
    }

    /// Where the pool takes each head of a region's token: rows of it.
    pub(super) fn rows_of(&self, region: Region, token: i64) -> impl Iterator<Item = i64> + use<> {
        let first = region.start * self.kv_heads + token;
        (0..self.kv_heads).map(move |head| first + head * region.length)
    }

    /// Stores keys and values (`[n, kv_heads, head_dim]`) at `places` (`[n · kv_heads]`,
    /// i64), as [`Self::rows_of`] tells them.
    pub(super) fn store(
        &self,
        layer: usize,
        places: &Tensor,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(), TchError> {
        for (pool, new) in self.layers[layer].iter().zip([keys, values]) {
            let _ = pool.shallow_clone().f_index_copy_(0, places, &new.f_flatten(0, 1)?)?;
        }
        Ok(())
    }

    /// Keys and values of a region's first `tokens`, `[1, kv_heads, tokens, head_dim]`.
    pub(super) fn region(
        &self,
        layer: usize,
        region: Region,
        tokens: i64,
    ) -> Result<[Tensor; 2], TchError> {
        self.regions(layer, region, 1, tokens)
    }

    /// The first `columns` tokens of `rows` slots from `first` on,
    /// `[rows, kv_heads, columns, head_dim]`.
    pub(super) fn slots(
        &self,
        layer: usize,
        first: usize,
        rows: i64,
        columns: i64,
    ) -> Result<[Tensor; 2], TchError> {
        self.regions(layer, self.slot(first), rows, columns)
    }

    /// The first `tokens` of `count` regions of equal length that follow one another.
    fn regions(
        &self,
        layer: usize,
        Region { start, length }: Region,
        count: i64,
        tokens: i64,
    ) -> Result<[Tensor; 2], TchError> {
        let [keys, values] = &self.layers[layer];
        let view = |pool: &Tensor| {
            pool.f_narrow(0, start * self.kv_heads, count * length * self.kv_heads)?
                .f_unflatten(0, [count, self.kv_heads, length])?
                .f_narrow(2, 0, tokens)
        };
        Ok([view(keys)?, view(values)?])
    }

    /// Copies the first `length` tokens of slot `from` to slot `to`.
    pub(super) fn copy(&self, from: usize, to: usize, length: i64) -> Result<(), TchError> {
        for layer in 0..self.layers.len() {
            let from = self.region(layer, self.slot(from), length)?;
            let to = self.region(layer, self.slot(to), length)?;
            for (mut to, from) in to.into_iter().zip(from) {
                to.f_copy_(&from)?;
            }
        }
        Ok(())
    }
}
