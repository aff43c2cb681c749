//! The sampling loop: prefill in chunks, then all live rows token by token.

use std::ops::ControlFlow;

use tch::{Kind, TchError, Tensor};

use super::cache::KvCache;
use super::pick::choose;
use super::{Finish, Progress, Prompt, Sample, SampleError, SamplingParams, Shard, Uniforms};
use crate::model::Decoder;

/// Tokens of prompts that are computed between two looks at the observer.
const PREFILL_CHUNK: usize = 512;

/// Samples a reply to every prompt of `shard`, in the shard's order.
///
/// `observe` is called after every chunk of prompts and every token of the
/// batch; when it breaks, the shard ends within that step as
/// [`SampleError::Stopped`].
pub fn sample_shard(
    model: &Decoder,
    shard: &Shard,
    observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Vec<Sample>, SampleError> {
    check(model, shard)?;
    tch::no_grad(|| run(model, shard, observe))
}

fn check(model: &Decoder, shard: &Shard) -> Result<(), SampleError> {
    let SamplingParams { temperature, top_p, max_new_tokens, .. } = shard.params;
    let invalid = |problem| Err(SampleError::Invalid(problem));
    if !(temperature.is_finite() && temperature >= 0.0) {
        return invalid(format!("temperature is {temperature}, expected a number from 0"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return invalid(format!("top_p is {top_p}, expected a number above 0, at most 1"));
    }
    if max_new_tokens == 0 {
        return invalid("max_new_tokens is 0, expected at least 1".to_owned());
    }
    let vocab = model.config.vocab_size;
    for Prompt { prompt, tokens, .. } in &shard.prompts {
        if tokens.is_empty() {
            return invalid(format!("prompt {prompt} has no tokens"));
        }
        if let Some(id) = tokens.iter().find(|id| i64::from(**id) >= vocab) {
            return invalid(format!(
                "prompt {prompt} holds token {id}, but the model's vocabulary has {vocab}: \
                 tokenizer and model do not belong together"
            ));
        }
    }
    Ok(())
}

/// A reply in the making.
struct Row {
    /// Its prompt's place in the shard.
    at: usize,
    uniforms: Uniforms,
    tokens: Vec<u32>,
}

fn run(
    model: &Decoder,
    shard: &Shard,
    observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Vec<Sample>, SampleError> {
    if shard.prompts.is_empty() {
        return Ok(Vec::new());
    }
    let Shard { seed, iteration, params, prompts } = shard;
    let lengths: Vec<i64> = prompts.iter().map(|prompt| prompt.tokens.len() as i64).collect();
    // The last token of a reply is never fed back.
    let new = i64::from(params.max_new_tokens) - 1;
    let mut cache = KvCache::new(&model.config, &lengths, new, model.kind(), model.device())?;
    let start = |(at, prompt): (usize, &Prompt)| {
        let uniforms = Uniforms::new(*seed, *iteration, prompt.prompt, prompt.index);
        Row { at, uniforms, tokens: Vec::new() }
    };
    let mut rows: Vec<Row> = prompts.iter().enumerate().map(start).collect();
    let mut samples: Vec<Option<Sample>> = vec![None; prompts.len()];
    let mut progress = Progress { tokens: 0, finished: 0 };

    let mut hidden = prefill(model, &cache, prompts, &mut || match observe(progress) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(SampleError::Stopped),
    })?;
    loop {
        let logits = model.final_norm(&hidden)?.f_linear(model.head_weight(), None::<&Tensor>)?;
        let uniforms: Vec<f64> =
            rows.iter().map(|row| row.uniforms.at(row.tokens.len() as u32)).collect();
        let chosen = choose(&logits, params, &uniforms)?;
        progress.tokens += chosen.len() as u64;

        // From the back, so that what takes a finished row's place has been seen.
        for (live, id) in chosen.into_iter().enumerate().rev() {
            rows[live].tokens.push(id);
            let finish = if params.stop_ids.contains(&id) {
                Finish::Stop
            } else if rows[live].tokens.len() == params.max_new_tokens as usize {
                Finish::Length
            } else {
                continue;
            };
            let Row { at, tokens, .. } = rows.swap_remove(live);
            cache.swap_remove(live)?;
            let Prompt { prompt, index, .. } = prompts[at];
            samples[at] = Some(Sample { prompt, index, tokens, finish });
            progress.finished += 1;
        }
        if observe(progress).is_break() {
            return Err(SampleError::Stopped);
        }
        if rows.is_empty() {
            return Ok(samples.into_iter().flatten().collect());
        }
        hidden = decode(model, &mut cache, &rows, &lengths)?;
    }
}

/// One token of every live row → the hidden states after it, `[rows, hidden]`.
fn decode(
    model: &Decoder,
    cache: &mut KvCache,
    rows: &[Row],
    lengths: &[i64],
) -> Result<Tensor, TchError> {
    let ids: Vec<i64> =
        rows.iter().map(|row| row.tokens.last().copied().map_or(0, i64::from)).collect();
    let positions: Vec<i64> =
        rows.iter().map(|row| lengths[row.at] + row.tokens.len() as i64 - 1).collect();
    let (ids, rotary) = (upload(model, &ids)?, model.rotary(&upload(model, &positions)?)?);
    let mut h = model.embed(&ids)?;
    for (layer, block) in model.blocks.iter().enumerate() {
        h = block.forward(&h, &rotary, &mut |q, k, v| cache.attend(layer, q, k, v))?;
    }
    cache.advance();
    Ok(h)
}

/// A run of one prompt's tokens within a chunk.
struct Segment {
    row: usize,
    /// Tokens of the prompt that came before.
    offset: usize,
    length: usize,
    /// Who sees whom, where earlier tokens are seen too: `[length, offset + length]`.
    mask: Option<Tensor>,
}

/// Fills the cache with `prompts`, chunk by chunk and without padding, and
/// returns the hidden states after their last tokens, `[rows, hidden]`.
fn prefill(
    model: &Decoder,
    cache: &KvCache,
    prompts: &[Prompt],
    chunk_done: &mut dyn FnMut() -> Result<(), SampleError>,
) -> Result<Tensor, SampleError> {
    let mut last = Vec::new();
    for chunk in chunks(prompts) {
        let mut ids = Vec::with_capacity(PREFILL_CHUNK);
        let mut positions = Vec::with_capacity(PREFILL_CHUNK);
        let mut ends = Vec::new();
        let mut segments = Vec::with_capacity(chunk.len());
        for (row, offset, length) in chunk {
            let tokens = &prompts[row].tokens;
            ids.extend(tokens[offset..offset + length].iter().map(|&id| i64::from(id)));
            positions.extend(offset as i64..(offset + length) as i64);
            if offset + length == tokens.len() {
                ends.push(ids.len() as i64 - 1);
            }
            let mask = match offset {
                0 => None,
                _ => Some(causal_mask(model, offset as i64, length as i64)?),
            };
            segments.push(Segment { row, offset, length, mask });
        }
        let rotary = model.rotary(&upload(model, &positions)?)?;
        let mut h = model.embed(&upload(model, &ids)?)?;
        for (layer, block) in model.blocks.iter().enumerate() {
            h = block.forward(&h, &rotary, &mut |q, k, v| {
                attend_prompts(cache, layer, &segments, q, k, v)
            })?;
        }
        if !ends.is_empty() {
            last.push(h.f_index_select(0, &upload(model, &ends)?)?);
        }
        chunk_done()?;
    }
    Ok(Tensor::f_cat(&last, 0)?)
}

/// Cuts the prompts, laid end to end, into chunks of (row, offset, length).
fn chunks(prompts: &[Prompt]) -> Vec<Vec<(usize, usize, usize)>> {
    let mut chunks = vec![Vec::new()];
    let mut room = PREFILL_CHUNK;
    for (row, prompt) in prompts.iter().enumerate() {
        let mut offset = 0;
        while offset < prompt.tokens.len() {
            if room == 0 {
                chunks.push(Vec::new());
                room = PREFILL_CHUNK;
            }
            let length = room.min(prompt.tokens.len() - offset);
            chunks.last_mut().into_iter().for_each(|chunk| chunk.push((row, offset, length)));
            offset += length;
            room -= length;
        }
    }
    chunks
}

fn attend_prompts(
    cache: &KvCache,
    layer: usize,
    segments: &[Segment],
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Tensor, TchError> {
    let mut attended = Vec::with_capacity(segments.len());
    let mut start = 0;
    for Segment { row, offset, length, mask } in segments {
        let length = *length as i64;
        let (new_k, new_v) = (k.f_narrow(0, start, length)?, v.f_narrow(0, start, length)?);
        let (keys, values) = cache.write_prompt(layer, *row, *offset as i64, &new_k, &new_v)?;
        let queries = q.f_narrow(0, start, length)?.f_transpose(0, 1)?.f_unsqueeze(0)?;
        let out = Tensor::f_scaled_dot_product_attention(
            &queries,
            &keys,
            &values,
            mask.as_ref(),
            0.0,
            mask.is_none(),
            None,
            true,
        )?;
        attended.push(out.f_squeeze_dim(0)?.f_transpose(0, 1)?);
        start += length;
    }
    Tensor::f_cat(&attended, 0)
}

/// `[length, offset + length]`: token i sees all `offset` before it, and 0 to i.
fn causal_mask(model: &Decoder, offset: i64, length: i64) -> Result<Tensor, TchError> {
    let options = (Kind::Bool, model.device());
    Tensor::f_ones([length, offset + length], options)?.f_tril(offset)
}

fn upload(model: &Decoder, numbers: &[i64]) -> Result<Tensor, TchError> {
    Tensor::f_from_slice(numbers)?.f_to_device(model.device())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
