use std::collections::HashMap;

use tch::Device;

use super::*;
use crate::host::count::{self, Crossings};
use crate::sample::Uniforms;

fn params(temperature: f64, top_p: f64) -> SamplingParams {
    SamplingParams { temperature, top_p, ..SamplingParams::default() }
}

/// Ids that `uniforms` choose.
fn chosen(logits: &Tensor, params: &SamplingParams, uniforms: &[f64]) -> Vec<u32> {
    let drawn = choose(logits, params, &draws(uniforms)).unwrap();
    drawn.into_iter().map(|drawn| drawn.id).collect()
}

fn draws(uniforms: &[f64]) -> Vec<Draw<'static>> {
    let draw = |&uniform| Draw { uniform, position: 0, seen: [&[], &[], &[]] };
    uniforms.iter().map(draw).collect()
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
            let uniforms: Vec<f64> = (0..40).map(|row| Uniforms::new(1, 2, row, 0).at(3)).collect();
            let ours = chosen(&logits, &params(temperature, top_p), &uniforms);
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
        let ours = chosen(&logits, &params(1.0, top_p), &[u]);
        assert_eq!(ours[0], naive(&logits.get(0), 1.0, top_p, u), "top-p {top_p}, u {u}");
    }
    // Without top-p the end is where the vocabulary's sum rounds to 1:
    // some token of the last millionth.
    let last = chosen(&logits, &params(1.0, 1.0), &[below_one])[0];
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
            let id = chosen(&logits, &params(1.0, top_p), &[u])[0];
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
    // 0.5 + 0.3 reaches 0.75: two tokens stay, in proportion.
    close(count(0.75), [0.625, 0.375, 0.0, 0.0]);
    close(count(0.4), [1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn greedy_takes_the_highest_logit() {
    let logits = Tensor::from_slice2(&[[0.0_f32, 3.0, 1.0], [5.0, -1.0, 4.0]]);
    assert_eq!(chosen(&logits, &params(0.0, 1.0), &[0.9, 0.9]), [1, 0]);
}

#[test]
fn numbers_that_are_none_are_an_error() {
    let logits = Tensor::from_slice2(&[[0.0_f32, f32::NAN, 1.0]]);
    for temperature in [0.0, 1.0] {
        let error = choose(&logits, &params(temperature, 0.9), &draws(&[0.5])).unwrap_err();
        assert!(matches!(error, SampleError::NotFinite), "{error}");
    }
}

/// top-k, top-p and min-p by their definitions, as transformers applies them one after
/// another: the probabilities that are left, by id.
fn left(logits: &Tensor, params: &SamplingParams) -> Vec<f64> {
    let scores = logits.to_kind(Kind::Float) / params.temperature;
    let mut p: Vec<f64> = Vec::try_from(scores.softmax(-1, Kind::Double).view(-1)).unwrap();
    let sorted = |p: &[f64]| {
        let mut sorted = p.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted
    };
    let keep = |p: &mut Vec<f64>, bound: f64| {
        p.iter_mut().filter(|p| **p < bound).for_each(|p| *p = 0.0);
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
    };
    if params.top_k > 0 {
        let bound = sorted(&p)[params.top_k as usize - 1];
        keep(&mut p, bound);
    }
    let mut sum = 0.0;
    let reached = sorted(&p).into_iter().find(|p| {
        sum += p;
        sum >= params.top_p
    });
    keep(&mut p, reached.unwrap_or(0.0));
    let bound = sorted(&p)[0] * params.min_p;
    keep(&mut p, bound);
    p
}

#[test]
fn draws_follow_what_every_cut_leaves() {
    const DRAWS: usize = 200_000;
    // Other tests want the other cores.
    tch::set_num_threads(1);
    // Without ties, which the definition above would keep together.
    tch::manual_seed(11);
    let logits = Tensor::randn([1, 200], (Kind::Float, Device::Cpu)) * 1.5;
    for (temperature, top_k, top_p, min_p) in [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 0.9, 0.0),
        (1.0, 20, 1.0, 0.0),
        (1.3, 100, 0.8, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.8, 50, 0.95, 0.02),
    ] {
        let params =
            SamplingParams { temperature, top_k, top_p, min_p, ..SamplingParams::default() };
        let expected = left(&logits, &params);
        let rows = logits.expand([500, 200], false);
        let mut counts = vec![0_u32; 200];
        for part in 0..DRAWS as u32 / 500 {
            let uniform = |at| Uniforms::new(5, 0, u64::from(part), 0).at(at);
            let uniforms: Vec<f64> = (0..500).map(uniform).collect();
            let ids = chosen(&rows, &params, &uniforms);
            ids.iter().for_each(|&id| counts[id as usize] += 1);
            if part < 10 {
                // The other device's way, on this one.
                let draws = draws(&uniforms);
                count::take();
                let drawn = on_gpu(&rows, &params, &draws);
                // All of 200 tokens are candidates.
                assert_eq!(count::take(), Crossings { reads: 1, uploads: 0 });
                let theirs: Vec<u32> = drawn.unwrap().iter().map(|drawn| drawn.id).collect();
                assert_eq!(ids, theirs);
            }
        }
        // Pearson's statistic, over tokens expected often enough; the rest together.
        let (mut statistic, mut cells, mut rest) = (0.0, 0, [0.0, 0.0]);
        for (&count, p) in counts.iter().zip(&expected) {
            let mean = p * DRAWS as f64;
            if mean == 0.0 {
                assert_eq!(count, 0, "a token that was cut away was drawn");
            } else if mean < 10.0 {
                rest = [rest[0] + f64::from(count), rest[1] + mean];
            } else {
                statistic += (f64::from(count) - mean).powi(2) / mean;
                cells += 1;
            }
        }
        if rest[1] > 0.0 {
            statistic += (rest[0] - rest[1]).powi(2) / rest[1];
            cells += 1;
        }
        // Its 99.9 % point (Wilson and Hilferty 1931).
        let freedom = f64::from(cells - 1);
        let spread = 2.0 / (9.0 * freedom);
        let bound = freedom * (1.0 - spread + 3.0902 * spread.sqrt()).powi(3);
        assert!(cells > 5 && statistic < bound, "{params:?}: {statistic} of {bound}");
    }
}

#[test]
fn a_row_that_its_candidates_do_not_settle_is_read_once_more() {
    // The second row is flat: the highest 256 of 1,000 hold a quarter of it.
    let steep = Tensor::arange(1000, (Kind::Float, Device::Cpu)) * 0.1;
    let rows = Tensor::stack(&[steep, Tensor::zeros([1000], (Kind::Float, Device::Cpu))], 0);
    let params = params(0.8, 0.9);
    let uniforms = [0.5, 0.5];
    let expected = choose(&rows, &params, &draws(&uniforms)).unwrap();
    count::take();
    let drawn = on_gpu(&rows, &params, &draws(&uniforms)).unwrap();
    assert_eq!(count::take(), Crossings { reads: 2, uploads: 0 });
    for (drawn, expected) in drawn.iter().zip(&expected) {
        assert_eq!(drawn.id, expected.id);
        assert!((drawn.logp - expected.logp).abs() < 1e-5, "{drawn:?} is not {expected:?}");
    }
}
