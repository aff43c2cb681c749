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

/// Mass by which sums over a vocabulary may be off: ours is an fp32 logarithm, transformers'
/// processors are asked in fp64.
const ROUNDING: f64 = 2e-6;

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
        let (mut edges, mut survived) = (Edges::default(), BTreeSet::new());
        for (at, params) in all_params.iter().enumerate() {
            let name = format!("{} {at}", set.name);
            let theirs = &tensors(&dir.path().join(format!("{name}.st")))["scores"];
            let ours = survivors(&set.rows, params, &contexts).unwrap();
            for (row, ours) in ours.iter().enumerate() {
                let theirs: Vec<f32> = Vec::try_from(theirs.get(row as i64)).unwrap();
                let theirs = left(&theirs);
                let what = format!("{name}, row {row}");
                if ours.len() != theirs.len() {
                    at_the_bound(set, row, params, [ours.len(), theirs.len()], &what);
                    edges.rounded += 1;
                }
                edges.tied += usize::from(compare(ours, &theirs, &what));
                survived.insert(ours.len());
            }
        }
        eprintln!(
            "{}: {} rows, {} to {} tokens survive; {edges:?}",
            set.name,
            PARAMS.len() * ROWS as usize,
            survived.first().unwrap(),
            survived.last().unwrap()
        );
    }
}

/// Rows whose survivors differ where nobody can say which are right.
#[derive(Debug, Default)]
struct Edges {
    /// Other tokens of equal probability: top-p keeps as many of those as it takes, which
    /// of them is for the sort to say.
    tied: usize,
    /// More tokens or fewer, where the mass ahead of them is top-p but for rounding.
    rounded: usize,
}

/// What scores leave, from the most probable down.
fn left(scores: &[f32]) -> Vec<Survivor> {
    let normaliser = scores.iter().map(|&score| f64::from(score).exp()).sum::<f64>();
    let finite = (0..).zip(scores).filter(|(_, score)| score.is_finite());
    let mut all: Vec<Survivor> = finite
        .map(|(id, &score)| Survivor { id, probability: f64::from(score).exp() / normaliser })
        .collect();
    all.sort_by(|a, b| b.probability.total_cmp(&a.probability).then(a.id.cmp(&b.id)));
    all
}

/// Checks that each of two numbers of survivors is right but for rounding: the mass of
/// those kept reaches top-p, and that of all but the last of them does not.
fn at_the_bound(set: &Logits, row: usize, params: &SamplingParams, counts: [usize; 2], what: &str) {
    let uncut = SamplingParams { top_p: 1.0, min_p: 0.0, ..params.clone() };
    let logits = set.rows.narrow(0, row as i64, 1);
    let all = survivors(&logits, &uncut, &[set.context(row)]).unwrap().swap_remove(0);
    let mass = |count: usize| all[..count].iter().map(|one| one.probability).sum::<f64>();
    for count in counts {
        let (before, kept) = (mass(count - 1), mass(count));
        assert!(
            before < params.top_p + ROUNDING && kept > params.top_p - ROUNDING,
            "{what}: {counts:?} survive; {count} have {kept}, one less {before}"
        );
    }
}

/// Compares as many as both sides have. True where other tokens survive, of equal
/// probability.
fn compare(ours: &[Survivor], theirs: &[Survivor], what: &str) -> bool {
    let common = ours.len().min(theirs.len());
    let (ours, theirs) = (&ours[..common], &theirs[..common]);
    for (one, other) in ours.iter().zip(theirs) {
        let difference = (one.probability - other.probability).abs();
        assert!(difference < PROBABILITY, "{what}: {one:?} instead of {other:?}");
    }
    let [our_ids, their_ids] =
        [ours, theirs].map(|all| all.iter().map(|one| one.id).collect::<BTreeSet<u32>>());
    for (all, others) in [(ours, &their_ids), (theirs, &our_ids)] {
        let least = all.last().unwrap().probability;
        for one in all.iter().filter(|one| !others.contains(&one.id)) {
            assert_eq!(one.probability, least, "{what}: {one:?} is on one side only");
        }
    }
    our_ids != their_ids
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
