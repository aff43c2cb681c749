//! What became of the candidates, told by reason.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::CutPair;

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
}
