//! From logits to a token: penalties, temperature, top-k, top-p, min-p, inverse CDF.
//!
//! In this order, as in transformers.

use tch::{Device, Kind, TchError, Tensor};

use super::{SampleError, SamplingParams};

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
    // bf16 is widened before it is divided, as transformers does.
    let raw = logits.f_to_kind(Kind::Float)?;
    let raw_normaliser = raw.f_logsumexp([-1], true)?;
    let edited = edit(&raw, params, draws)?;
    let scores = edited.as_ref().unwrap_or(&raw);
    if params.temperature == 0.0 {
        return greedy(scores, &raw, &raw_normaliser);
    }
    let scores = scores.f_div_scalar(params.temperature)?;
    let normaliser = scores.f_logsumexp([-1], true)?;
    match logits.device() {
        Device::Cpu => on_cpu(&scores, &normaliser, &raw, &raw_normaliser, params, draws),
        _ => on_gpu(&scores, &normaliser, &raw, &raw_normaliser, params, draws),
    }
}

/// Scores with the repetition penalty, and without stop ids where none may be drawn yet;
/// none where nothing changes.
fn edit(
    raw: &Tensor,
    params: &SamplingParams,
    draws: &[Draw<'_>],
) -> Result<Option<Tensor>, TchError> {
    let early = |draw: &Draw<'_>| draw.position < params.min_new_tokens as usize;
    let penalised = params.repetition_penalty != 1.0;
    if !penalised && !draws.iter().any(early) {
        return Ok(None);
    }
    let scores = raw.f_empty_like()?;
    scores.shallow_clone().f_copy_(raw)?;
    let upload = |ids: &[i64]| Tensor::f_from_slice(ids)?.f_to_device(raw.device());
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
    scores: &Tensor,
    raw: &Tensor,
    raw_normaliser: &Tensor,
) -> Result<Vec<Drawn>, SampleError> {
    let ids = scores.f_argmax(-1, true)?;
    let best = raw.f_gather(-1, &ids, false)?;
    let packed = download(&[&best, raw_normaliser, &ids.f_to_kind(Kind::Float)?])?;
    let drawn = |row: &[f32]| Ok(Drawn { id: row[2] as u32, logp: finite(row[0])? - row[1] });
    packed.chunks_exact(3).map(drawn).collect()
}

/// Looks at all scores where they are.
fn on_cpu(
    scores: &Tensor,
    normaliser: &Tensor,
    raw: &Tensor,
    raw_normaliser: &Tensor,
    params: &SamplingParams,
    draws: &[Draw<'_>],
) -> Result<Vec<Drawn>, SampleError> {
    let vocab = scores.size2()?.1 as usize;
    let heads = download(&[&scores.f_amax([-1], true)?, normaliser])?;
    let scores: Vec<f32> = Vec::try_from(scores.f_reshape([-1])?)?;
    let rows = scores.chunks_exact(vocab).zip(heads.chunks_exact(2)).zip(draws);
    let choice = |((scores, head), draw): ((&[f32], &[f32]), &Draw<'_>)| {
        let (best, log_normaliser) = (head[0], f64::from(finite(head[1])?));
        let cut = Cut { params, log_normaliser, uniform: draw.uniform };
        let above = |floor: f32| -> Vec<Candidate> {
            let all = (0..).zip(scores).map(|(id, &score)| Candidate { score, id });
            all.filter(|candidate| candidate.score > floor).collect()
        };
        let found = DEPTHS.iter().find_map(|depth| cut.draw(above(best - depth), false));
        Ok(found.unwrap_or_else(|| cut.draw_of_all(above(f32::NEG_INFINITY))))
    };
    let ids = rows.map(choice).collect::<Result<Vec<u32>, SampleError>>()?;
    let index: Vec<i64> = ids.iter().copied().map(i64::from).collect();
    let logits = raw.f_gather(-1, &Tensor::f_from_slice(&index)?.f_unsqueeze(1)?, false)?;
    let logps = download(&[&logits.f_sub(raw_normaliser)?])?;
    Ok(ids.into_iter().zip(logps).map(|(id, logp)| Drawn { id, logp }).collect())
}

/// Brings the highest scores of each row to the host.
fn on_gpu(
    scores: &Tensor,
    normaliser: &Tensor,
    raw: &Tensor,
    raw_normaliser: &Tensor,
    params: &SamplingParams,
    draws: &[Draw<'_>],
) -> Result<Vec<Drawn>, SampleError> {
    let vocab = scores.size2()?.1;
    let k = vocab.min(CANDIDATES.max(i64::from(params.top_k) + 1));
    let (top, ids) = scores.f_topk(k, -1, true, true)?;
    let logits = raw.f_gather(-1, &ids, false)?.f_sub(raw_normaliser)?;
    let packed = download(&[normaliser, &top, &ids.f_to_kind(Kind::Float)?, &logits])?;
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
                let all: Vec<f32> = Vec::try_from(scores.f_select(0, row)?)?;
                let all = (0..).zip(&all).map(|(id, &score)| Candidate { score, id }).collect();
                let id = cut.draw_of_all(all);
                let logit = raw.f_double_value(&[row, i64::from(id)])?;
                Drawn { id, logp: (logit - raw_normaliser.f_double_value(&[row, 0])?) as f32 }
            }
        });
    }
    Ok(chosen)
}

