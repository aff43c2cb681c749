//! What a model makes of whole sequences, without a cache and without logits.

use tch::{Kind, TchError, Tensor};

use super::attend::causal;
use crate::host;
use crate::model::Decoder;
use crate::model::ops::causal_mask;

/// The hidden state of each sequence's last token behind the final norm: `[sequences,
/// hidden]`, fp32. None of the sequences is empty; they are packed, without padding.
pub(crate) fn last_states(model: &Decoder, sequences: &[&[u32]]) -> Result<Tensor, TchError> {
    let upload = |values: &[i64]| host::upload(values, model.device());
    let lengths: Vec<i64> = sequences.iter().map(|tokens| tokens.len() as i64).collect();
    let ids: Vec<i64> =
        sequences.iter().flat_map(|tokens| tokens.iter().copied().map(i64::from)).collect();
    let positions: Vec<i64> = lengths.iter().flat_map(|&length| 0..length).collect();
    let end = |end: &mut i64, length: &i64| {
        *end += length;
        Some(*end - 1)
    };
    let last: Vec<i64> = lengths.iter().scan(0, end).collect();

    // Sequences that are longer than the window of blocks that have one.
    let masks: Vec<Option<Tensor>> = lengths
        .iter()
        .map(|&length| match model.window() {
            Some(window) if window < length => {
                let options = (model.kind(), model.device());
                causal_mask(0, [length, length], Some(window), options).map(Some)
            }
            _ => Ok(None),
        })
        .collect::<Result<_, TchError>>()?;

    let rotations = model.rotations(&upload(&positions)?)?;
    let mut h = model.embed(&upload(&ids)?)?;
    for block in &model.blocks {
        let scale = block.attention_scale();
        h = block.forward(&h, &rotations, &mut |q, k, v| {
            let apart = |x: &Tensor| x.f_split_with_sizes(&lengths, 0);
            let (q, k, v) = (apart(q)?, apart(k)?, apart(v)?);
            let sequences = q.iter().zip(&k).zip(&v).zip(&masks);
            let attended = sequences.map(|(((q, k), v), mask)| {
                causal([q, k, v], mask.as_ref().filter(|_| block.window().is_some()), scale)
            });
            Tensor::f_cat(&attended.collect::<Result<Vec<_>, TchError>>()?, 0)
        })?;
    }
    model.final_norm(&h.f_index_select(0, &upload(&last)?)?)?.f_to_kind(Kind::Float)
}
