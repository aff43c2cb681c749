//! The floor: operations that must be done, over the rate at which this machine
//! multiplies matrices.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use drift_worker::model::{ModelConfig, product_kind};
use drift_worker::train::TokenPair;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::mix::{responses, tokens};
use crate::options::DType;

/// Each product is timed this often; the fastest counts.
const REPEATS: usize = 7;

/// The head is computed in chunks of rows, in any engine that has memory to spare
/// for other things.
const HEAD_ROWS: usize = 1024;

/// Operations of one DPO iteration on some pairs: a multiplication and an addition
/// count as two.
///
/// Of each pair x, y⁺ and y⁻ are computed once: forward for the reference, and
/// forward and backward for the step, where backward takes twice what forward does.
/// Logits are computed of response tokens only. Whatever an engine computes again,
/// pads, or does element by element is not counted.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Operations {
    /// The blocks' weight matrices.
    pub(crate) blocks: f64,
    /// Scores and weighted sums of attention.
    pub(crate) attention: f64,
    /// The head.
    pub(crate) head: f64,
}

/// What a rate is measured for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RateJob {
    pub(crate) model: PathBuf,
    pub(crate) threads: usize,
    pub(crate) dtype: DType,
    /// Packed tokens of one pass.
    pub(crate) tokens: usize,
    /// Response tokens of one pass.
    pub(crate) rows: usize,
}

/// Operations per second on matrices of a run's kind; of fp32 for bf16 where the processor
/// has no instructions for it, and an engine does best to widen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Rate {
    /// Over the model's own products, mixed as an iteration mixes them.
    pub(crate) model_shapes: f64,
    /// Of two square matrices of 2,048.
    pub(crate) square_2048: f64,
    /// Each of the model's products by itself.
    pub(crate) products: Vec<ProductRate>,
}

/// One weight matrix, met in one pass.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProductRate {
    pub(crate) name: String,
    pub(crate) rows: i64,
    pub(crate) inputs: i64,
    pub(crate) outputs: i64,
    /// x · Wᵀ
    pub(crate) forward: f64,
    /// g · W
    pub(crate) by_input: f64,
    /// gᵀ · x
    pub(crate) by_weight: f64,
}

/// A weight matrix, `[outputs, inputs]`, and how often a pass meets it.
struct Product {
    name: &'static str,
    rows: usize,
    inputs: i64,
    outputs: i64,
    count: f64,
}

impl Operations {
    pub(crate) fn of(config: &ModelConfig, pairs: &[TokenPair]) -> Self {
        // Reference forward, policy forward, and backward for two.
        const FORWARDS: f64 = 4.0;
        let all: usize = pairs.iter().map(tokens).sum();
        let rows: usize = pairs.iter().map(responses).sum();
        let block: i64 = block_products(config, 0).iter().map(|p| p.inputs * p.outputs).sum();
        let layers = config.num_hidden_layers as f64;
        let visible: f64 = pairs.iter().map(visible_keys).sum();
        let query_width = (config.num_attention_heads * config.head_dim) as f64;
        Self {
            blocks: FORWARDS * 2.0 * block as f64 * layers * all as f64,
            attention: FORWARDS * 4.0 * query_width * layers * visible,
            head: FORWARDS * 2.0 * (config.hidden_size * config.vocab_size) as f64 * rows as f64,
        }
    }

    pub(crate) fn total(&self) -> f64 {
        self.blocks + self.attention + self.head
    }
}

/// Keys that the queries of a pair see, added up: `[x, y⁺]` causally, and y⁻ after x.
fn visible_keys(pair: &TokenPair) -> f64 {
    let triangle = |n: usize| (n * (n + 1) / 2) as f64;
    let [prompt, chosen, rejected] = [&pair.prompt, &pair.chosen, &pair.rejected].map(Vec::len);
    triangle(prompt + chosen) + (prompt * rejected) as f64 + triangle(rejected)
}

