//! Chat template and tokenizer: conversations to token ids, and back.
//!
//! | file | owns |
//! |---|---|
//! | `model` | [`TextModel`]: tokenizer and template behind one door |
//! | `template` | finding the chat template, and rendering it as `transformers` does |
//! | `generation_blocks`, `json`, `python` | what Hugging Face's Jinja has and Rust's has not |
//! | `special` | special tokens, and the ids at which a reply ends |
//! | `held_out` | which prompts never train |
//! | `stops` | where a sampled reply is cut because of what it says |
//! | `reward` | what a reward model reads of a prompt and a reply |
//! | `diversity` | how much replies differ from each other, and repeat themselves |
//! | `pairs` | rows of preference pairs, cut to length; drops counted by reason |

pub(crate) mod diversity;
mod error;
mod files;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod fixture;
mod generation_blocks;
mod held_out;
mod json;
mod model;
mod pairs;
mod python;
mod reward;
mod special;
mod stops;
mod template;

pub use error::TextError;
pub use files::CheckpointFile;
pub use held_out::{HeldOut, HeldOutSet, PromptKey, hold_out};
pub use model::{DEFAULT_INSTRUCTION, TextModel, TextOptions, guided_messages};
pub use pairs::{Candidate, DropReason, Lengths, PairCounts, Reply, build_pairs, seed_pairs};
pub use reward::RewardText;
pub use stops::cut_at_stops;
