//! The KV cache: preallocated, rows right-aligned, finished rows overwritten.

use tch::{Device, Kind, TchError, Tensor};

use crate::model::ModelConfig;

/// Keys and values of all rows, layer by layer.
///
/// Rows are aligned at their ends: whatever their lengths, every row's next
/// token goes to column `end`, so a decoding step writes one slice. What lies
/// to the left of a row's start is masked.
///
/// Live rows are always the first ones: a finished row's place is taken by
/// the last live row.
pub(super) struct KvCache {
    /// Per layer, `[rows, kv_heads, columns, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
    /// `[rows, 1, 1, columns]`: 0 where a row has tokens or will have, −∞ to their left.
    mask: Tensor,
    /// First column of each live row.
    starts: Vec<i64>,
    /// Column after the last token of every row.
    end: i64,
}

impl KvCache {
    /// Room for prompts of `lengths` tokens and `new` more each.
    pub(super) fn new(
        config: &ModelConfig,
        lengths: &[i64],
        new: i64,
        kind: Kind,
        device: Device,
    ) -> Result<Self, TchError> {
        let rows = lengths.len() as i64;
        let end = lengths.iter().copied().max().unwrap_or(0);
        let shape = [rows, config.num_key_value_heads, end + new, config.head_dim];
        // Zeros, not empty: a masked NaN would still be a NaN.
        let layer = |_| {
            let zeros = || Tensor::f_zeros(shape, (kind, device));
            Ok((zeros()?, zeros()?))
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_, TchError>>()?;

        let starts: Vec<i64> = lengths.iter().map(|length| end - length).collect();
        let first = Tensor::f_from_slice(&starts)?.f_to_device(device)?.f_view([-1, 1, 1, 1])?;
        let columns = Tensor::f_arange(end + new, (Kind::Int64, device))?;
        let left = columns.f_lt_tensor(&first)?;
        let mask = Tensor::f_zeros([rows, 1, 1, end + new], (kind, device))?
            .f_masked_fill(&left, f64::NEG_INFINITY)?;
        Ok(Self { layers, mask, starts, end })
    }

    /// Rows that are still written.
    pub(super) fn live(&self) -> usize {
        self.starts.len()
    }

    /// Stores keys and values (`[n, kv_heads, head_dim]`) of `row`'s prompt
    /// tokens from `offset` on, and returns views of all of its keys and
    /// values up to there, `[1, kv_heads, offset + n, head_dim]` each.
    pub(super) fn write_prompt(
        &self,
        layer: usize,
        row: usize,
        offset: i64,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Tensor, Tensor), TchError> {
        let (start, n) = (self.starts[row], k.size3()?.0);
        let store = |cache: &Tensor, new: &Tensor| {
            let row = cache.f_narrow(0, row as i64, 1)?;
            row.f_narrow(2, start + offset, n)?.f_copy_(&new.f_transpose(0, 1)?.f_unsqueeze(0)?)?;
            row.f_narrow(2, start, offset + n)
        };
        let (keys, values) = &self.layers[layer];
        Ok((store(keys, k)?, store(values, v)?))
    }

    /// Attention of one new token per live row: `q` `[rows, heads, head_dim]`,
    /// `k` and `v` `[rows, kv_heads, head_dim]`, which are stored at the end.
    pub(super) fn attend(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor, TchError> {
        let (rows, heads, head_dim) = q.size3()?;
        let kv_heads = k.size3()?.1;
        // Columns to the left of every live row's start hold nothing.
        let first = self.starts.iter().copied().min().unwrap_or(0);
        let columns = self.end + 1 - first;
        let store = |cache: &Tensor, new: &Tensor| {
            let cache = cache.f_narrow(0, 0, rows)?;
            cache.f_narrow(2, self.end, 1)?.f_copy_(&new.f_unsqueeze(2)?)?;
            cache.f_narrow(2, first, columns)
        };
        let (keys, values) = &self.layers[layer];
        let (keys, values) = (store(keys, k)?, store(values, v)?);
        let mask = self.mask.f_narrow(0, 0, rows)?.f_narrow(3, first, columns)?;
        // The query heads that share a key head stand as that head's queries:
        // with one token per row nothing needs to be repeated.
        let grouped = q.f_reshape([rows, kv_heads, heads / kv_heads, head_dim])?;
        let attended = Tensor::f_scaled_dot_product_attention(
            &grouped,
            &keys,
            &values,
            Some(&mask),
            0.0,
            false,
            None,
            false,
        )?;
        attended.f_reshape([rows, heads, head_dim])
    }

    /// Makes room for one more token in every row: to be called after all
    /// layers have [`attended`](Self::attend).
    pub(super) fn advance(&mut self) {
        self.end += 1;
    }

    /// Drops `row`; the last live row takes its place.
    pub(super) fn swap_remove(&mut self, row: usize) -> Result<(), TchError> {
        let last = self.live() - 1;
        if row != last {
            let (start, length) = (self.starts[last], self.end - self.starts[last]);
            for cache in self.layers.iter().flat_map(|(keys, values)| [keys, values]) {
                let from = cache.f_narrow(0, last as i64, 1)?.f_narrow(2, start, length)?;
                cache.f_narrow(0, row as i64, 1)?.f_narrow(2, start, length)?.f_copy_(&from)?;
            }
            let from = self.mask.f_narrow(0, last as i64, 1)?;
            self.mask.f_narrow(0, row as i64, 1)?.f_copy_(&from)?;
        }
        self.starts.swap_remove(row);
        Ok(())
    }
}
