//! From logits to a token: penalties, temperature, top-k, top-p, min-p, inverse CDF.
//!
//! In this order, as in transformers.

mod cut;

use tch::{Device, Kind, TchError, Tensor};

pub use self::cut::Survivor;
use self::cut::{Candidate, Cut};
use super::{SampleError, SamplingParams};
use crate::{host, kernels};

/// Candidates that a GPU looks for first. Sorting a whole vocabulary costs more than the
/// step of a small model that made its logits; with top-p 0.9 the tokens that matter are
/// among these but for a few rows in a thousand.
const CANDIDATES: i64 = 256;

/// How far below the best score a CPU looks for candidates first, and then.
const DEPTHS: [f32; 2] = [8.0, 16.0];

/// What a row's draw depends on besides its logits.
#[derive(Debug)]
pub(super) struct Draw<'a> {
    /// In [0, 1); greedy choice uses none.
    pub(super) uniform: f64,
    /// Tokens of the reply so far.
    pub(super) position: usize,
    /// Tokens of prompt and reply so far, in parts.
    pub(super) seen: [&'a [u32]; 3],
}

/// A token, and its log-probability under the model itself: at temperature 1, before
/// anything was left out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Drawn {
    pub(super) id: u32,
    pub(super) logp: f32,
}

/// Chooses one token per row of `logits` (`[rows, vocab]`, any float kind).
///
/// On a GPU this costs one transfer to the host, and one more for each row whose leading
/// candidates do not decide.
pub(super) fn choose(
    logits: &Tensor,
    params: &SamplingParams,
    draws: &[Draw<'_>],
) -> Result<Vec<Drawn>, SampleError> {
    if params.temperature == 0.0 {
        return greedy(logits, params, draws);
    }
    match logits.device() {
        Device::Cpu => on_cpu(logits, params, draws),
        _ => on_gpu(logits, params, draws),
    }
}

/// Scores, fp32, with the repetition penalty, and without stop ids where none may be drawn
/// yet; none where nothing changes.
fn edit(
    logits: &Tensor,
    params: &SamplingParams,
    draws: &[Draw<'_>],
) -> Result<Option<Tensor>, TchError> {
    let early = |draw: &Draw<'_>| draw.position < params.min_new_tokens as usize;
    let penalised = params.repetition_penalty != 1.0;
    if !penalised && !draws.iter().any(early) {
        return Ok(None);
    }
    // bf16 is widened before anything is done to it, as transformers does.
    let scores = logits.f_to_dtype(Kind::Float, false, true)?;
    let upload = |ids: &[i64]| host::upload(ids, logits.device());
    let stop_ids: Vec<i64> = params.stop_ids.iter().copied().map(i64::from).collect();
    for (row, draw) in (0..).zip(draws) {
        let mut row = scores.f_select(0, row)?;
        if penalised {
            let mut seen: Vec<i64> = draw.seen.concat().into_iter().map(i64::from).collect();
            seen.sort_unstable();
            seen.dedup();
            let seen = upload(&seen)?;
            let old = row.f_index_select(0, &seen)?;
            // Towards −∞ from either side of 0 (Keskar et al. 2019).
            let lowered = old.f_div_scalar(params.repetition_penalty)?;
            let new = old
                .f_mul_scalar(params.repetition_penalty)?
                .f_where_self(&old.f_lt(0.0)?, &lowered)?;
            let _ = row.f_index_copy_(0, &seen, &new)?;
        }
        if early(draw) && !stop_ids.is_empty() {
            let _ = row.f_index_fill_(0, &upload(&stop_ids)?, f64::NEG_INFINITY)?;
        }
    }
    Ok(Some(scores))
}

fn greedy(
    logits: &Tensor,
    params: &SamplingParams,
    draws: &[Draw<'_>],
) -> Result<Vec<Drawn>, SampleError> {
    let edited = edit(logits, params, draws)?;
    let raw = logits.f_to_kind(Kind::Float)?;
    let raw_normaliser = raw.f_logsumexp([-1], true)?;
    let scores = edited.as_ref().unwrap_or(&raw);
    let ids = scores.f_argmax(-1, true)?;
    let best = raw.f_gather(-1, &ids, false)?;
    let packed = download(&[&best, &raw_normaliser, &ids.f_to_kind(Kind::Float)?])?;
    let drawn = |row: &[f32]| Ok(Drawn { id: row[2] as u32, logp: finite(row[0])? - row[1] });
    packed.chunks_exact(3).map(drawn).collect()
}

/// What a token is drawn behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context<'a> {
    /// The prompt's ids.
    pub prompt: &'a [u32],
    /// The reply's so far.
    pub reply: &'a [u32],
}

/// The tokens that may be drawn by each row of `logits` (`[rows, vocab]`, any float kind),
/// from the most probable down: what the cuts of `params` leave, at a temperature above 0.
///
/// These are the very sets that sampling draws from. A row's `Context` tells what it is
/// drawn behind.
///
/// # Errors
/// [`SampleError::NotFinite`] for logits that are no numbers; libtorch's.
pub fn survivors(
    logits: &Tensor,
    params: &SamplingParams,
    contexts: &[Context<'_>],
) -> Result<Vec<Vec<Survivor>>, SampleError> {
    let draws = contexts.iter().map(|&Context { prompt, reply }| Draw {
        uniform: 0.0,
        position: reply.len(),
        seen: [prompt, reply, &[]],
    });
    let draws: Vec<Draw<'_>> = draws.collect();
    #[expect(clippy::disallowed_methods, reason = "a question from outside; no loop asks it")]
    let logits = logits.f_to_device(Device::Cpu)?;
    let settled = settle(&logits, params, &draws, Cut::survivors)?;
    Ok(settled.into_iter().map(|(survivors, _)| survivors).collect())
}

/// Looks at all scores where they are.
fn on_cpu(
    logits: &Tensor,
    params: &SamplingParams,
    draws: &[Draw<'_>],
) -> Result<Vec<Drawn>, SampleError> {
    let settled = settle(logits, params, draws, Cut::draw)?;
    let index: Vec<i64> = settled.iter().map(|&(id, _)| i64::from(id)).collect();
    let index = host::upload(&index, Device::Cpu)?.f_unsqueeze(1)?;
    let raw = host::read(&logits.f_gather(-1, &index, false)?)?;
    let drawn = |((id, normaliser), raw)| Drawn { id, logp: raw - normaliser };
    Ok(settled.into_iter().zip(raw).map(drawn).collect())
}

/// What `by` makes of each row of `logits`: of the candidates near its best score where these
/// settle it, else of all. Beside it ln Σ exp(logit).
fn settle<'a, T: Default>(
    logits: &Tensor,
    params: &'a SamplingParams,
    draws: &[Draw<'_>],
    by: impl Fn(&Cut<'a>, Vec<Candidate>, bool) -> Option<T>,
) -> Result<Vec<(T, f32)>, SampleError> {
    let logits = match kernels::are_for(logits.kind(), logits.device()) {
        true => logits.shallow_clone(),
        false => logits.f_to_kind(Kind::Float)?,
    };
    let edited = edit(&logits, params, draws)?;
    let scores = edited.as_ref().unwrap_or(&logits);
    let temperature = params.temperature;
    let [summaries, leaders] = kernels::leaders(scores, temperature, f64::from(DEPTHS[0]))?;
    let (summaries, leaders) = (host::read(&summaries)?, host::read(&leaders)?);
    let raw_normalisers: Vec<f32> = match edited {
        None => summaries.chunks_exact(4).map(|summary| summary[1]).collect(),
        Some(_) => host::read(&logits.f_to_kind(Kind::Float)?.f_logsumexp([-1], false)?)?,
    };
    let leader = |pair: &[f32]| Candidate { score: pair[1], id: pair[0] as u32 };
    let mut leaders = leaders.chunks_exact(2).map(leader);
    let mut settled = Vec::with_capacity(draws.len());
    for ((row, summary), draw) in (0..).zip(summaries.chunks_exact(4)).zip(draws) {
        // In fp64: a rounding of the normaliser's would be one of all probabilities.
        let log_sum = f64::from(finite(summary[2])?);
        let log_normaliser = f64::from(summary[0]) / f64::from(temperature as f32) + log_sum;
        let best = summary[0] / temperature as f32;
        let cut = Cut { params, log_normaliser, uniform: draw.uniform };
        let near = leaders.by_ref().take(summary[3] as usize).collect();
        let found = match by(&cut, near, false) {
            Some(found) => found,
            None => {
                let all = scores.f_get(row)?.f_to_kind(Kind::Float)?.f_div_scalar(temperature)?;
                let all = host::read(&all)?;
                let above = |floor: f32| -> Vec<Candidate> {
                    let all = (0..).zip(&all).map(|(id, &score)| Candidate { score, id });
                    all.filter(|candidate| candidate.score > floor).collect()
                };
                let near = by(&cut, above(best - DEPTHS[1]), false);
                near.or_else(|| by(&cut, above(f32::NEG_INFINITY), true)).unwrap_or_default()
            }
        };
        settled.push((found, raw_normalisers[row as usize]));
    }
    Ok(settled)
}

/// Brings the highest scores of each row to the host.
fn on_gpu(
    logits: &Tensor,
    params: &SamplingParams,
    draws: &[Draw<'_>],
) -> Result<Vec<Drawn>, SampleError> {
    let edited = edit(logits, params, draws)?;
    let raw = logits.f_to_kind(Kind::Float)?;
    let raw_normaliser = raw.f_logsumexp([-1], true)?;
    let scores = edited.as_ref().unwrap_or(&raw).f_div_scalar(params.temperature)?;
    let normaliser = scores.f_logsumexp([-1], true)?;
    let vocab = scores.size2()?.1;
    let k = vocab.min(CANDIDATES.max(i64::from(params.top_k) + 1));
    let (top, ids) = scores.f_topk(k, -1, true, true)?;
    let logits = raw.f_gather(-1, &ids, false)?.f_sub(&raw_normaliser)?;
    let packed = download(&[&normaliser, &top, &ids.f_to_kind(Kind::Float)?, &logits])?;
    let k = k as usize;
    let mut chosen = Vec::with_capacity(draws.len());
    for ((row, packed), draw) in (0..).zip(packed.chunks_exact(1 + 3 * k)).zip(draws) {
        let log_normaliser = f64::from(finite(packed[0])?);
        let cut = Cut { params, log_normaliser, uniform: draw.uniform };
        let (top, rest) = packed[1..].split_at(k);
        let (ids, logps) = rest.split_at(k);
        let complete = k as i64 == vocab;
        // Tokens outside may tie with the last candidate and stand before it.
        let last = top[k - 1];
        let leading = top.iter().zip(ids).map(|(&score, &id)| Candidate { score, id: id as u32 });
        let leading = leading.filter(|candidate| complete || candidate.score > last).collect();
        chosen.push(match cut.draw(leading, complete) {
            Some(id) => {
                let at = ids.iter().position(|&other| other as u32 == id).unwrap_or(0);
                Drawn { id, logp: logps[at] }
            }
            None => {
                let logps = raw.f_select(0, row)?.f_sub(&raw_normaliser.f_select(0, row)?)?;
                let both = host::read(&Tensor::f_cat(&[&scores.f_select(0, row)?, &logps], 0)?)?;
                let (all, logps) = both.split_at(vocab as usize);
                let all = (0..).zip(all).map(|(id, &score)| Candidate { score, id }).collect();
                let id = cut.draw(all, true).unwrap_or_default();
                Drawn { id, logp: logps[id as usize] }
            }
        });
    }
    Ok(chosen)
}

/// Brings columns (`[rows, …]`, fp32) to the host in one piece, row after row.
/// fp32 holds every id below 2^24, and no vocabulary is larger.
fn download(columns: &[&Tensor]) -> Result<Vec<f32>, TchError> {
    host::read(&Tensor::f_cat(columns, -1)?)
}

fn finite(score: f32) -> Result<f32, SampleError> {
    if score.is_finite() { Ok(score) } else { Err(SampleError::NotFinite) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
