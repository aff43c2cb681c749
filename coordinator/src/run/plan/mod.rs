//! Plans made up front from (settings, seed, iteration), never from arrival
//! order: shards of prompts, global batches and micro-batches, learning rates.

mod batches;
mod cost;
mod order;
mod schedule;
mod shards;

pub use batches::{Dealing, StepPlan};
pub use cost::{CostModel, PairSize};
pub use order::keyed_order;
pub use schedule::learning_rate;
pub use shards::{Shard, ShardRule, plan_shards};
