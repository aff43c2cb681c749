//! SPIN: replies that satisfied over fresh ones (Chen et al., arXiv 2401.01335).

use super::{Case, PreferenceMethod, Prompt, Source};
use crate::config::Guidance;
use crate::corpus::Record;
use crate::domain::SeedPair;

/// See the module's table.
pub(super) struct Spin;

impl PreferenceMethod for Spin {
    fn of_conversation(&self, record: &Record) -> Option<Case> {
        let Record::Sat(sample) = record else { return None };
        Some(Case {
            context: sample.context.clone(),
            reply: sample.chosen.clone(),
            feedback: None,
            origin: sample.origin.clone(),
        })
    }

    fn of_pair(&self, pair: &SeedPair) -> Case {
        Case {
            context: pair.context.clone(),
            reply: pair.chosen.clone(),
            feedback: None,
            origin: pair.origin.clone(),
        }
    }

    /// Guidance asks to mend a reply; here there is none to mend.
    fn prompts(&self, _: Guidance) -> &'static [Prompt] {
        &[Prompt::Bare]
    }

    fn chosen(&self, _: Guidance) -> Source {
        Source::Corpus
    }

    fn rejected(&self, _: Guidance) -> Source {
        Source::Sample(0)
    }

    fn needs(&self) -> (&'static str, &'static str) {
        ("SAT turn", "SPIN trains towards replies that satisfied")
    }
}
