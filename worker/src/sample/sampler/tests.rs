use std::collections::HashSet;
use std::path::Path;

use tch::{Device, Kind};

use super::*;
use crate::host::count::{self, Crossings};
use crate::model::ModelConfig;
use crate::sample::{Finish, SamplingEngine};

const CONFIG: &str = r#"{
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 300, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8
}"#;

/// Blocks with a window of 90 tokens and without in turn, and head norms.
const WINDOWED: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 300, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": true, "sliding_window": 90,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]
}"#;

fn model() -> Decoder {
    random(CONFIG)
}

fn random(config: &str) -> Decoder {
    // Other tests want the other cores, and threads that share one wait for each other.
    tch::set_num_threads(1);
    Decoder::random(ModelConfig::parse(config, Path::new("config.json")).unwrap(), 3)
}

/// Prompts of `lengths`, of other tokens each.
fn shard(lengths: &[usize], temperature: f64, stop_ids: &[u32]) -> Shard {
    let token = |prompt: usize, at: usize| (prompt * 131 + at * 71 + at * at * 7) as u32 % 300;
    let prompt = |(i, &length): (usize, &usize)| Prompt {
        prompt: 1000 + i as u64,
        index: 0,
        tokens: (0..length).map(|at| token(i, at)).collect(),
    };
    let params = SamplingParams {
        temperature,
        top_p: 0.95,
        max_new_tokens: 24,
        stop_ids: stop_ids.to_vec(),
        ..SamplingParams::default()
    };
    let prompts = lengths.iter().enumerate().map(prompt).collect();
    let engine = SamplingEngine { least_shared: 256, ..SamplingEngine::default() };
    Shard { seed: 42, iteration: 1, params, engine, prompts }
}

fn sampled(model: &Decoder, shard: &Shard) -> Sampled {
    let mut sampler = Sampler::new(model).unwrap();
    sampler.sample(shard, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn sample(model: &Decoder, shard: &Shard) -> Vec<Sample> {
    sampled(model, shard).samples
}

fn tokens(samples: &[Sample]) -> Vec<Vec<u32>> {
    samples.iter().map(|sample| sample.tokens.clone()).collect()
}

/// Greedy continuation without a cache: the whole sequence anew for each token.
fn recomputed(model: &Decoder, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..tokens {
        ids.push(logits(model, &ids).argmax(-1, false).int64_value(&[]) as u32);
    }
    ids.split_off(prompt.len())
}

/// Logits of what follows `ids`, `[vocab]`.
fn logits(model: &Decoder, ids: &[u32]) -> Tensor {
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu));
    let rotations = model.rotations(&positions).unwrap();
    let mut h = model.embed(&Tensor::from_slice(&ids)).unwrap();
    for block in &model.blocks {
        let mut attend = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let (n, heads, head_dim) = q.size3()?;
            let repeat = |x: &Tensor| x.repeat_interleave_self_int(heads / 2, 1, None);
            let (k, v) = (repeat(k), repeat(v));
            let scores = q.transpose(0, 1).matmul(&k.permute([1, 2, 0])) / (head_dim as f64).sqrt();
            let ones = Tensor::ones([n, n], (Kind::Bool, Device::Cpu));
            let past = ones.tril(-block.window().unwrap_or(n));
            let hidden = ones.triu(1).logical_or(&past);
            let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, None);
            Ok(weights.matmul(&v.transpose(0, 1)).transpose(0, 1))
        };
        h = block.forward(&h, &rotations, &mut attend).unwrap();
    }
    model.final_norm(&h).unwrap().get(-1).matmul(&model.head_weight().tr())
}

