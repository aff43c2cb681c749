//! Preference methods: what replies are drawn from, and which reply is preferred.
//!
//! | | drawn from | chosen | rejected |
//! |---|---|---|---|
//! | `Drift` | the whole conversation with the complaint and an instruction; unguided: x | the sample | the reply that disappointed |
//! | `Spin` | x | the reply that satisfied | the sample |
//! | `IterDpo` | the same as DRIFT, and x; unguided: twice x | the guided sample; unguided: the better of both by a reward model | the other one |
//!
//! x is the conversation before the corpus's reply, and what training conditions on. A
//! corpus of pairs (UltraFeedback's shape) has no complaints, and nothing is guided there:
//! replies are drawn from x, and the corpus's reply is the pair's rejected one for DRIFT,
//! its chosen one for SPIN.

mod drawn;
mod drift;
mod iter_dpo;
mod spin;

use serde::Serialize;

pub use self::drawn::{Drawn, candidates};
use self::drift::Drift;
use self::iter_dpo::IterDpo;
use self::spin::Spin;
use crate::config::{Guidance, Method};
use crate::corpus::Record;
use crate::domain::{Message, Origin, SeedPair};
use crate::text::guided_messages;

/// A prompt that replies are drawn for in every iteration, and the corpus's own reply to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Case {
    /// x.
    pub context: Vec<Message>,
    /// What the corpus has as the reply to it.
    pub reply: String,
    /// What the user said to that; none in a corpus of pairs.
    pub feedback: Option<String>,
    /// Where it stands.
    pub origin: Origin,
}

/// What a reply is drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prompt {
    /// x alone.
    Bare,
    /// The conversation on to the complaint, and the instruction to do better; x where
    /// nobody complained.
    Guided,
}

/// Where a side of a pair comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The corpus's reply.
    Corpus,
    /// The sample of this index.
    Sample(u32),
    /// Of two samples, the one that a reward model rates higher.
    Better,
    /// The other one.
    Worse,
}

/// One method.
pub trait PreferenceMethod: Sync {
    /// The case that a record of a conversation makes, if this method learns from such.
    fn of_conversation(&self, record: &Record) -> Option<Case>;

    /// The case that a pair of a corpus of pairs makes.
    fn of_pair(&self, pair: &SeedPair) -> Case;

    /// What the samples of a case are drawn from, by their index. How many there are does
    /// not depend on guidance.
    fn prompts(&self, guidance: Guidance) -> &'static [Prompt];

    /// y⁺.
    fn chosen(&self, guidance: Guidance) -> Source;

    /// y⁻.
    fn rejected(&self, guidance: Guidance) -> Source;

    /// Whether a reward model must rate the samples before they make pairs.
    fn is_rated(&self, guidance: Guidance) -> bool {
        let is_rated = |side| matches!(side, Source::Better | Source::Worse);
        is_rated(self.chosen(guidance)) || is_rated(self.rejected(guidance))
    }

    /// What a corpus of conversations must hold, and why, for whoever lacks it.
    fn needs(&self) -> (&'static str, &'static str);
}

/// The method of that name.
pub fn of(method: Method) -> &'static dyn PreferenceMethod {
    match method {
        Method::Drift => &Drift,
        Method::Spin => &Spin,
        Method::IterDpo => &IterDpo,
    }
}

impl Case {
    /// The conversation that a prompt of this kind shows.
    pub fn messages(&self, prompt: Prompt, instruction: &str) -> Vec<Message> {
        match (&self.feedback, prompt) {
            (Some(feedback), Prompt::Guided) => {
                guided_messages(&self.context, &self.reply, feedback, instruction)
            }
            _ => self.context.clone(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
