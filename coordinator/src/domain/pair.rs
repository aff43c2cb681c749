//! Samples and preference pairs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Iteration, Message, Origin, PairId, PromptId};

/// Why a sampled reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end-of-sequence id was drawn, or what was drawn holds a stop string.
    Stop,
    /// `max_new_tokens` were drawn.
    Length,
}

/// A reply drawn from the current policy. In the run its key is (iteration, prompt, index).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The prompt it answers.
    pub prompt: PromptId,
    /// Which of several samples of that prompt, from 0.
    pub index: u32,
    /// Drawn token ids, a final end-of-sequence id included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// What a reward model says of an iteration's samples, by prompt and index; higher is better.
pub type Ratings = BTreeMap<(PromptId, u32), f64>;

/// Token ids of one preference pair, cut to length: what workers compute on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenPair {
    /// Its row in `pairs.parquet`.
    pub id: PairId,
    /// x, with the template's opening of an assistant turn at its end.
    pub prompt: Vec<u32>,
    /// y⁺; ends with the end-of-sequence id unless it was cut.
    pub chosen: Vec<u32>,
    /// y⁻; ends with the end-of-sequence id unless it was cut.
    pub rejected: Vec<u32>,
}

impl TokenPair {
    /// Tokens that a packed pass computes: the prompt counts once.
    pub fn packed_len(&self) -> usize {
        self.prompt.len() + self.chosen.len() + self.rejected.len()
    }
}

/// Where one side of a pair came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Side {
    /// Words of the corpus.
    Corpus {
        /// Which record.
        origin: Origin,
    },
    /// A sample of the policy.
    Sample {
        /// The iteration that drew it.
        iteration: Iteration,
        /// The prompt it answers.
        prompt: PromptId,
        /// Which of its samples.
        index: u32,
        /// Why it ended.
        finish: FinishReason,
    },
}

/// One row of `pairs.parquet`: a pair for people and for workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairRow {
    /// x as messages.
    pub context: Vec<Message>,
    /// y⁺ as text.
    pub chosen: String,
    /// y⁻ as text.
    pub rejected: String,
    /// The same as token ids; `tokens.id` is the row's number.
    pub tokens: TokenPair,
    /// Where y⁺ came from.
    pub chosen_from: Side,
    /// Where y⁻ came from.
    pub rejected_from: Side,
    /// Held out of training, for evaluation.
    pub held_out: bool,
}

/// Sums of log-probabilities over response tokens under π_ref, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ReferenceLogps {
    /// log π_ref(y⁺|x).
    pub chosen: f64,
    /// log π_ref(y⁻|x).
    pub rejected: f64,
}
