//! Sampling replies from the current policy: continuous batching with a KV cache, by
//! host-drawn uniforms.
//!
//! A [`Sampler`] computes all rows of a shard together, a step after the other. A step is
//! one forward pass over the new tokens of every row, packed: one token of a row that
//! decodes, a few that were guessed behind it, a stretch of a prompt.
//!
//! ```text
//! prompts ─▶ prefix: what do they share?
//!    │
//!    ▼
//!  rows: admit, plan ──▶ step: forward ──▶ pick: choose ──▶ rows: take, finish ──┐
//!    ▲                     │ attend, paged, cache                                │
//!    └─────────────────────────────────────────── next step ─────────────────────┘
//! ```
//!
//! What is drawn is a pure function of weights and shard (and of libtorch, its threads and
//! the device): no clock, no order of arrival, no generator with a state. Each token takes
//! one number of a counter-based stream ([`Uniforms`]) and turns it into an id by inverse
//! CDF.

mod attend;
mod cache;
mod draft;
mod embed;
mod kernel;
mod paged;
mod pages;
mod pick;
mod prefix;
mod rows;
mod sampler;
mod states;
mod step;
mod uniforms;

use tch::TchError;

pub use pick::{Context, Survivor, survivors};
pub use sampler::{Sampled, Sampler, sample_shard};
pub(crate) use states::last_states;
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
    /// How the engine goes about it.
    pub engine: SamplingEngine,
    /// What is answered.
    pub prompts: Vec<Prompt>,
}

/// How tokens are chosen, and when a reply ends.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by this; 0 takes the most probable token always.
    pub temperature: f64,
    /// The most probable tokens that are drawn from, by number; 0 keeps all.
    pub top_k: u32,
    /// Mass of the most probable tokens that are drawn from, in (0, 1].
    pub top_p: f64,
    /// Least probability of a token that is drawn from, as a share of the most probable
    /// one's; 0 keeps all.
    pub min_p: f64,
    /// Divides positive logits of tokens that prompt or reply have, and multiplies negative
    /// ones; 1 does nothing.
    pub repetition_penalty: f64,
    /// Tokens a reply has before an id may end it.
    pub min_new_tokens: u32,
    /// Tokens a reply has at most; from 1.
    pub max_new_tokens: u32,
    /// Ids that end a reply.
    pub stop_ids: Vec<u32>,
}

impl Default for SamplingParams {
    /// Draws from the model's own distribution, one token.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            min_new_tokens: 0,
            max_new_tokens: 1,
            stop_ids: Vec::new(),
        }
    }
}

/// How the engine goes about it. None of it changes what is drawn, but for rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplingEngine {
    /// Replies in the making at once, at most.
    pub max_rows: u32,
    /// Bytes that the KV cache may take.
    pub cache_bytes: u64,
    /// Whether next tokens are guessed where a guess costs next to nothing.
    pub drafting: bool,
    /// Tokens that sharing what prompts begin with must save. It costs a call of attention
    /// more in every layer of every step, and the joining of its part: some twenty small
    /// operations, which in a hundred steps take as long as two thousand tokens of prompts.
    pub least_shared: usize,
}

impl Default for SamplingEngine {
    fn default() -> Self {
        Self { max_rows: 64, cache_bytes: 8 << 30, drafting: true, least_shared: 2048 }
    }
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
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The prompt it answers.
    pub prompt: u64,
    /// Which of its samples.
    pub index: u32,
    /// Drawn ids, a final stop id included.
    pub tokens: Vec<u32>,
    /// Log-probability of each under the model itself, at temperature 1 and with nothing
    /// left out, in nats.
    pub logps: Vec<f32>,
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

/// What a shard took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Forward passes.
    pub steps: u64,
    /// Tokens of prompts that were computed, those shared once.
    pub prefilled: u64,
    /// Tokens that were guessed, and those of them that were drawn too.
    pub guessed: u64,
    /// See [`Self::guessed`].
    pub guessed_right: u64,
}

/// Why there are no samples, or no embeddings.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The observer asked to stop.
    #[error("stopped before all was computed")]
    Stopped,
    /// Something was asked for that cannot be computed.
    #[error("{0}")]
    Invalid(String),
    /// The model gave what is no number.
    #[error("what it computes is not finite: the weights are damaged, or training diverged")]
    NotFinite,
    /// libtorch refused: out of memory, as a rule.
    #[error(transparent)]
    Torch(#[from] TchError),
}
