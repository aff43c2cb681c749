//! Which tokens may be drawn, and how probably: as the processors of `generate` leave them.

use std::collections::BTreeSet;
use std::path::Path;

use drift_worker::model::Decoder;
use drift_worker::sample::{Context, SamplingParams, Survivor, survivors};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::SCRIPT;
use crate::support::model::{logits, tensors, text, token_lists};
use crate::support::{ask, data, demo_model};

const ROWS: i64 = 32;

/// Bound on |ours − theirs| in a token's probability.
const PROBABILITY: f64 = 1e-5;

/// Rows of logits, and the ids that each is behind.
struct Logits {
    name: &'static str,
    /// `[ROWS, vocab]`.
    rows: Tensor,
    ids: Vec<u32>,
}

impl Logits {
    /// Prompt and reply of a row: its reply has up to five tokens.
    fn context(&self, row: usize) -> Context<'_> {
        let ids = &self.ids[..self.ids.len() - ROWS as usize + row + 1];
        let (prompt, reply) = ids.split_at(ids.len() - row % 6);
        Context { prompt, reply }
    }
}

/// Temperature, top-k, top-p, min-p, repetition penalty, least tokens.
const PARAMS: [(f64, u32, f64, f64, f64, u32); 10] = [
    (0.7, 0, 0.9, 0.0, 1.0, 0),
    (1.0, 50, 1.0, 0.0, 1.0, 0),
    (1.0, 1, 1.0, 0.0, 1.0, 0),
    (0.8, 0, 1.0, 0.05, 1.0, 0),
    (1.3, 40, 0.95, 0.0, 1.0, 0),
    (0.6, 20, 0.8, 0.1, 1.0, 0),
    (0.7, 0, 0.9, 0.0, 1.3, 3),
    (1.0, 30, 0.9, 0.02, 0.7, 6),
    (1.5, 0, 0.999, 0.0, 1.1, 0),
    (1.0, 0, 0.01, 0.0, 1.0, 2),
];

#[test]
fn what_may_be_drawn_is_what_the_processors_of_transformers_leave() {
    let dir = tempfile::tempdir().unwrap();
    let sets = [real(dir.path()), random("peaked", 8.0), random("even", 2.0), random("flat", 0.3)];
    let named: Vec<(&str, &Tensor)> = sets.iter().map(|set| (set.name, &set.rows)).collect();
    Tensor::write_safetensors(&named, dir.path().join("logits.st")).unwrap();
    let all_params: Vec<SamplingParams> = PARAMS.into_iter().map(params).collect();
    let mut cases = Vec::new();
    for set in &sets {
        let contexts: Vec<_> = (0..ROWS as usize)
            .map(|row| set.context(row))
            .map(|context| json!({"prompt": context.prompt, "reply": context.reply}))
            .collect();
        for (at, params) in all_params.iter().enumerate() {
            cases.push(json!({
                "name": format!("{} {at}", set.name),
                "logits": set.name,
                "contexts": contexts,
                "params": {
                    "temperature": params.temperature, "top_k": params.top_k,
                    "top_p": params.top_p, "min_p": params.min_p,
                    "repetition_penalty": params.repetition_penalty,
                    "min_new_tokens": params.min_new_tokens, "stop_ids": params.stop_ids,
                },
            }));
        }
    }
    let question = dir.path().join("question.json");
    std::fs::write(&question, json!({ "cases": cases }).to_string()).unwrap();
    ask(SCRIPT, &["survivors", text(&question), text(dir.path())]);

    for set in &sets {
        let contexts: Vec<Context<'_>> = (0..ROWS as usize).map(|row| set.context(row)).collect();
        let (mut tied, mut survived) = (0, BTreeSet::new());
        for (at, params) in all_params.iter().enumerate() {
            let name = format!("{} {at}", set.name);
            let theirs = &tensors(&dir.path().join(format!("{name}.st")))["scores"];
            let ours = survivors(&set.rows, params, &contexts).unwrap();
            for (row, ours) in ours.iter().enumerate() {
                let theirs: Vec<f32> = Vec::try_from(theirs.get(row as i64)).unwrap();
                tied += usize::from(compare(ours, &theirs, &format!("{name}, row {row}")));
                survived.insert(ours.len());
            }
        }
        eprintln!(
            "{}: {} rows, {} to {} tokens survive; ties at the edge in {tied}",
            set.name,
            PARAMS.len() * ROWS as usize,
            survived.first().unwrap(),
            survived.last().unwrap()
        );
    }
}

