//! Sampling chooses as `transformers` does, live: greedy tokens, what may be drawn, and
//! the hidden states that embeddings are made of.

mod survivors;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::Path;

use drift_worker::model::Decoder;
use drift_worker::sample::{Sampler, SamplingEngine, Work};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::support::model::{Greedy, greedy, tensors, text, token_lists};
use crate::support::{ask, data, demo_model};

const SCRIPT: &str = "sample_reference.py";
const NEW_TOKENS: u32 = 128;

/// Logits this close have no order in fp32: which of two such tokens comes first is
/// rounding's to say.
const TIE: f64 = 1e-4;

/// Of the tokens of all replies, as many at most may be such ties.
const TIES: f64 = 1e-3;

/// Bound on |ours − theirs| in an embedding's elements.
const EMBEDDING: f64 = 1e-4;

/// A way to go about sampling, which must change no token.
struct Way {
    name: &'static str,
    /// As many of the last prompts.
    prompts: usize,
    /// In which order: every so many; odd, as their number is even.
    stride: usize,
    engine: SamplingEngine,
}

impl Way {
    /// All prompts at once, and `some` of them in other batches and orders: with few slots,
    /// so that prompts are admitted, and cut into chunks, as others end; with guesses and
    /// without; with shared beginnings and in a cache that has no room for them.
    fn all(some: usize) -> [Self; 4] {
        // So few that these prompts do share.
        let engine = SamplingEngine { least_shared: 256, ..SamplingEngine::default() };
        [
            Self { name: "all together", prompts: usize::MAX, stride: 1, engine },
            Self {
                name: "three rows, guesses",
                prompts: some,
                stride: 5,
                engine: SamplingEngine { max_rows: 3, ..engine },
            },
            Self {
                name: "two rows, no guesses",
                prompts: some,
                stride: 3,
                engine: SamplingEngine { max_rows: 2, drafting: false, ..engine },
            },
            Self {
                name: "one after another, nothing shared",
                prompts: some,
                stride: 1,
                engine: SamplingEngine { cache_bytes: 1, ..engine },
            },
        ]
    }

