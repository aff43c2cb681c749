//! Strings utterances together into conversations.
//!
//! WildFeedback's table has no conversation id: an `UtterranceId` of 0 opens the
//! next one. So a lost utterance must not weld two conversations together, and
//! what stands behind a hole must not pass for a whole context.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::de::{self, Deserialize, Deserializer, Visitor};

use super::extract::Extractor;
use super::turns::{Flag, Label, Text, Turn, role};
use crate::domain::Role;

/// One row, by the published keys, misspelt as they are, or spelt right.
#[derive(serde::Deserialize)]
pub(super) struct Utterance<'a> {
    #[serde(rename = "UtterranceId", alias = "UtteranceId")]
    pub(super) id: Id,
    #[serde(rename = "Role", borrow)]
    pub(super) role: Text<'a>,
    #[serde(rename = "Content", borrow)]
    pub(super) content: Option<Text<'a>>,
    #[serde(rename = "Satisfaction", default)]
    pub(super) satisfied: Flag,
    #[serde(rename = "Disatisfaction", alias = "Dissatisfaction", default)]
    pub(super) dissatisfied: Flag,
}

/// Number of an utterance in its conversation, from 0. Also `3.0` and `"3"`,
/// which tables with holes make of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(pub(super) u64);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(IdVisitor)
    }
}

struct IdVisitor;

impl Visitor<'_> for IdVisitor {
    type Value = Id;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the utterance's number in its conversation, from 0")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Id, E> {
        Ok(Id(value))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Id, E> {
        // Exact: ids beyond 2^53 do not occur in a conversation.
        if value >= 0.0 && value.fract() == 0.0 && value < 9e15 {
            Ok(Id(value as u64))
        } else {
            Err(E::invalid_value(de::Unexpected::Float(value), &self))
        }
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Id, E> {
        value
            .trim()
            .parse()
            .map(Id)
            .map_err(|_| E::invalid_value(de::Unexpected::Str(value), &self))
    }
}

/// The conversation that is being read. Its text lies in one buffer that is
/// used again for the next, so that a file of a million utterances allocates
/// for the few that are kept.
#[derive(Default)]
pub(super) struct Conversation {
    text: String,
    turns: Vec<Stored>,
    last_id: Option<u64>,
    /// A record was lost since the last utterance.
    lost: bool,
}

struct Stored {
    role: Role,
    text: Range<usize>,
    label: Label,
    record: u64,
    after_gap: bool,
}

/// Text of one conversation that is held at most. Whatever never says 0 again
/// is cut here, and the rest counts as standing behind a hole.
const MAX_TEXT: usize = 64 << 20;
/// Turns of one conversation that are held at most.
const MAX_TURNS: usize = 100_000;

impl Conversation {
    /// Takes the next utterance, and gives the conversation before it to
    /// `extractor` if that ends here.
    ///
    /// # Errors
    /// What is wrong with the row.
    pub(super) fn push(
        &mut self,
        utterance: &Utterance<'_>,
        record: u64,
        extractor: &mut Extractor<'_>,
    ) -> Result<(), String> {
        let role = role(&utterance.role.0)?;
        let content = utterance.content.as_ref().map_or("", |text| &*text.0);
        let id = utterance.id.0;

        let full = self.text.len() + content.len() > MAX_TEXT || self.turns.len() >= MAX_TURNS;
        let follows = self.last_id.is_some_and(|last| id == last + 1);
        // A number that does not rise belongs to a conversation whose opening is lost.
        let other = id == 0 || full || self.last_id.is_none_or(|last| id <= last);
        if other {
            self.finish(extractor);
        }
        let after_gap = id != 0 && (self.lost || full || !follows);
        let start = self.text.len();
        self.text.push_str(content);
        let label = match role {
            Role::User => Label::of(utterance.satisfied.0, utterance.dissatisfied.0),
            // Labels on the agent's rows repeat the user's.
            _ => Label::Missing,
        };
        self.turns.push(Stored { role, text: start..self.text.len(), label, record, after_gap });
        self.last_id = Some(id);
        self.lost = false;
        Ok(())
    }

    /// A record was malformed: what follows in this conversation has a hole before it.
    pub(super) fn lose(&mut self) {
        self.lost = true;
    }

    /// Gives what is held to `extractor`.
    pub(super) fn finish(&mut self, extractor: &mut Extractor<'_>) {
        if !self.turns.is_empty() {
            let turn = |stored: &Stored| Turn {
                role: stored.role,
                content: Cow::Borrowed(&self.text[stored.text.clone()]),
                label: stored.label,
                record: stored.record,
                after_gap: stored.after_gap,
            };
            extractor.conversation(&self.turns.iter().map(turn).collect::<Vec<_>>());
        }
        self.text.clear();
        self.turns.clear();
        self.last_id = None;
    }
}