#[test]
fn the_cache_changes_nothing() {
    for config in [CONFIG, WINDOWED] {
        let model = random(config);
        // Chunks end inside prompts, at their ends, and hold several.
        let lengths = [3, 509, 1, 1100, 60, 80];
        let shard = shard(&lengths, 0.0, &[]);
        for (sample, prompt) in sample(&model, &shard).iter().zip(&shard.prompts) {
            assert_eq!(sample.prompt, prompt.prompt);
            assert_eq!(sample.finish, Finish::Length);
            let expected = recomputed(&model, &prompt.tokens, 24);
            assert_eq!(sample.tokens, expected, "prompt of {} tokens", prompt.tokens.len());
            // A reply that repeats one token would be right by accident.
            assert!(expected.iter().collect::<HashSet<_>>().len() > 5, "{expected:?}");
        }
    }
}

#[test]
fn rows_that_finish_leave_the_others_alone() {
    let model = model();
    for temperature in [0.0, 0.8] {
        let lengths = [40, 7, 23, 90, 12, 31, 64, 5];
        let free = sample(&model, &shard(&lengths, temperature, &[]));
        // Tokens of three replies stop them, and whoever else meets them.
        let stop_ids = [free[1].tokens[3], free[3].tokens[9], free[6].tokens[15]];
        let together = shard(&lengths, temperature, &stop_ids);
        let samples = sample(&model, &together);

        let ended: Vec<_> = samples.iter().filter(|s| s.finish == Finish::Stop).collect();
        assert!(ended.len() >= 3 && ended.len() < lengths.len(), "{samples:?}");
        for ((at, sample), free) in samples.iter().enumerate().zip(&free) {
            let length = sample.tokens.len();
            assert_eq!(sample.tokens, free.tokens[..length], "row {at}");
            let stopped = stop_ids.contains(sample.tokens.last().unwrap());
            assert_eq!(sample.finish == Finish::Stop, stopped, "row {at}");
            assert!(stopped || length == 24, "row {at}");

            let mut alone = together.clone();
            alone.prompts = vec![together.prompts[at].clone()];
            assert_eq!(self::sample(&model, &alone)[0].tokens, sample.tokens, "row {at} alone");
        }
    }
}

#[test]
fn the_same_shard_gives_the_same_tokens_and_another_key_others() {
    let model = model();
    let base = shard(&[20, 30], 1.0, &[]);
    let tokens = |shard: &Shard| tokens(&sample(&model, shard));
    let first = tokens(&base);
    assert_eq!(tokens(&base), first);
    assert_ne!(first[0], first[1]);

    assert_ne!(tokens(&Shard { seed: 43, ..base.clone() }), first);
    assert_ne!(tokens(&Shard { iteration: 2, ..base.clone() }), first);
    let mut other = base.clone();
    other.prompts[0].index = 1;
    let other = tokens(&other);
    assert_ne!(other[0], first[0]);
    assert_eq!(other[1], first[1]);
}

