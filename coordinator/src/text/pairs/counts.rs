//! What became of the candidates, told by reason.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::CutPair;
use crate::domain::FinishReason;
use crate::text::diversity::{distinct, words};

/// Words that are looked at together, where a reply may repeat itself.
const RUN: usize = 3;
/// Share of such runs that a reply has said before, from which on it repeats itself.
const REPEATED: f64 = 0.25;
/// Shares of the drawn replies from which on they are a concern.
const MANY_REPETITIVE: f64 = 0.1;
const MANY_UNFINISHED: f64 = 0.5;

/// Why a candidate did not become a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// The chosen reply says nothing.
    EmptyChosen,
    /// The rejected reply says nothing.
    EmptyRejected,
    /// Both replies say the same, or do after cutting: nothing to prefer.
    EqualSides,
    /// The prompt alone fills `max_length`.
    NoRoom,
    /// The prompt is too long, and is not to be cut.
    OverlongPrompt,
    /// The chosen reply is too long, and is not to be cut.
    OverlongChosen,
    /// The rejected reply is too long, and is not to be cut.
    OverlongRejected,
    /// The chat template raised on the prompt.
    TemplateRefused,
    /// The reward model rates both replies the same.
    EqualRatings,
    /// The reward model's chat template raised on a reply.
    NotRated,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EmptyChosen => "chosen reply empty",
            Self::EmptyRejected => "rejected reply empty",
            Self::EqualSides => "both replies the same",
            Self::NoRoom => "prompt leaves no room",
            Self::OverlongPrompt => "prompt too long",
            Self::OverlongChosen => "chosen reply too long",
            Self::OverlongRejected => "rejected reply too long",
            Self::TemplateRefused => "refused by the chat template",
            Self::EqualRatings => "both replies rated the same",
            Self::NotRated => "refused by the reward model's chat template",
        })
    }
}

/// What became of the candidates.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairCounts {
    /// Candidates looked at.
    pub candidates: u64,
    /// Rows made, those held out included.
    pub pairs: u64,
    /// Rows held out of training.
    pub held_out: u64,
    /// Candidates dropped, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Rows whose prompt lost its start.
    pub prompts_cut: u64,
    /// Rows whose chosen reply lost its end.
    pub chosen_cut: u64,
    /// Rows whose rejected reply lost its end.
    pub rejected_cut: u64,
    /// Drawn replies in the rows.
    #[serde(default)]
    pub drawn: u64,
    /// Drawn replies that had not ended at `sampling.max_new_tokens`.
    #[serde(default)]
    pub unfinished: u64,
    /// Drawn replies that say the same again and again.
    #[serde(default)]
    pub repetitive: u64,
    /// The template's words where it first refused a prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_refusal: Option<String>,
}

impl fmt::Display for PairCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} pairs of {} candidates, {} held out",
            self.pairs, self.candidates, self.held_out
        )?;
        for (reason, count) in &self.dropped {
            write!(f, "; {count} dropped: {reason}")?;
        }
        for (what, count) in [
            ("prompts", self.prompts_cut),
            ("chosen replies", self.chosen_cut),
            ("rejected replies", self.rejected_cut),
        ] {
            if count > 0 {
                write!(f, "; {count} {what} cut to length")?;
            }
        }
        if self.drawn > 0 {
            let Self { drawn, unfinished, repetitive, .. } = self;
            write!(f, "; of {drawn} fresh replies {unfinished} did not end, ")?;
            write!(f, "{repetitive} repeat themselves")?;
        }
        if let Some(message) = &self.first_refusal {
            write!(f, "; first refusal: {message}")?;
        }
        Ok(())
    }
}

impl PairCounts {
    pub(super) fn add(&mut self, pair: &CutPair, held_out: bool) {
        self.pairs += 1;
        self.held_out += u64::from(held_out);
        self.prompts_cut += u64::from(pair.prompt_cut);
        self.chosen_cut += u64::from(pair.chosen_cut);
        self.rejected_cut += u64::from(pair.rejected_cut);
    }

    pub(super) fn add_drawn(&mut self, finish: FinishReason, text: &str) {
        self.drawn += 1;
        self.unfinished += u64::from(finish == FinishReason::Length);
        self.repetitive += u64::from(repeats_itself(text));
    }

    /// What is wrong with the fresh replies, in words for the user: a loss and an accuracy
    /// look as well on babble as on good replies.
    pub fn concerns(&self) -> Vec<String> {
        let Self { drawn, unfinished, repetitive, .. } = *self;
        let many = |count: u64, share: f64| count > 0 && count as f64 >= share * drawn as f64;
        let mut concerns = Vec::new();
        if many(repetitive, MANY_REPETITIVE) {
            concerns.push(format!(
                "{repetitive} of {drawn} fresh replies say the same again and again, and are trained on as they are; \
                 read some in pairs.parquet. A model may not follow text.instruction (shorten or empty it, or take \
                 sampling.guidance = \"off\"), or may have been trained too hard (lower training.learning_rate)"
            ));
        }
        if many(unfinished, MANY_UNFINISHED) {
            concerns.push(format!(
                "{unfinished} of {drawn} fresh replies had not ended at sampling.max_new_tokens, and the model learns \
                 from halves; raise it"
            ));
        }
        concerns
    }
}

/// Whether many of a text's runs of words stood in it before.
fn repeats_itself(text: &str) -> bool {
    distinct(&[words(text)], RUN).is_some_and(|share| 1.0 - share >= REPEATED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_that_says_the_same_again_is_told_from_one_that_goes_on() {
        let once = "Boil the eggs for nine minutes, then cool them in cold water and peel them.";
        assert!(!repeats_itself(once));
        assert!(repeats_itself(&[once; 2].join(" ")));
        assert!(repeats_itself("no no no no"));
        assert!(!repeats_itself("no no") && !repeats_itself(""));
        let list = "1. Add the flour. 2. Add the sugar. 3. Add the eggs. 4. Add the milk.";
        assert!(!repeats_itself(list), "a list may begin its items alike");
    }

    #[test]
    fn few_bad_replies_are_counted_and_many_are_a_concern() {
        let mut counts = PairCounts::default();
        assert!(counts.concerns().is_empty());
        (0..10).for_each(|_| counts.add_drawn(FinishReason::Stop, "A kettle boils water."));
        assert!(counts.concerns().is_empty());
        counts.add_drawn(FinishReason::Length, "no no no no");
        assert_eq!((counts.drawn, counts.unfinished, counts.repetitive), (11, 1, 1));
        assert!(counts.concerns().is_empty(), "one of eleven");
        counts.add_drawn(FinishReason::Stop, "no no no no");
        assert!(counts.concerns()[0].contains("2 of 12 fresh replies say the same"));
        (0..10).for_each(|_| counts.add_drawn(FinishReason::Length, "A kettle boils"));
        assert!(counts.concerns()[0].contains("11 of 22 fresh replies had not ended"));
    }
}
