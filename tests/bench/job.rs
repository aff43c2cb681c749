//! What one run is told, and what it tells.

use std::collections::BTreeMap;
use std::path::PathBuf;

use drift_worker::train::{
    Algorithm, EngineSettings, LARGEST_PIECE, MicroBatch, Objective, OptimizerSettings,
    PreferenceLoss, ReduceKind, Sharding, TokenPair, TrainStep, TrainingSettings,
};
use serde::{Deserialize, Serialize};

use crate::mix::tokens;
use crate::options::{DType, EngineOptions};

/// One run of either side. `trl_dpo.py` reads the same file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) model: PathBuf,
    pub(crate) threads: usize,
    pub(crate) dtype: DType,
    pub(crate) pairs: Vec<Ids>,
    /// Pairs of one optimiser step.
    pub(crate) batch: usize,
    /// Steps that are not timed, on the first of the pairs.
    pub(crate) warm_up: usize,
    pub(crate) recipe: Recipe,
    /// TRL's second mode; ours has `engine.recompute`.
    pub(crate) gradient_checkpointing: bool,
    pub(crate) engine: EngineOptions,
}

/// A pair's token ids.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Ids {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
}

/// The published recipe, without its schedule.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Recipe {
    pub(crate) beta: f64,
    pub(crate) learning_rate: f64,
    pub(crate) max_grad_norm: f64,
    /// RMSprop's smoothing constant.
    pub(crate) alpha: f64,
    /// RMSprop's ε.
    pub(crate) epsilon: f64,
}

/// What a run of either side measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    /// Seconds from before the first timed step, its reference scoring included, to after
    /// the last.
    pub(crate) seconds: f64,
    /// Seconds of these before the steps: ours scores all timed pairs first. TRL
    /// scores within its steps.
    pub(crate) scoring_seconds: f64,
    /// Seconds of each timed step.
    pub(crate) step_seconds: Vec<f64>,
    /// Processor seconds outside the kernel, over all threads.
    pub(crate) user_seconds: f64,
    /// Processor seconds inside the kernel.
    pub(crate) system_seconds: f64,
    /// The process's largest resident memory, from its start on.
    pub(crate) peak_bytes: u64,
    /// Mean loss of each step, the warm-up's first.
    pub(crate) losses: Vec<f64>,
    /// Mean log-probability of the chosen replies in the same steps, in nats.
    pub(crate) logps_chosen: Vec<f64>,
    /// Of the libraries that the run used.
    pub(crate) versions: BTreeMap<String, String>,
}

impl Default for Recipe {
    fn default() -> Self {
        Self { beta: 0.1, learning_rate: 5e-7, max_grad_norm: 1.0, alpha: 0.99, epsilon: 1e-8 }
    }
}

impl Recipe {
    /// As our engine is told it, for a worker that is alone.
    pub(crate) fn settings(&self, engine: &EngineOptions) -> TrainingSettings {
        let Self { beta, max_grad_norm, alpha, epsilon, .. } = *self;
        TrainingSettings {
            objective: Objective { loss: PreferenceLoss::Sigmoid, beta, rpo_alpha: 0.0 },
            optimizer: OptimizerSettings {
                algorithm: Algorithm::RmsProp { alpha, epsilon },
                max_grad_norm,
            },
            engine: EngineSettings {
                recompute: engine.recompute.into(),
                sharding: Sharding::None,
                reduce: ReduceKind::Float,
                largest_piece: LARGEST_PIECE,
            },
        }
    }
}

impl From<&TokenPair> for Ids {
    fn from(pair: &TokenPair) -> Self {
        let TokenPair { prompt, chosen, rejected, .. } = pair.clone();
        Self { prompt, chosen, rejected }
    }
}

/// The job's pairs as our engine takes them, numbered from 0.
pub(crate) fn token_pairs(ids: &[Ids]) -> Vec<TokenPair> {
    let pair = |(pair, ids): (usize, &Ids)| {
        let Ids { prompt, chosen, rejected } = ids.clone();
        TokenPair { pair: pair as u64, prompt, chosen, rejected, reference: None }
    };
    ids.iter().enumerate().map(pair).collect()
}

/// One step on `pairs`, which are this rank's of `global_pairs`.
pub(crate) fn train_step(
    step: u64,
    learning_rate: f64,
    global_pairs: usize,
    micro_batches: Vec<MicroBatch>,
) -> TrainStep {
    TrainStep { step, learning_rate, global_pairs: global_pairs as u32, micro_batches }
}

/// Cuts pairs, in their order, into passes of at most `max_pairs` pairs and
/// `max_tokens` packed tokens; a pair that is heavier gets a pass of its own.
pub(crate) fn passes(pairs: &[TokenPair], max_pairs: usize, max_tokens: usize) -> Vec<MicroBatch> {
    let mut passes: Vec<MicroBatch> = Vec::new();
    let mut room = 0;
    for pair in pairs {
        let fits = |pass: &&mut MicroBatch| tokens(pair) <= room && pass.pairs.len() < max_pairs;
        match passes.last_mut().filter(fits) {
            Some(pass) => pass.pairs.push(pair.clone()),
            None => {
                passes.push(MicroBatch { pairs: vec![pair.clone()] });
                room = max_tokens;
            }
        }
        room = room.saturating_sub(tokens(pair));
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_keep_order_and_both_bounds() {
        let pair = |(pair, prompt): (usize, &usize)| TokenPair {
            pair: pair as u64,
            prompt: vec![1; *prompt],
            chosen: vec![1],
            rejected: vec![1],
            reference: None,
        };
        // Packed, 5, 3, 3, 12, 3 and 3 tokens.
        let pairs: Vec<_> = [3, 1, 1, 10, 1, 1].iter().enumerate().map(pair).collect();
        let ids = |max_pairs, max_tokens| -> Vec<Vec<u64>> {
            passes(&pairs, max_pairs, max_tokens)
                .iter()
                .map(|pass| pass.pairs.iter().map(|pair| pair.pair).collect())
                .collect()
        };
        assert_eq!(ids(6, 100), [[0, 1, 2, 3, 4, 5]]);
        assert_eq!(ids(4, 100), [vec![0, 1, 2, 3], vec![4, 5]]);
        assert_eq!(ids(6, 8), [vec![0, 1], vec![2], vec![3], vec![4, 5]]);
    }
}
