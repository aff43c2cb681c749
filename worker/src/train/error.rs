//! Why scoring, training, saving or loading ended early.

use std::io;
use std::path::PathBuf;

use tch::TchError;

use crate::collective::CollectiveError;
use crate::model::ModelError;

/// Why the engine returned without doing what was asked. Unless said otherwise
/// at the variant, no weight and no optimiser state has changed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The caller's `stop` said so. Where updated weights were on their way
    /// between ranks some have changed, and training is no longer begun.
    #[error("stopped as asked")]
    Stopped,
    /// A pair that the engine cannot compute.
    #[error("pair {pair}: {reason}")]
    Pair {
        /// The pair's id.
        pair: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A token id outside of the vocabulary: tokenizer and model do not belong together.
    #[error(
        "pair {pair}: token id {id} is outside the vocabulary of {vocabulary}; tokenizer and model \
         do not belong together"
    )]
    TokenId {
        /// The pair's id.
        pair: u64,
        /// The offending id.
        id: u32,
        /// The model's vocabulary.
        vocabulary: i64,
    },
    /// A micro-batch without pairs.
    #[error("micro-batch {index} holds no pair; leave it out")]
    EmptyMicroBatch {
        /// Its place in the command.
        index: usize,
    },
    /// More pairs in this rank's share than in the whole step.
    #[error("step {step} has {pairs} pairs on this rank alone, and global_pairs = {global_pairs}")]
    GlobalPairs {
        /// The step.
        step: u64,
        /// Pairs in this rank's share.
        pairs: usize,
        /// Pairs that the step claims over all ranks.
        global_pairs: u32,
    },
    /// A step out of order, which would repeat or skip an update.
    #[error("step {given} was asked for, and step {expected} is next")]
    OutOfOrder {
        /// The step asked for.
        given: u64,
        /// The step that follows those done.
        expected: u64,
    },
    /// Training before `begin`.
    #[error("training has not begun: call `begin` or `load_state` first")]
    NotBegun,
    /// Gradients were asked for, and the last step did not end, or there was none.
    #[error("no step has ended since training began or failed")]
    NoGradients,
    /// All gradients were asked for, of which each rank has a share.
    #[error("gradients are sharded over the ranks; ask for them without sharding")]
    Sharded,
    /// A step with another group than training began with, whose shares differ.
    #[error(
        "the step's group makes this rank {} of {}, and training began with {} of {}; begin again \
         with this group, and load the state", given.0, given.1, begun.0, begun.1
    )]
    OtherGroup {
        /// Rank and ranks of the step's group.
        given: (u32, u32),
        /// Those that shares were made for.
        begun: (i64, i64),
    },
    /// A gradient with a NaN or an infinity in it, on every rank alike.
    #[error(
        "the gradient of step {step} is not finite (norm {norm}); look at the step's pairs, or \
         lower the learning rate of the steps before it"
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// Its norm.
        norm: f64,
    },
    /// A reduction over ranks failed. The group is out of step: drop it.
    #[error("reduce gradients")]
    Collective(#[from] CollectiveError),
    /// libtorch failed. Where this comes from the update itself, weights may
    /// have changed: load them, and the state, again.
    #[error("libtorch failed")]
    Torch(#[from] TchError),
    /// A file of the training state could not be written.
    #[error("write the training state")]
    Model(#[from] ModelError),
    /// A file of the training state could not be read.
    #[error("{action} {}", path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A training state that is damaged, or not of the loaded policy.
    #[error("{}: {reason}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// The place in it, what was expected, and the remedy.
        reason: String,
    },
}
