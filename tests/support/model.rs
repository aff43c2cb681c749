//! What a model computes, for comparison, and what the peers say of it.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use drift_worker::model::Decoder;
use drift_worker::sample::{Prompt, Sampled, Sampler, SamplingEngine, SamplingParams, Shard, Work};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// `[tokens, vocab]` in fp32, without a cache.
pub(crate) fn logits(model: &Decoder, ids: &Tensor) -> Tensor {
    let count = ids.size1().unwrap();
    let rotations = model.rotations(&Tensor::arange(count, (Kind::Int64, Device::Cpu))).unwrap();
    let mut h = model.embed(ids).unwrap();
    for block in &model.blocks {
        let sees = Tensor::ones([count, count], (Kind::Bool, Device::Cpu)).tril(0);
        // A query sees as many as its window has, itself included.
        let sees = block.window().map_or(sees.copy(), |window| sees.triu(1 - window));
        h = block
            .forward(&h, &rotations, &mut |q, k, v| {
                let batch = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
                let attended = Tensor::f_scaled_dot_product_attention(
                    &batch(q),
                    &batch(k),
                    &batch(v),
                    Some(&sees),
                    0.0,
                    false,
                    block.attention_scale(),
                    true,
                )?;
                Ok(attended.squeeze_dim(0).transpose(0, 1))
            })
            .unwrap();
    }
    model.final_norm(&h).unwrap().linear(model.head_weight(), None::<&Tensor>)
}

/// Replies by the sampling engine, and what they took.
pub(crate) struct Greedy {
    pub(crate) replies: Vec<Vec<u32>>,
    pub(crate) work: Work,
}

/// Greedy replies to `prompts`, in their order.
pub(crate) fn greedy(
    model: &Decoder,
    prompts: &[Vec<u32>],
    max_new_tokens: u32,
    stop_ids: &[u32],
    engine: SamplingEngine,
) -> Greedy {
    let params = SamplingParams {
        temperature: 0.0,
        max_new_tokens,
        stop_ids: stop_ids.to_vec(),
        ..SamplingParams::default()
    };
    let prompt = |(at, tokens): (usize, &Vec<u32>)| Prompt {
        prompt: at as u64,
        index: 0,
        tokens: tokens.clone(),
    };
    let prompts = prompts.iter().enumerate().map(prompt).collect();
    let shard = Shard { seed: 0, iteration: 0, params, engine, prompts };
    let mut sampler = Sampler::new(model).unwrap();
    let Sampled { samples, work } =
        sampler.sample(&shard, &mut |_| ControlFlow::Continue(())).unwrap();
    Greedy { replies: samples.into_iter().map(|sample| sample.tokens).collect(), work }
}

/// A safetensors file written by a reference script.
pub(crate) fn tensors(path: &Path) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

pub(crate) fn token_lists(value: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
