//! DRIFT: fresh replies over those that disappointed.

use super::{Case, PreferenceMethod, Prompt, Source};
use crate::config::Guidance;
use crate::corpus::Record;
use crate::domain::SeedPair;

/// See the module's table.
pub(super) struct Drift;

impl PreferenceMethod for Drift {
    fn of_conversation(&self, record: &Record) -> Option<Case> {
        let Record::Dsat(sample) = record else { return None };
        Some(Case {
            context: sample.context.clone(),
            reply: sample.rejected.clone(),
            feedback: Some(sample.feedback.clone()),
            origin: sample.origin.clone(),
        })
    }

    fn of_pair(&self, pair: &SeedPair) -> Case {
        Case {
            context: pair.context.clone(),
            reply: pair.rejected.clone(),
            feedback: None,
            origin: pair.origin.clone(),
        }
    }

    fn prompts(&self, guidance: Guidance) -> &'static [Prompt] {
        match guidance {
            Guidance::On => &[Prompt::Guided],
            Guidance::Off => &[Prompt::Bare],
        }
    }

    fn chosen(&self, _: Guidance) -> Source {
        Source::Sample(0)
    }

    fn rejected(&self, _: Guidance) -> Source {
        Source::Corpus
    }

    fn needs(&self) -> (&'static str, &'static str) {
        ("DSAT turn", "there is no dissatisfaction to train on")
    }
}