/// Brings columns (`[rows, …]`, fp32) to the host in one piece, row after row.
/// fp32 holds every id below 2^24, and no vocabulary is larger.
fn download(columns: &[&Tensor]) -> Result<Vec<f32>, TchError> {
    Vec::try_from(Tensor::f_cat(columns, -1)?.f_reshape([-1])?)
}

fn finite(score: f32) -> Result<f32, SampleError> {
    if score.is_finite() { Ok(score) } else { Err(SampleError::NotFinite) }
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    /// Logit over temperature, fp32.
    score: f32,
    id: u32,
}

/// How one row is cut down and drawn from.
struct Cut<'a> {
    params: &'a SamplingParams,
    /// ln Σ exp(score) over the whole vocabulary.
    log_normaliser: f64,
    uniform: f64,
}

impl Cut<'_> {
    fn draw_of_all(&self, candidates: Vec<Candidate>) -> u32 {
        self.draw(candidates, true).unwrap_or_default()
    }

    /// Draws from what top-k, top-p and min-p leave, by inverse CDF from the most
    /// probable token down. Equal scores stand in order of their ids.
    ///
    /// `candidates` are all tokens whose score is above some bound. `None` if they do
    /// not settle it; never if they are `complete`.
    fn draw(&self, mut candidates: Vec<Candidate>, complete: bool) -> Option<u32> {
        candidates.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(a.id.cmp(&b.id)));
        let (kept, total) = self.keep(&candidates, complete)?;
        let target = self.uniform * total;
        let mut below = 0.0;
        for candidate in kept {
            below += self.mass(candidate);
            if target < below {
                return Some(candidate.id);
            }
        }
        // Rounding can leave the sum of all a hair under the target. Where nothing was cut
        // away, the rest of the mass may also be with those that are no candidates.
        let cut = kept.len() < candidates.len();
        kept.last().filter(|_| cut || complete).map(|candidate| candidate.id)
    }

    /// Those that are left, and their mass.
    fn keep<'a>(&self, sorted: &'a [Candidate], complete: bool) -> Option<(&'a [Candidate], f64)> {
        let SamplingParams { top_k, top_p, min_p, .. } = *self.params;
        let mut kept = sorted;
        let mut total = 1.0;
        if top_k > 0 {
            match sorted.get(top_k as usize - 1) {
                // Those that tie with the last one stay, as in transformers.
                Some(last) => kept = &sorted[..sorted.partition_point(|c| c.score >= last.score)],
                None if complete => {}
                None => return None,
            }
            total = kept.iter().map(|candidate| self.mass(candidate)).sum();
        }
        if top_p < 1.0 {
            let (mut sum, bound) = (0.0, top_p * total);
            let reached = kept.iter().position(|candidate| {
                sum += self.mass(candidate);
                sum >= bound
            });
            match reached {
                Some(last) => kept = &kept[..=last],
                None if complete || top_k > 0 => {}
                None => return None,
            }
            total = sum;
        }
        if min_p > 0.0 {
            let bound = sorted.first()?.score + min_p.ln() as f32;
            let all_kept = kept.len();
            kept = &kept[..kept.partition_point(|candidate| candidate.score >= bound)];
            if kept.len() == all_kept && all_kept == sorted.len() && !complete {
                return None;
            }
            total = kept.iter().map(|candidate| self.mass(candidate)).sum();
        }
        Some((kept, total))
    }

    fn mass(&self, candidate: &Candidate) -> f64 {
        (f64::from(candidate.score) - self.log_normaliser).exp()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