#[test]
fn a_stop_is_seen_within_a_step() {
    let model = model();
    let mut shard = shard(&[600, 600], 0.0, &[]);
    shard.engine.drafting = false;
    // The first prompt ends in the second step, which draws, and the other in the third.
    let mut seen = Vec::new();
    let samples = sample_shard(&model, &shard, &mut |progress| {
        seen.push(progress);
        ControlFlow::Continue(())
    });
    samples.unwrap();
    assert_eq!(seen.len(), 2 + 24);
    assert_eq!(seen[0], Progress { tokens: 0, finished: 0 });
    assert_eq!(seen[1], Progress { tokens: 1, finished: 0 });
    assert_eq!(seen[2], Progress { tokens: 3, finished: 0 });
    assert_eq!(seen[24], Progress { tokens: 47, finished: 1 });
    assert_eq!(seen[25], Progress { tokens: 48, finished: 2 });

    for stop_at in [1, 2, 5] {
        let mut calls = 0;
        let error = sample_shard(&model, &shard, &mut |_| {
            calls += 1;
            if calls == stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(error.unwrap_err(), SampleError::Stopped));
        assert_eq!(calls, stop_at);
    }
}

#[test]
fn a_shard_that_makes_no_sense_is_refused() {
    let model = model();
    let refused = |edit: fn(&mut Shard)| {
        let mut shard = shard(&[4], 1.0, &[]);
        edit(&mut shard);
        sample_shard(&model, &shard, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string()
    };
    assert!(refused(|s| s.params.temperature = -1.0).contains("temperature is -1"));
    assert!(refused(|s| s.params.temperature = f64::NAN).contains("temperature is NaN"));
    assert!(refused(|s| s.params.top_p = 0.0).contains("top_p is 0"));
    assert!(refused(|s| s.params.min_p = 1.5).contains("min_p is 1.5"));
    assert!(refused(|s| s.params.repetition_penalty = 0.0).contains("repetition_penalty is 0"));
    assert!(refused(|s| s.params.top_p = 1.1).contains("top_p is 1.1"));
    assert!(refused(|s| s.params.max_new_tokens = 0).contains("max_new_tokens is 0"));
    assert!(refused(|s| s.prompts[0].tokens.clear()).contains("prompt 1000 has no tokens"));
    let outside = refused(|s| s.prompts[0].tokens[2] = 300);
    assert!(outside.contains("token 300, but the model's vocabulary has 300"), "{outside}");

    let mut empty = shard(&[4], 1.0, &[]);
    empty.prompts.clear();
    assert_eq!(sample(&model, &empty), []);
}

#[test]
fn few_slots_and_a_small_cache_change_nothing() {
    let model = model();
    let whole = shard(&[40, 7, 700, 90, 12, 31, 64, 5], 0.8, &[3, 50, 120, 250]);
    let expected = tokens(&sample(&model, &whole));
    for max_rows in [1, 3, 5] {
        let engine = SamplingEngine { max_rows, ..whole.engine };
        assert_eq!(tokens(&sample(&model, &Shard { engine, ..whole.clone() })), expected);
    }
    // Room for two rows of 700 + 23 tokens, which are 12 pages each.
    let bytes = bytes_per_token(&model.config, Kind::Float) as u64;
    let engine = SamplingEngine { cache_bytes: 1600 * bytes, ..whole.engine };
    assert_eq!(tokens(&sample(&model, &Shard { engine, ..whole.clone() })), expected);
    // None for a single one: it is computed all the same.
    let engine = SamplingEngine { cache_bytes: 1, ..whole.engine };
    assert_eq!(tokens(&sample(&model, &Shard { engine, ..whole.clone() })), expected);
}

#[test]
fn guesses_change_no_token_and_save_steps() {
    let model = model();
    for (temperature, stop_ids) in [(0.0, vec![]), (0.8, vec![]), (0.8, vec![3, 50, 120, 250])] {
        let mut shard = shard(&[40, 700], temperature, &stop_ids);
        // A small random model's greedy replies run in circles; these do, both of them.
        shard.params.max_new_tokens = 100;
        let guessed = sampled(&model, &shard);
        shard.engine.drafting = false;
        let plain = sampled(&model, &shard);
        assert_eq!(tokens(&guessed.samples), tokens(&plain.samples));
        assert_eq!(plain.work.guessed, 0);
        if temperature == 0.0 {
            assert!(guessed.work.guessed_right > 20, "{:?}", guessed.work);
            assert!(guessed.work.steps < plain.work.steps, "{:?}", guessed.work);
        }
    }
}

#[test]
fn shared_beginnings_are_computed_once_and_change_nothing() {
    let mut shard = shard(&[1000, 700, 900, 800, 5], 0.8, &[]);
    // 400 tokens of all but the last, 300 more of two of them; the second ends right behind
    // these, so that a window reaches back into them.
    let (first, rest) = shard.prompts.split_at_mut(1);
    for prompt in &mut rest[..3] {
        prompt.tokens[..400].copy_from_slice(&first[0].tokens[..400]);
    }
    rest[1].tokens[..700].copy_from_slice(&first[0].tokens[..700]);
    rest[1].tokens.truncate(704);
    for model in [CONFIG, WINDOWED].map(random) {
        let together = sampled(&model, &shard);
        assert_eq!(together.work.prefilled, 1000 + 300 + 4 + 400 + 5);
        for (at, sample) in together.samples.iter().enumerate() {
            let prompts = vec![shard.prompts[at].clone()];
            let alone = self::sample(&model, &Shard { prompts, ..shard.clone() });
            assert_eq!(alone[0].tokens, sample.tokens, "prompt {at}");
        }
        // Two cut what they share differently by the size of a chunk; few slots, another order.
        let few = SamplingEngine { max_rows: 2, ..shard.engine };
        let again = sample(&model, &Shard { engine: few, ..shard.clone() });
        assert_eq!(tokens(&again), tokens(&together.samples));
    }
}

/// Beginnings that are not worth a stretch of their own.
#[test]
fn rows_copy_what_they_begin_alike_with() {
    let mut shard = shard(&[100, 80, 600, 60, 90, 5], 0.8, &[]);
    let (first, rest) = shard.prompts.split_at_mut(1);
    for prompt in &mut rest[..2] {
        prompt.tokens[..40].copy_from_slice(&first[0].tokens[..40]);
    }
    // The third takes two steps, and the fourth is how it begins.
    rest[2].tokens = rest[1].tokens[..550].to_vec();
    // One token too few.
    rest[3].tokens[..15].copy_from_slice(&first[0].tokens[..15]);
    shard.engine.least_shared = usize::MAX;
    for model in [CONFIG, WINDOWED].map(random) {
        let together = sampled(&model, &shard);
        let work = together.work;
        assert_eq!(work.prefilled, 100 + (80 - 40) + (600 - 40) + 1 + 90 + 5, "{work:?}");
        for (at, sample) in together.samples.iter().enumerate() {
            let prompts = vec![shard.prompts[at].clone()];
            let alone = self::sample(&model, &Shard { prompts, ..shard.clone() });
            assert_eq!(alone[0].tokens, sample.tokens, "prompt {at}");
        }
        // Alone in the cache a row has nobody to copy from.
        let engine = SamplingEngine { max_rows: 1, ..shard.engine };
        let few = sampled(&model, &Shard { engine, ..shard.clone() });
        assert_eq!(tokens(&few.samples), tokens(&together.samples));
        assert_eq!(few.work.prefilled, 100 + 80 + 600 + 550 + 90 + 5);
    }
}

#[test]
fn many_samples_of_a_prompt_cost_one() {
    let model = model();
    let mut shard = shard(&[1000], 1.0, &[]);
    let prompt = shard.prompts.remove(0);
    shard.prompts = (0..128).map(|index| Prompt { index, ..prompt.clone() }).collect();
    shard.engine.max_rows = 128;
    let mut sampler = Sampler::new(&model).unwrap();
    let together = sampler.sample(&shard, &mut |_| ControlFlow::Continue(())).unwrap();
    // All but its last token once, and that for each.
    assert_eq!(together.work.prefilled, 999 + 128);
    // One page for each: the last token of its prompt, and 23 of its reply.
    assert_eq!(sampler.cache.held(), 999 + 128 * PAGE as i64);
    assert!(tokens(&together.samples).iter().collect::<HashSet<_>>().len() > 100);
    for at in [0, 77, 127] {
        let prompts = vec![shard.prompts[at].clone()];
        let alone = sample(&model, &Shard { prompts, ..shard.clone() });
        assert_eq!(alone[0].tokens, together.samples[at].tokens, "sample {at}");
    }
}

#[test]
fn log_probabilities_are_the_models_own() {
    let model = model();
    let mut shard = shard(&[30], 0.6, &[]);
    (shard.params.top_k, shard.params.min_p) = (40, 0.01);
    let sample = &sample(&model, &shard)[0];
    assert_eq!(sample.logps.len(), sample.tokens.len());
    // Greedy after any prefix of the reply says what the model thinks of the next token.
    let whole = [shard.prompts[0].tokens.as_slice(), &sample.tokens].concat();
    for at in [0, 5, 23] {
        let logits = logits(&model, &whole[..30 + at]);
        let expected =
            logits.log_softmax(-1, Kind::Double).double_value(&[sample.tokens[at] as i64]);
        let found = f64::from(sample.logps[at]);
        assert!((found - expected).abs() < 1e-4, "token {at}: {found} is not {expected}");
    }
}

#[test]
fn an_end_can_be_put_off_and_repetition_punished() {
    let model = model();
    let mut shard = shard(&[40, 7, 23, 90], 0.8, &[]);
    shard.params.stop_ids = (0..150).collect();
    assert!(tokens(&sample(&model, &shard)).iter().any(|reply| reply.len() < 6));
    shard.params.min_new_tokens = 6;
    for reply in tokens(&sample(&model, &shard)) {
        assert!(reply.len() > 6 || reply.len() == 6 && reply[5] < 150, "{reply:?}");
        assert!(reply[..reply.len() - 1].iter().all(|&id| id >= 150), "{reply:?}");
    }
    let mut circles = self::shard(&[40, 7], 0.0, &[]);
    circles.params.max_new_tokens = 60;
    let distinct = |shard: &Shard| -> Vec<usize> {
        let replies = tokens(&sample(&model, shard));
        replies.iter().map(|reply| reply.iter().collect::<HashSet<_>>().len()).collect()
    };
    assert!(distinct(&circles).iter().all(|&n| n < 60));
    circles.params.repetition_penalty = 1e4;
    assert_eq!(distinct(&circles), [60, 60], "no token twice");
}

/// A stop anywhere leaves the sampler as good as new, and nothing behind.
#[test]
fn aborted_shards_leave_nothing_behind() {
    let model = model();
    let shard = shard(&[60, 30, 9], 0.8, &[]);
    let mut sampler = Sampler::new(&model).unwrap();
    let mut free = |_: Progress| ControlFlow::Continue(());
    let expected = sampler.sample(&shard, &mut free).unwrap().samples;
    let mut held = Vec::new();
    for round in 0..1000 {
        let mut left = round % 8;
        let stopped = sampler.sample(&shard, &mut |_| {
            left -= 1;
            if left < 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(SampleError::Stopped)));
        if round % 500 == 499 {
            held.push(resident_bytes());
        }
    }
    assert_eq!(sampler.sample(&shard, &mut free).unwrap().samples, expected);
    // Two pages for each: the longest has 60 + 23 tokens.
    assert_eq!(sampler.cache.held(), 3 * 2 * PAGE as i64);
    assert!(held[1] - held[0] < 8 << 20, "500 aborted shards left {} bytes", held[1] - held[0]);
}

fn resident_bytes() -> i64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<i64>().unwrap() * 4096
}

/// The table of `host.rs`. Greedy choice is a GPU's too.
#[test]
fn a_decode_step_reads_no_more_than_it_must() {
    let model = model();
    for (temperature, reads, uploads) in [(0.0, 1, 4), (0.9, 3, 5)] {
        // As long as each other: no padding to hide.
        let mut shard = shard(&[40; 5], temperature, &[]);
        shard.engine.drafting = false;
        let mut steps = Vec::new();
        count::take();
        let sampled = sample_shard(&model, &shard, &mut |_| {
            steps.push(count::take());
            ControlFlow::Continue(())
        });
        assert_eq!(sampled.unwrap().len(), 5);
        // The first step says which of the prompts' states are wanted, the others where the rows
        // are that decode.
        assert_eq!(steps, [Crossings { reads, uploads }; 24]);

        // Rows behind a beginning that they share, with guesses, one read in two steps.
        shard = self::shard(&[700, 40, 300, 9], temperature, &[]);
        shard
            .prompts
            .iter_mut()
            .for_each(|prompt| prompt.tokens.splice(0..0, 0..90).for_each(drop));
        let sampled = sample_shard(&model, &shard, &mut |_| {
            let Crossings { reads: more, uploads } = count::take();
            assert!(more == 0 || more == reads, "{more} reads");
            assert!(uploads <= 5 + 1 + 1 + 1 + 1, "{uploads} uploads");
            ControlFlow::Continue(())
        });
        assert!(sampled.is_ok());
    }
}