/// The weight matrices of one block.
fn block_products(config: &ModelConfig, rows: usize) -> [Product; 4] {
    let ModelConfig { hidden_size, intermediate_size, head_dim, .. } = *config;
    let queries = config.num_attention_heads * head_dim;
    let keys_and_values = 2 * config.num_key_value_heads * head_dim;
    let count = config.num_hidden_layers as f64;
    let product = |name, inputs, outputs| Product { name, rows, inputs, outputs, count };
    [
        product("queries, keys, values", hidden_size, queries + keys_and_values),
        product("attention's output", queries, hidden_size),
        product("gate, up", hidden_size, 2 * intermediate_size),
        product("down", intermediate_size, hidden_size),
    ]
}

/// Measures this machine, in a process of its own.
pub(crate) fn measure(job: &RateJob) -> Result<Rate> {
    tch::set_num_threads(job.threads as i32);
    let config = ModelConfig::read(&job.model)?;
    let kind = product_kind(job.dtype.kind(), Device::Cpu);
    let mut products = Vec::from(block_products(&config, job.tokens));
    let head_rows = job.rows.min(HEAD_ROWS);
    products.push(Product {
        name: "head",
        rows: head_rows,
        inputs: config.hidden_size,
        outputs: config.vocab_size,
        count: job.rows as f64 / head_rows as f64,
    });
    let (mut rates, mut operations, mut seconds) = (Vec::new(), 0.0, 0.0);
    for product in products {
        let once = 2.0 * product.rows as f64 * (product.inputs * product.outputs) as f64;
        let [forward, by_input, by_weight] = product.seconds(kind);
        operations += product.count * 4.0 * once;
        // Forward twice, once for the reference.
        seconds += product.count * (2.0 * forward + by_input + by_weight);
        rates.push(ProductRate {
            name: product.name.to_owned(),
            rows: product.rows as i64,
            inputs: product.inputs,
            outputs: product.outputs,
            forward: once / forward,
            by_input: once / by_input,
            by_weight: once / by_weight,
        });
    }
    let square = random(2048, 2048, kind);
    let square_seconds = fastest(|| square.matmul(&square));
    Ok(Rate {
        model_shapes: operations / seconds,
        square_2048: 2.0 * 2048f64.powi(3) / square_seconds,
        products: rates,
    })
}

impl Product {
    /// Seconds of the forward product, and of those for the gradients by input and weight.
    fn seconds(&self, kind: Kind) -> [f64; 3] {
        let rows = self.rows as i64;
        let x = random(rows, self.inputs, kind);
        let weight = random(self.outputs, self.inputs, kind);
        let gradient = random(rows, self.outputs, kind);
        [
            fastest(|| x.matmul(&weight.tr())),
            fastest(|| gradient.matmul(&weight)),
            fastest(|| gradient.tr().matmul(&x)),
        ]
    }
}

fn random(rows: i64, columns: i64, kind: Kind) -> Tensor {
    Tensor::randn([rows, columns], (kind, Device::Cpu))
}

fn fastest(product: impl Fn() -> Tensor) -> f64 {
    // Not timed: it makes libtorch choose and compile its kernel.
    drop(black_box(product()));
    let once = |_| {
        let start = Instant::now();
        let result = black_box(product());
        let seconds = start.elapsed().as_secs_f64();
        drop(result);
        seconds
    };
    (0..REPEATS).map(once).fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_those_counted_by_hand() {
        let text = r#"{
            "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 4,
            "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 64
        }"#;
        let config = ModelConfig::parse(text, "config.json".as_ref()).unwrap();
        let pair = TokenPair {
            pair: 0,
            prompt: vec![1, 2],
            chosen: vec![3, 4, 5],
            rejected: vec![6],
            reference: None,
        };
        let operations = Operations::of(&config, &[pair.clone(), pair]);
        // Per block 4 × 8 + 4 × 4 + 4 × 16 + 8 × 4 = 144 weights, 6 tokens a pair.
        assert_eq!(operations.blocks, 2.0 * (4.0 * 2.0 * 144.0 * 2.0 * 6.0));
        // x and y⁺ see 1 + 2 + 3 + 4 + 5 keys, y⁻ sees 3.
        assert_eq!(operations.attention, 2.0 * (4.0 * 4.0 * 4.0 * 2.0 * 18.0));
        assert_eq!(operations.head, 2.0 * (4.0 * 2.0 * 40.0 * 4.0));
    }
}
