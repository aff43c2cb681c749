//! Iterative DPO: of two fresh replies, the better one.
//!
//! Guidance makes the better one: it is drawn with the complaint in sight. Two replies to a
//! bare prompt would need a reward model to tell them apart.

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

    fn of_pair(&self, _: &SeedPair) -> Option<Case> {
        None
    }

    fn prompts(&self, _: Guidance) -> &'static [Prompt] {
        &[Prompt::Guided, Prompt::Bare]
    }

    fn chosen(&self) -> Source {
        Source::Sample(GUIDED)
    }

    fn rejected(&self) -> Source {
        Source::Sample(UNGUIDED)
    }

    fn needs(&self) -> (&'static str, &'static str) {
        ("DSAT turn", "there is no complaint that could guide a better reply")
    }
}