    /// The replies, each with its prompt's place in `prompts`.
    fn replies(
        &self,
        model: &Decoder,
        prompts: &[Vec<u32>],
        stop_ids: &[u32],
    ) -> (Vec<(usize, Vec<u32>)>, Work) {
        let count = self.prompts.min(prompts.len());
        let order: Vec<usize> =
            (0..count).map(|at| prompts.len() - count + at * self.stride % count).collect();
        let chosen: Vec<Vec<u32>> = order.iter().map(|&at| prompts[at].clone()).collect();
        let Greedy { replies, work } = greedy(model, &chosen, NEW_TOKENS, stop_ids, self.engine);
        let tokens: u64 = chosen.iter().map(|prompt| prompt.len() as u64).sum();
        // Or the way is not the one that its name says.
        let shares = self.engine.cache_bytes > 1;
        assert_eq!(work.prefilled < tokens, shares, "{}: {work:?}", self.name);
        assert!(work.guessed == 0 || self.engine.drafting, "{}: {work:?}", self.name);
        (order.into_iter().zip(replies).collect(), work)
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let (demo, dir) = (demo_model(), tempfile::tempdir().unwrap());
    let (corpus, dir) = (data("dsat_data.jsonl"), dir.path());
    let asked = ask(SCRIPT, &["prompts", text(&demo), text(&corpus), text(dir)]);
    let prompts = token_lists(&asked["prompts"]);
    let stop_ids: Vec<u32> = serde_json::from_value(asked["stop_ids"].clone()).unwrap();
    assert_eq!(prompts.len(), 64);
    assert!(prompts[62].len() > 512, "no prompt is longer than a step reads of them");

    let models: Vec<String> = serde_json::from_value(asked["models"].clone()).unwrap();
    for name in models {
        greedy_as_in_transformers(&dir.join(name), &prompts, &stop_ids, [16, 8]);
    }
    greedy_as_in_transformers(&demo, &prompts, &stop_ids, [4, 2]);
}

/// In every way, `some` prompts in those that take long; `generate` writes a few replies.
fn greedy_as_in_transformers(
    model_dir: &Path,
    prompts: &[Vec<u32>],
    stop_ids: &[u32],
    [some, generate]: [usize; 2],
) {
    let name = model_dir.file_name().unwrap().to_str().unwrap();
    let model = Decoder::load(model_dir, Kind::Float, Device::Cpu).unwrap();
    let mut replies: BTreeMap<usize, BTreeSet<Vec<u32>>> = BTreeMap::new();
    let mut guessed_right = 0;
    for way in Way::all(some) {
        let began = std::time::Instant::now();
        let (sampled, work) = way.replies(&model, prompts, stop_ids);
        for (prompt, reply) in sampled {
            ends_in_time(&reply, stop_ids);
            replies.entry(prompt).or_default().insert(reply);
        }
        guessed_right += work.guessed_right;
        eprintln!("{name}, {}: {:.0} s, {work:?}", way.name, began.elapsed().as_secs_f64());
    }
    // A random model may never say the same twice.
    assert!(guessed_right > 0 || model_dir != demo_model(), "{name}: no guess was right");
    assert_eq!(replies.len(), 64);

    let listed: Vec<(usize, &Vec<u32>)> =
        replies.iter().flat_map(|(&at, all)| all.iter().map(move |reply| (at, reply))).collect();
    let tokens: usize = listed.iter().map(|(_, reply)| reply.len()).sum();
    let question = json!({
        "model": model_dir, "prompts": prompts, "stop_ids": stop_ids, "replies": listed,
        "generate": generate, "max_new_tokens": NEW_TOKENS,
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), question.to_string()).unwrap();
    let reply = ask(SCRIPT, &["greedy", text(file.path())]);

    let differences = reply["differences"].as_array().unwrap();
    let ties = differences.iter().filter(|one| one["gap"].as_f64().unwrap() < TIE).count();
    assert_eq!(ties, differences.len(), "{name}: not the most probable tokens: {differences:?}");
    assert!(ties as f64 <= TIES * tokens as f64, "{name}: {ties} ties of {tokens} tokens");
    // Without ties one reply to a prompt, whatever the way.
    let more = listed.len() - replies.len();
    assert!(more == 0 || ties > 0, "{name}: {more} replies differ by the way they were sampled");
    let generated = token_lists(&reply["generated"]);
    assert_eq!(generated.len(), generate);
    for (at, generated) in generated.iter().enumerate() {
        let tied = |one: &Value| one["prompt"].as_u64() == Some(at as u64);
        assert!(
            replies[&at].contains(generated) || differences.iter().any(tied),
            "{name}, prompt {at}: {:?} instead of {generated:?}",
            replies[&at]
        );
    }
    eprintln!("{name}: {tokens} tokens of {} replies, {ties} ties", listed.len());
}

/// A reply ends with the first id that ends one, or with its last possible token.
fn ends_in_time(reply: &[u32], stop_ids: &[u32]) {
    let end = reply.iter().position(|id| stop_ids.contains(id)).map(|at| at + 1);
    assert_eq!(reply.len(), end.unwrap_or(NEW_TOKENS as usize), "{reply:?}");
}

#[test]
fn embeddings_are_the_last_hidden_states_of_transformers() {
    let (demo, dir) = (demo_model(), tempfile::tempdir().unwrap());
    let corpus = data("dsat_data.jsonl");
    let asked = ask(SCRIPT, &["prompts", text(&demo), text(&corpus), text(dir.path())]);
    let mut prompts: Vec<Vec<u32>> = token_lists(&asked["prompts"]).split_off(52);
    prompts.push(vec![1]);
    let names: Vec<String> = serde_json::from_value(asked["models"].clone()).unwrap();
    let mut models: BTreeMap<String, _> =
        names.into_iter().map(|name| (name.clone(), dir.path().join(name))).collect();
    models.insert("demo".to_owned(), demo);
    let embedder = asked["embedder"].as_str().unwrap();
    models.insert(embedder.to_owned(), dir.path().join(embedder));

    let (question, out) = (dir.path().join("question.json"), dir.path().join("embeddings.st"));
    let content = json!({"models": &models, "prompts": &prompts});
    std::fs::write(&question, content.to_string()).unwrap();
    ask(SCRIPT, &["embeddings", text(&question), text(&out)]);
    let references = tensors(&out);
    for (name, model_dir) in models {
        let model = Decoder::load(&model_dir, Kind::Float, Device::Cpu).unwrap();
        let sampler = Sampler::new(&model).unwrap();
        let ours = sampler.embed(&prompts, &mut |_| ControlFlow::Continue(())).unwrap();
        let ours: Vec<Tensor> = ours.iter().map(|one| Tensor::from_slice(one)).collect();
        let difference = (Tensor::stack(&ours, 0) - &references[&name]).abs().max();
        let difference = difference.double_value(&[]);
        eprintln!("{name}: embeddings within {difference:.1e} (bound {EMBEDDING:.0e})");
        assert!(difference < EMBEDDING, "{name}: embeddings differ by {difference:e}");
    }
}
