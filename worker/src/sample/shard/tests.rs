use std::collections::HashSet;
use std::path::Path;

use tch::Device;

use super::*;
use crate::model::ModelConfig;

const CONFIG: &str = r#"{
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 300, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8
}"#;

fn model() -> Decoder {
    Decoder::random(ModelConfig::parse(CONFIG, Path::new("config.json")).unwrap(), 3)
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
    };
    let prompts = lengths.iter().enumerate().map(prompt).collect();
    Shard { seed: 42, iteration: 1, params, prompts }
}

fn sample(model: &Decoder, shard: &Shard) -> Vec<Sample> {
    sample_shard(model, shard, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// Greedy continuation without a cache: the whole sequence anew for each token.
fn recomputed(model: &Decoder, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut ids: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
    for _ in 0..tokens {
        let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu));
        let rotary = model.rotary(&positions).unwrap();
        let mut h = model.embed(&Tensor::from_slice(&ids)).unwrap();
        for block in &model.blocks {
            let mut attend = |q: &Tensor, k: &Tensor, v: &Tensor| {
                let (n, heads, head_dim) = q.size3()?;
                let repeat = |x: &Tensor| x.repeat_interleave_self_int(heads / 2, 1, None);
                let (k, v) = (repeat(k), repeat(v));
                let scores =
                    q.transpose(0, 1).matmul(&k.permute([1, 2, 0])) / (head_dim as f64).sqrt();
                let future = Tensor::ones([n, n], (Kind::Bool, Device::Cpu)).triu(1);
                let weights = scores.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, None);
                Ok(weights.matmul(&v.transpose(0, 1)).transpose(0, 1))
            };
            h = block.forward(&h, &rotary, &mut attend).unwrap();
        }
        let logits = model.final_norm(&h).unwrap().get(-1).matmul(&model.head_weight().tr());
        ids.push(logits.argmax(-1, false).int64_value(&[]));
    }
    ids[prompt.len()..].iter().map(|&id| id as u32).collect()
}

#[test]
fn the_cache_changes_nothing() {
    let model = model();
    // Chunks end inside prompts, at their ends, and hold several.
    let lengths = [3, 509, 1, 1100, 60];
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
            assert_eq!(&self::sample(&model, &alone)[0], sample, "row {at} alone");
        }
    }
}

#[test]
fn the_same_shard_gives_the_same_tokens_and_another_key_others() {
    let model = model();
    let base = shard(&[20, 30], 1.0, &[]);
    let tokens = |shard: &Shard| -> Vec<_> {
        sample(&model, shard).into_iter().map(|sample| sample.tokens).collect()
    };
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
    let shard = shard(&[600, 600], 0.0, &[]);
    // 1,200 tokens are three chunks of prefill; 24 tokens follow.
    let mut seen = Vec::new();
    let samples = sample_shard(&model, &shard, &mut |progress| {
        seen.push(progress);
        ControlFlow::Continue(())
    });
    samples.unwrap();
    assert_eq!(seen.len(), 3 + 24);
    assert_eq!(seen[2], Progress { tokens: 0, finished: 0 });
    assert_eq!(seen[3], Progress { tokens: 2, finished: 0 });
    assert_eq!(seen[26], Progress { tokens: 48, finished: 2 });

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
    assert!(refused(|s| s.params.top_p = 1.1).contains("top_p is 1.1"));
    assert!(refused(|s| s.params.max_new_tokens = 0).contains("max_new_tokens is 0"));
    assert!(refused(|s| s.prompts[0].tokens.clear()).contains("prompt 1000 has no tokens"));
    let outside = refused(|s| s.prompts[0].tokens[2] = 300);
    assert!(outside.contains("token 300, but the model's vocabulary has 300"), "{outside}");

    let mut empty = shard(&[4], 1.0, &[]);
    empty.prompts.clear();
    assert_eq!(sample(&model, &empty), []);
}
