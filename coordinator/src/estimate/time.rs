//! Seconds of each phase, at stated rates: for orders of magnitude, and for which phase
//! it is that takes the time.

use super::memory::{Keep, Work};
use super::shape::Shape;

/// What a worker's device does in a second, as far as programs get it.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Rates {
    /// Operations in matrix products, a multiplication and an addition counted as two.
    pub matrix: f64,
    /// Bytes read from its memory.
    pub memory: f64,
    /// Bytes that it exchanges with the others.
    pub link: f64,
}

impl Default for Rates {
    /// An H100 with NVLink: 45 % of 989 TFLOP/s in bf16, 75 % of 3.35 TB/s, and two
    /// thirds of 450 GB/s each way.
    fn default() -> Self {
        Self { matrix: 445e12, memory: 2.5e12, link: 300e9 }
    }
}

/// How much there is to do in an iteration.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Amounts {
    /// Pairs, each with a reply that is sampled.
    pub pairs: u64,
    /// Tokens of a pair's prompt.
    pub prompt: u64,
    /// Tokens of a sampling prompt.
    pub sampling_prompt: u64,
    /// Tokens of a reply.
    pub reply: u64,
    /// Pairs of a step, of all workers.
    pub batch: u64,
}

/// Seconds of an iteration's phases.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Times {
    /// Fresh replies.
    pub sampling: f64,
    /// Reference log-probabilities.
    pub scoring: f64,
    /// One epoch.
    pub training: f64,
    /// Steps of that epoch.
    pub steps: u64,
}

impl Times {
    /// Counts them.
    pub fn of(shape: &Shape, work: &Work, amounts: &Amounts, rates: &Rates) -> Self {
        let ranks = work.ranks as f64;
        let body = (shape.layers * shape.block_matrices()) as f64;
        let head = shape.table() as f64;
        let (pairs, reply) = (amounts.pairs as f64, amounts.reply as f64);
        let packed = amounts.prompt as f64 + 2.0 * reply;
        // The prompt is computed once; scores of queries with keys, and their values.
        let attended = packed * (amounts.prompt as f64 + reply) / 2.0;
        let attention = 4.0 * (shape.layers * shape.queries) as f64 * attended;
        let forward = 2.0 * (packed * body + 2.0 * reply * head) + attention;
        let scoring = pairs * forward / rates.matrix / ranks;
        // Backward is twice the forward; what is not kept is computed again.
        let again = match work.keep {
            Keep::All => 0.0,
            Keep::Budget(_) => 0.5,
            Keep::Inputs => 1.0,
        };
        let steps = amounts.pairs.div_ceil(amounts.batch.max(1));
        let parameters = shape.parameters() as f64;
        // Gradients in fp32 to their owners, weights back; half of it beside computing.
        let exchanged = parameters * (4.0 + work.weight as f64) * (ranks - 1.0) / ranks;
        let update = 24.0 * parameters / ranks / rates.memory;
        let per_step = 0.5 * exchanged / rates.link + update;
        let training = (3.0 + again) * scoring + steps as f64 * per_step;

        // A step of sampling reads all weights and every row's keys and values.
        let rows = (work.rows as f64).min(pairs / ranks).max(1.0);
        let length = amounts.sampling_prompt as f64 + reply / 2.0;
        let cached = rows * length * (shape.cached() * work.weight) as f64;
        let read = (body + head) * work.weight as f64 + cached;
        let computed = 2.0 * rows * (body + head);
        let step = (read / rates.memory).max(computed / rates.matrix);
        let prompts = pairs * 2.0 * amounts.sampling_prompt as f64 * body / rates.matrix / ranks;
        let sampling = pairs / ranks / rows * reply * step + prompts;
        Self { sampling, scoring, training, steps }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::memory::Place;
    use super::super::shape::tests::QWEN_14B;
    use super::*;
    use crate::config::Sharding;

    #[test]
    fn twice_the_pairs_take_twice_the_time_and_twice_the_gpus_half() {
        let shape = Shape::parse(QWEN_14B).unwrap();
        let times = |ranks, pairs| {
            let work = Work {
                ranks,
                place: Place::Gpu,
                weight: 2,
                moments: 1,
                sharding: Sharding::Zero2,
                keep: Keep::All,
                tokens: 16_384,
                responses: 8_192,
                cache: 8 << 30,
                rows: 64,
                row_tokens: 2_560,
            };
            let (prompt, reply) = (800, 400);
            let amounts =
                Amounts { pairs, prompt, sampling_prompt: 1_400, reply, batch: 4 * ranks };
            Times::of(&shape, &work, &amounts, &Rates::default())
        };
        let once = times(8, 4_096);
        let twice = times(8, 8_192);
        for (more, less) in [
            (twice.sampling, once.sampling),
            (twice.scoring, once.scoring),
            (twice.training, once.training),
            (once.scoring, times(16, 4_096).scoring),
        ] {
            assert!((more / less - 2.0).abs() < 1e-9, "{more} {less}");
        }
        assert_eq!((once.steps, twice.steps), (128, 256));
        // 2 operations a weight and token, 13.2 billion in the blocks: by hand.
        assert!((once.scoring - 4_096.0 * 1_600.0 * 2.0 * 13.2e9 / 8.0 / 445e12).abs() < 12.0);
        assert!(once.training > 3.0 * once.scoring);
    }
}