/// Compares a row. True where other tokens survive, of equal probability: top-p keeps as
/// many of those as it takes, which of them is for the sort to say.
fn compare(ours: &[Survivor], scores: &[f32], what: &str) -> bool {
    let normaliser = scores.iter().map(|&score| f64::from(score).exp()).sum::<f64>();
    let probability = |id: u32| f64::from(scores[id as usize]).exp() / normaliser;
    let mut theirs: Vec<u32> =
        (0..).zip(scores).filter(|one| one.1.is_finite()).map(|one| one.0).collect();
    theirs.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    assert_eq!(ours.len(), theirs.len(), "{what}: {:?}", edge(ours, &theirs));
    for (one, &id) in ours.iter().zip(&theirs) {
        let (found, expected) = (one.probability, probability(id));
        let difference = (found - expected).abs();
        assert!(difference < PROBABILITY, "{what}, token {}: {found} is not {expected}", one.id);
    }
    let [our_ids, their_ids]: [BTreeSet<u32>; 2] =
        [ours.iter().map(|one| one.id).collect(), theirs.iter().copied().collect()];
    if our_ids == their_ids {
        return false;
    }
    let least = ours.last().unwrap().probability;
    for one in ours.iter().filter(|one| !their_ids.contains(&one.id)) {
        assert_eq!(one.probability, least, "{what}: token {} is left out there", one.id);
    }
    let last = scores[*theirs.last().unwrap() as usize];
    for &id in their_ids.difference(&our_ids) {
        assert_eq!(scores[id as usize], last, "{what}: token {id} is left out here");
    }
    true
}

/// The last tokens on each side, for messages.
fn edge(ours: &[Survivor], theirs: &[u32]) -> ([usize; 2], Vec<Survivor>, Vec<u32>) {
    let last = |length: usize| length.saturating_sub(3);
    let counts = [ours.len(), theirs.len()];
    (counts, ours[last(ours.len())..].to_vec(), theirs[last(theirs.len())..].to_vec())
}

fn params(
    (temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens): (
        f64,
        u32,
        f64,
        f64,
        f64,
        u32,
    ),
) -> SamplingParams {
    let stop_ids = vec![2, 7];
    SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        min_new_tokens,
        stop_ids,
        ..SamplingParams::default()
    }
}

/// The demo model's, over the end of a real prompt.
fn real(dir: &Path) -> Logits {
    let demo = demo_model();
    let asked = ask(SCRIPT, &["prompts", text(&demo), text(&data("dsat_data.jsonl")), text(dir)]);
    let ids = token_lists(&asked["prompts"]).swap_remove(41);
    let model = Decoder::load(&demo, Kind::Float, Device::Cpu).unwrap();
    let tensor: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let all = logits(&model, &Tensor::from_slice(&tensor));
    let rows = all.narrow(0, ids.len() as i64 - ROWS, ROWS).contiguous();
    Logits { name: "real", rows, ids }
}

/// Normal ones, rounded to bf16 and so with ties.
fn random(name: &'static str, spread: f64) -> Logits {
    tch::manual_seed(20_253);
    let rows = Tensor::randn([ROWS, 5000], (Kind::Float, Device::Cpu)) * spread;
    let rows = rows.to_kind(Kind::BFloat16).to_kind(Kind::Float);
    Logits { name, rows, ids: (0..60).map(|at| at * at % 5000).collect() }
}
