//! The words that all other modules speak.

mod conversation;
mod ids;
mod pair;

pub use conversation::{DsatSample, Message, Origin, Role, SatSample, SeedPair};
pub use ids::{Epoch, Iteration, PairId, PromptId, ShardId, Step};
pub use pair::{FinishReason, PairRow, Ratings, ReferenceLogps, Sample, Side, TokenPair};
