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
#[derive(Debug)]
pub(super) struct KvCache {
    /// Per layer, `[tokens, kv_heads, head_dim]` of keys and of values.
    layers: Vec<[Tensor; 2]>,
    /// Tokens of all shared beginnings.
    shared: i64,
    /// Tokens of a slot.
    columns: i64,
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
        Self { layers: Vec::new(), shared: 0, columns: 0 }
    }

    /// Divides the pool anew; what it held is forgotten. It grows when it must.
    pub(super) fn divide(
        &mut self,
        config: &ModelConfig,
        division: Division,
        kind: Kind,
        device: Device,
    ) -> Result<(), TchError> {
        let held = self.layers.first().map_or(0, |[keys, _]| keys.size()[0]);
        if held < division.tokens() {
            // The old pool goes first: two need not fit.
            self.layers.clear();
            let shape = [division.tokens(), config.num_key_value_heads, config.head_dim];
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
    #[cfg(test)]
    pub(super) fn tokens(&self) -> i64 {
        self.layers.first().map_or(0, |[keys, _]| keys.size()[0])
    }

    /// Where a slot's first token is in the pool.
    pub(super) fn slot(&self, slot: usize) -> i64 {
        self.shared + slot as i64 * self.columns
    }

    /// Stores keys and values (`[n, kv_heads, head_dim]`) at `places` (`[n]`, i64).
    pub(super) fn store(
        &self,
        layer: usize,
        places: &Tensor,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(), TchError> {
        for (pool, new) in self.layers[layer].iter().zip([keys, values]) {
            let _ = pool.shallow_clone().f_index_copy_(0, places, new)?;
        }
        Ok(())
    }

    /// Keys and values of `length` tokens from `start` on, `[1, kv_heads, length, head_dim]`.
    pub(super) fn stretch(
        &self,
        layer: usize,
        start: i64,
        length: i64,
    ) -> Result<[Tensor; 2], TchError> {
        let [keys, values] = &self.layers[layer];
        let view =
            |pool: &Tensor| pool.f_narrow(0, start, length)?.f_unsqueeze(0)?.f_transpose(1, 2);
        Ok([view(keys)?, view(values)?])
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
        let [keys, values] = &self.layers[layer];
        let view = |pool: &Tensor| {
            pool.f_narrow(0, self.slot(first), rows * self.columns)?
                .f_unflatten(0, [rows, self.columns])?
                .f_narrow(1, 0, columns)?
                .f_transpose(1, 2)
        };
        Ok([view(keys)?, view(values)?])
    }

    /// Copies the first `length` tokens of slot `from` to slot `to`.
    pub(super) fn copy(&self, from: usize, to: usize, length: i64) -> Result<(), TchError> {
        for pool in self.layers.iter().flatten() {
            let from = pool.f_narrow(0, self.slot(from), length)?;
            pool.f_narrow(0, self.slot(to), length)?.f_copy_(&from)?;
        }
        Ok(())
    }
}
