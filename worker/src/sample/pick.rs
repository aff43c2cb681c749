//! From logits to a token: temperature, top-p, inverse CDF.

use tch::{Kind, TchError, Tensor};

use super::{SampleError, SamplingParams};

/// Candidates looked at first. Sorting a whole vocabulary costs more than the
/// step of a small model that made its logits; with top-p 0.9 the tokens that
/// matter are among these but for a few rows in a thousand.
const CANDIDATES: i64 = 256;

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    /// Logit over temperature, fp32.
    score: f32,
    id: u32,
}

/// Chooses one token per row of `logits` (`[rows, vocab]`, any float kind).
///
/// `uniforms` holds one number in [0, 1) per row; greedy choice (temperature
/// 0) uses none. One transfer from the device, and one more for each row whose
/// leading candidates do not decide.
pub(super) fn choose(
    logits: &Tensor,
    params: &SamplingParams,
    uniforms: &[f64],
) -> Result<Vec<u32>, SampleError> {
    // bf16 is widened before it is divided, as transformers does.
    let scores = logits.f_to_kind(Kind::Float)?;
    if params.temperature == 0.0 {
        return greedy(&scores);
    }
    let scores = scores.f_div_scalar(params.temperature)?;
    let (rows, vocab) = scores.size2()?;
    let k = vocab.min(CANDIDATES);
    let (top, ids) = scores.f_topk(k, -1, true, true)?;
    let normaliser = scores.f_logsumexp([-1], true)?;
    let packed = download(&[&normaliser, &top, &ids.f_to_kind(Kind::Float)?])?;

    let k = k as usize;
    let mut chosen = Vec::with_capacity(uniforms.len());
    for (row, (packed, &u)) in (0..rows).zip(packed.chunks_exact(1 + 2 * k).zip(uniforms)) {
        let draw = Draw { top_p: params.top_p, log_normaliser: finite(packed[0])?, u };
        let (top, ids) = packed[1..].split_at(k);
        let leading = top.iter().zip(ids).map(|(&score, &id)| Candidate { score, id: id as u32 });
        let id = match draw.among(&mut leading.collect::<Vec<_>>(), k as i64 == vocab) {
            Some(id) => id,
            None => draw.among_all(&Vec::try_from(scores.f_select(0, row)?)?),
        };
        chosen.push(id);
    }
    Ok(chosen)
}

fn greedy(scores: &Tensor) -> Result<Vec<u32>, SampleError> {
    let ids = scores.f_argmax(-1, true)?;
    let best = scores.f_gather(-1, &ids, false)?;
    let packed = download(&[&best, &ids.f_to_kind(Kind::Float)?])?;
    packed.chunks_exact(2).map(|row| finite(row[0]).map(|_| row[1] as u32)).collect()
}

/// Brings columns (`[rows, …]`, fp32) to the host in one piece, row after row.
/// fp32 holds every id below 2^24, and no vocabulary is larger.
fn download(columns: &[&Tensor]) -> Result<Vec<f32>, TchError> {
    Vec::try_from(Tensor::f_cat(columns, -1)?.f_reshape([-1])?)
}

fn finite(score: f32) -> Result<f64, SampleError> {
    if score.is_finite() { Ok(f64::from(score)) } else { Err(SampleError::NotFinite) }
}

/// How one row is drawn.
struct Draw {
    top_p: f64,
    /// ln Σ exp(score) over the whole vocabulary.
    log_normaliser: f64,
    /// Uniform in [0, 1).
    u: f64,
}

impl Draw {
    /// Draws with the whole vocabulary's `scores` in view.
    fn among_all(&self, scores: &[f32]) -> u32 {
        let all = (0..).zip(scores).map(|(id, &score)| Candidate { score, id });
        self.among(&mut all.collect::<Vec<_>>(), true).unwrap_or_default()
    }

    /// Draws from the smallest set of most probable tokens whose mass reaches
    /// `top_p` (at least one token; all where `top_p` is 1), by inverse CDF
    /// from the most probable down. Equal scores stand in order of their ids.
    ///
    /// `None` if `candidates`, the highest scores of the vocabulary, do not
    /// settle it; never if they are `complete`.
    fn among(&self, candidates: &mut [Candidate], complete: bool) -> Option<u32> {
        candidates.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(a.id.cmp(&b.id)));
        // Tokens outside may tie with the last candidate and stand before it.
        let settled = match candidates.last() {
            Some(last) if !complete => candidates.partition_point(|c| c.score > last.score),
            _ => candidates.len(),
        };
        let candidates = &candidates[..settled];
        let mass = |c: &Candidate| (f64::from(c.score) - self.log_normaliser).exp();

        let mut kept = candidates.len();
        let mut total = 1.0;
        if self.top_p < 1.0 {
            let mut sum = 0.0;
            let reached = candidates.iter().position(|candidate| {
                sum += mass(candidate);
                sum >= self.top_p
            });
            match reached {
                Some(last) => kept = last + 1,
                None if complete => {}
                None => return None,
            }
            total = sum;
        }

        let target = self.u * total;
        let mut below = 0.0;
        for candidate in &candidates[..kept] {
            below += mass(candidate);
            if target < below {
                return Some(candidate.id);
            }
        }
        // Rounding can leave the sum of all a hair under the target.
        let nothing_left = complete || self.top_p < 1.0;
        candidates[..kept].last().filter(|_| nothing_left).map(|candidate| candidate.id)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashMap;

