//! Sampling replies from the current policy, with a KV cache, by host-drawn uniforms.
//!
//! [`sample_shard`] is a pure function of weights and shard (and of libtorch,
//! its threads and the device): no clock, no order of arrival, no generator
//! with a state. Each token takes one number of a counter-based stream
//! ([`Uniforms`]) and turns it into an id by inverse CDF.

mod cache;
mod pick;
mod shard;
mod uniforms;

use tch::TchError;

pub use shard::sample_shard;
pub use uniforms::Uniforms;

/// Prompts that one worker samples together.
#[derive(Debug, Clone, PartialEq)]
pub struct Shard {
    /// The run's seed.
    pub seed: u64,
    /// DRIFT's iteration; part of every uniform's key.
    pub iteration: u32,
    /// How tokens are chosen, and when a reply ends.
    pub params: SamplingParams,
    /// What is answered.
    pub prompts: Vec<Prompt>,
}

/// How tokens are chosen, and when a reply ends.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by this; 0 takes the most probable token always.
    pub temperature: f64,
    /// Mass of the most probable tokens that are drawn from, in (0, 1].
    pub top_p: f64,
    /// Tokens a reply has at most; from 1.
    pub max_new_tokens: u32,
    /// Ids that end a reply.
    pub stop_ids: Vec<u32>,
}

/// A prompt, and which of its samples is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The prompt's id; part of every uniform's key.
    pub prompt: u64,
    /// Which of several samples of that prompt, from 0; part of the key too.
    pub index: u32,
    /// Token ids, not empty, with the opening of an assistant turn at their end.
    pub tokens: Vec<u32>,
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The prompt it answers.
    pub prompt: u64,
    /// Which of its samples.
    pub index: u32,
    /// Drawn ids, a final stop id included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop id was drawn.
    Stop,
    /// `max_new_tokens` were drawn.
    Length,
}

/// How far a shard has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Tokens drawn.
    pub tokens: u64,
    /// Replies that have ended.
    pub finished: u32,
}

/// Why a shard gave no samples.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The observer asked to stop.
    #[error("stopped before all replies were sampled")]
    Stopped,
    /// The shard asks for what cannot be computed.
    #[error("{0}")]
    Invalid(String),
    /// The model gave logits that are no numbers.
    #[error("logits are not finite: the weights are damaged, or training diverged")]
    NotFinite,
    /// libtorch refused: out of memory, as a rule.
    #[error(transparent)]
    Torch(#[from] TchError),
}
