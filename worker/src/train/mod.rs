//! Reference scoring and data-parallel DPO steps.
//!
//! One engine scores and trains. It computes a micro-batch of preference pairs
//! packed, `[x, y⁺, y⁻]` after one another without padding and with each prompt
//! computed once, and drives the decoder one block at a time:
//!
//! ```text
//! forward    embed ─▶ block 0 ─▶ … ─▶ block L−1 ─▶ head: log-probs of response tokens, in chunks
//!                                                    │ margins, coefficients (DPO's gradient is a
//! backward   embed ◀─ block 0 ◀─ … ◀─ block L−1 ◀────┘ weighted log-likelihood gradient)
//!              ║        ║                ║
//! reduce       ╚════════╩════════════════╩══▶ norm ─▶ clip ─▶ update of fp32 masters ─▶ weights
//! ```
//!
//! Each block's reduction starts as soon as its gradients are complete, and
//! runs while the next block computes. Without sharding it is an all-reduce, and
//! every rank makes the whole update. Under ZeRO stage 2 it is a reduce-scatter:
//! each rank keeps its share of gradients, masters and optimiser state
//! (`sharding`), updates that, and gathers the others' weights (`weights`), one
//! bucket beside the update of the next.
//!
//! There is no autograd graph: `block` goes back through what it kept (`pass`
//! says how much that is). Of attention, forward is a kernel of libtorch's, and on a
//! GPU backward too (`kernel`).

mod attention;
mod block;
mod error;
mod gradients;
mod head;
mod kernel;
mod masks;
mod memory;
mod objective;
mod optimizer;
mod outcomes;
mod packing;
mod parameters;
mod pass;
mod sharding;
mod shards;
mod state;
mod trace;
mod trainer;
mod types;
mod weights;

#[cfg(test)]
mod tests;

pub use error::TrainError;
pub use memory::MemoryReport;
pub use state::StateCopy;
pub use trace::Trace;
pub use trainer::Trainer;
pub use types::{
    Algorithm, EngineSettings, LARGEST_PIECE, MicroBatch, Objective, OptimizerSettings, PairLogps,
    PairOutcome, PreferenceLoss, Recompute, ReduceKind, ReductionTimes, ReferenceLogps, Sharding,
    StepReport, TokenPair, TrainStep, TrainingSettings,
};