    use tch::Device;

    use super::*;
    use crate::sample::Uniforms;

    fn params(temperature: f64, top_p: f64) -> SamplingParams {
        SamplingParams { temperature, top_p, max_new_tokens: 1, stop_ids: vec![] }
    }

    /// `[rows, vocab]` with ties: rounded to bf16, as a model's logits are.
    fn random_logits(rows: i64, vocab: i64, spread: f64) -> Tensor {
        tch::manual_seed(7);
        (Tensor::randn([rows, vocab], (Kind::Float, Device::Cpu)) * spread).to_kind(Kind::BFloat16)
    }

    /// The definition, word for word, over a full sort in f64.
    fn naive(logits: &Tensor, temperature: f64, top_p: f64, u: f64) -> u32 {
        let logits: Vec<f32> = Vec::try_from(logits.to_kind(Kind::Float)).unwrap();
        let scores: Vec<f64> =
            logits.iter().map(|&logit| f64::from(logit / temperature as f32)).collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let norm: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        let mut tokens: Vec<(f64, usize)> =
            scores.iter().enumerate().map(|(id, score)| ((score - max).exp() / norm, id)).collect();
        tokens.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut kept = Vec::new();
        let mut mass = 0.0;
        for token in tokens {
            if mass >= top_p {
                break;
            }
            mass += token.0;
            kept.push(token);
        }
        let mut below = 0.0;
        for (probability, id) in &kept {
            below += probability;
            if u * mass < below {
                return *id as u32;
            }
        }
        kept.last().unwrap().1 as u32
    }

    #[test]
    fn choice_equals_a_full_sort() {
        // From peaked rows, where one token is all, to flat ones, where 256
        // candidates hold a small part of the mass.
        for spread in [0.1, 1.0, 3.0, 10.0] {
            let logits = random_logits(40, 5000, spread);
            for (temperature, top_p) in [(0.7, 0.9), (1.0, 1.0), (1.5, 0.99), (0.3, 0.05)] {
                let uniforms: Vec<f64> =
                    (0..40).map(|row| Uniforms::new(1, 2, row, 0).at(3)).collect();
                let ours = choose(&logits, &params(temperature, top_p), &uniforms).unwrap();
                for (row, (id, &u)) in ours.iter().zip(&uniforms).enumerate() {
                    let expected = naive(&logits.get(row as i64), temperature, top_p, u);
                    assert_eq!(*id, expected, "spread {spread}, top-p {top_p}, row {row}");
                }
            }
        }
    }

    #[test]
    fn ends_of_the_unit_interval_stay_inside_the_kept_set() {
        let logits = random_logits(1, 5000, 2.0);
        let below_one = 1.0 - f64::EPSILON / 2.0;
        for (top_p, u) in [(0.5, 0.0), (0.5, below_one), (0.9, 0.0), (0.9, below_one), (1.0, 0.0)] {
            let ours = choose(&logits, &params(1.0, top_p), &[u]).unwrap();
            assert_eq!(ours[0], naive(&logits.get(0), 1.0, top_p, u), "top-p {top_p}, u {u}");
        }
        // Without top-p the end is where the vocabulary's sum rounds to 1:
        // some token of the last millionth.
        let last = choose(&logits, &params(1.0, 1.0), &[below_one]).unwrap()[0];
        let probabilities = logits.get(0).softmax(-1, Kind::Double);
        let rarer = probabilities.le_tensor(&probabilities.get(i64::from(last)));
        assert!((probabilities * rarer).sum(Kind::Double).double_value(&[]) < 1e-6);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let weights = [0.5, 0.3, 0.15, 0.05];
        let logits = Tensor::from_slice(&weights.map(f64::ln)).unsqueeze(0);
        let draws = 20_000;
        let count = |top_p| {
            let mut counts = HashMap::new();
            for position in 0..draws {
                let u = Uniforms::new(3, 0, 0, 0).at(position);
                let id = choose(&logits, &params(1.0, top_p), &[u]).unwrap()[0];
                *counts.entry(id).or_insert(0) += 1;
            }
            (0..4).map(|id| f64::from(*counts.get(&id).unwrap_or(&0)) / f64::from(draws)).collect()
        };
        let close = |found: Vec<f64>, expected: [f64; 4]| {
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 0.02, "{found} is not {expected}");
            }
        };
        close(count(1.0), weights);
        // 0.5 + 0.3 reaches 0.8: two tokens stay, in proportion.
        close(count(0.8), [0.625, 0.375, 0.0, 0.0]);
        close(count(0.4), [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn greedy_takes_the_highest_logit() {
        let logits = Tensor::from_slice2(&[[0.0_f32, 3.0, 1.0], [5.0, -1.0, 4.0]]);
        assert_eq!(choose(&logits, &params(0.0, 1.0), &[0.9, 0.9]).unwrap(), [1, 0]);
    }

    #[test]
    fn numbers_that_are_none_are_an_error() {
        let logits = Tensor::from_slice2(&[[0.0_f32, f32::NAN, 1.0]]);
        for temperature in [0.0, 1.0] {
            let error = choose(&logits, &params(temperature, 0.9), &[0.5]).unwrap_err();
            assert!(matches!(error, SampleError::NotFinite), "{error}");
        }
    }
}
