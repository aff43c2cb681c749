//! Iterative DPO: of two fresh replies, the better one.
//!
//! Guidance makes the better one: it is drawn with the complaint in sight. Of two replies
//! to a bare prompt a reward model tells which it is.

use super::drift::Drift;
use super::{Case, PreferenceMethod, Prompt, Source};
use crate::config::Guidance;
use crate::corpus::Record;
use crate::domain::SeedPair;

/// See the module's table.
pub(super) struct IterDpo;

/// Index of the sample that was drawn with the complaint in sight.
const GUIDED: u32 = 0;
/// Index of the one that was not.
const UNGUIDED: u32 = 1;

impl PreferenceMethod for IterDpo {
    fn of_conversation(&self, record: &Record) -> Option<Case> {
        Drift.of_conversation(record)
    }

    /// No side is the corpus's reply; which of the two stands in the case does not matter.
    fn of_pair(&self, pair: &SeedPair) -> Case {
        Drift.of_pair(pair)
    }

    fn prompts(&self, guidance: Guidance) -> &'static [Prompt] {
        match guidance {
            Guidance::On => &[Prompt::Guided, Prompt::Bare],
            Guidance::Off => &[Prompt::Bare, Prompt::Bare],
        }
    }

    fn chosen(&self, guidance: Guidance) -> Source {
        match guidance {
            Guidance::On => Source::Sample(GUIDED),
            Guidance::Off => Source::Better,
        }
    }

    fn rejected(&self, guidance: Guidance) -> Source {
        match guidance {
            Guidance::On => Source::Sample(UNGUIDED),
            Guidance::Off => Source::Worse,
        }
    }

    fn needs(&self) -> (&'static str, &'static str) {
        ("DSAT turn", "there is no complaint that could guide a better reply")
    }
}
