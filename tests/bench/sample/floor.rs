//! The least time that a run can take, by what this machine's processor and memory do.

use drift_worker::model::{ModelConfig, product_kind};
use serde::Serialize;
use tch::Device;

use super::job::SampleJob;

/// The least time that the replies of a run can take on this machine.
#[derive(Debug, Serialize)]
pub(super) struct Floor {
    pub(super) seconds: f64,
    prompts_seconds: f64,
    decoding_seconds: f64,
    /// Operations per second on matrices.
    matrix_rate: f64,
    /// Bytes per second, read.
    bandwidth: f64,
}

impl Floor {
    /// What prompts begin with is computed once for all that begin so. All rows decode
    /// together from the first token on; every step reads all weights once, and every live
    /// row's keys and values.
    pub(super) fn of(
        config: &ModelConfig,
        job: &SampleJob,
        replies: &[usize],
        matrix_rate: f64,
        bandwidth: f64,
    ) -> Self {
        let kind = product_kind(job.dtype.kind(), Device::Cpu);
        let bytes = kind.elt_size_in_bytes() as f64;
        let query_width = (config.num_attention_heads * config.head_dim) as f64;
        let kv_width = (config.num_key_value_heads * config.head_dim) as f64;
        let (hidden, layers) = (config.hidden_size as f64, config.num_hidden_layers as f64);
        let block = hidden * (2.0 * query_width + 2.0 * kv_width)
            + 3.0 * hidden * config.intermediate_size as f64;
        let head = hidden * config.vocab_size as f64;
        let attended = 4.0 * query_width * layers;
        let prompt = |(tokens, had): (&Vec<u32>, usize)| {
            let triangle = |n: f64| n * (n + 1.0) / 2.0;
            let (n, had) = (tokens.len() as f64, had as f64);
            let attended = attended * (triangle(n) - triangle(had));
            2.0 * block * layers * (n - had) + attended + 2.0 * head
        };
        let prompts = job.prompts.iter().zip(had_before(&job.prompts));
        let prompts_seconds = prompts.map(prompt).sum::<f64>() / matrix_rate;
        let longest = replies.iter().copied().max().unwrap_or(0);
        // The first token of each reply comes with its prompt.
        let step = |at: usize| {
            let live = job.prompts.iter().zip(replies).filter(|(_, reply)| **reply > at);
            let contexts: Vec<f64> = live.map(|(prompt, _)| (prompt.len() + at) as f64).collect();
            let held: f64 = contexts.iter().sum();
            let operations =
                2.0 * (block * layers + head) * contexts.len() as f64 + attended * held;
            let read = bytes * (block * layers + head + 2.0 * kv_width * layers * held);
            (operations / matrix_rate).max(read / bandwidth)
        };
        let decoding_seconds = (1..longest).map(step).sum();
        let seconds = prompts_seconds + decoding_seconds;
        Self { seconds, prompts_seconds, decoding_seconds, matrix_rate, bandwidth }
    }
}

/// Of each prompt, the tokens with which one before it begins too; never its last.
fn had_before(prompts: &[Vec<u32>]) -> Vec<usize> {
    let common = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let had = |at: usize| {
        let before = prompts[..at].iter().map(|other| common(&prompts[at], other));
        before.max().unwrap_or(0).min(prompts[at].len() - 1)
    };
    (0..prompts.len()).map(had).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_prompts_begin_with_counts_once() {
        let prompts =
            [vec![1, 2, 3, 4], vec![1, 2, 9], vec![5], vec![1, 2, 3, 4], vec![1, 2, 9, 7]];
        assert_eq!(had_before(&prompts), [0, 2, 0, 3, 3]);
    }
}
