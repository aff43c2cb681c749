//! Ids and counters. Newtypes, so that a pair is never taken for a prompt.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// What replies are drawn for: the index of a case of the run's corpus.
    PromptId(u64)
);
id!(
    /// A preference pair within an iteration: its row in `pairs.parquet`.
    PairId(u64)
);
id!(
    /// A planned group of prompts that one worker samples together.
    ShardId(u64)
);
id!(
    /// 0 is the warm start; 1 to K are DRIFT's.
    Iteration(u32)
);
id!(
    /// Pass over an iteration's pairs, from 0.
    Epoch(u32)
);
id!(
    /// Optimiser step within an iteration, from 0, across its epochs.
    Step(u64)
);
