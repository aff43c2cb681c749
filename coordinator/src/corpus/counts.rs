//! What became of every record of a file, in numbers.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Container, Format};

/// What a record can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A turn in which the user was dissatisfied.
    Dsat,
    /// A reply that satisfied.
    Sat,
    /// A rejected reply and the better one after it.
    Seed,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Dsat => "DSAT sample",
            Kind::Sat => "SAT sample",
            Kind::Seed => "seed pair",
        })
    }
}

/// Why a candidate for a sample was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// The turn before the label is not a reply, or there is none.
    NoReply,
    /// The reply is null, empty or white space.
    EmptyReply,
    /// The dissatisfied turn is null, empty or white space.
    EmptyFeedback,
    /// No user turn stands before the reply.
    OpensWithReply,
    /// A turn of the context is null, empty or white space.
    EmptyTurn,
    /// Two user turns in a row.
    TwoUserTurns,
    /// Two replies in a row.
    TwoReplies,
    /// A system message that is not the first turn.
    SystemInside,
    /// A tool's turn: templates need its call, which these files lack.
    ToolTurn,
    /// An utterance before it is missing or malformed.
    MissingTurn,
    /// Chosen and rejected reply follow different contexts.
    ContextsDiffer,
    /// Chosen and rejected reply are the same.
    SameReplies,
    /// The same sample came before in this file.
    Duplicate,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DropReason::NoReply => "no reply stands before the user's judgement",
            DropReason::EmptyReply => "the reply is empty",
            DropReason::EmptyFeedback => "the dissatisfied turn is empty",
            DropReason::OpensWithReply => "no user turn stands before the reply",
            DropReason::EmptyTurn => "a turn of the context is empty",
            DropReason::TwoUserTurns => "two user turns in a row",
            DropReason::TwoReplies => "two replies in a row",
            DropReason::SystemInside => "a system message stands inside the conversation",
            DropReason::ToolTurn => "a tool's turn stands in the context",
            DropReason::MissingTurn => "an utterance before it is missing or malformed",
            DropReason::ContextsDiffer => "chosen and rejected follow different contexts",
            DropReason::SameReplies => "chosen and rejected are the same",
            DropReason::Duplicate => "the same sample came before",
        })
    }
}

/// How user turns were labelled, before anything was dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels {
    /// User turns labelled dissatisfied, and not satisfied.
    pub dsat: u64,
    /// User turns labelled satisfied, and not dissatisfied.
    pub sat: u64,
    /// User turns labelled both: neither SAT nor DSAT.
    pub mixed: u64,
    /// User turns on which a label is absent, and the other does not decide.
    pub missing: u64,
    /// User turns that are said to be neither.
    pub neither: u64,
}

/// Where in a file something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Index of the record, from 0.
    pub record: u64,
    /// Byte at which it begins; absent in Parquet.
    pub byte: Option<u64>,
    /// Line on which it begins, from 1; absent in Parquet.
    pub line: Option<u64>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {}", self.record)?;
        match (self.line, self.byte) {
            (Some(line), Some(byte)) => write!(f, " (line {line}, byte {byte})"),
            _ => Ok(()),
        }
    }
}

/// A record that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Malformed {
    /// Where it stands.
    pub place: Place,
    /// What is wrong, and what was expected.
    pub problem: String,
    /// Its beginning, verbatim but for bytes that are not UTF-8.
    pub text: String,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.problem)?;
        if self.text.is_empty() { Ok(()) } else { write!(f, ": {:?}", self.text) }
    }
}

/// What a file gave.
///
/// For every kind, `kept + dropped` is the number of candidates; for DSAT and
/// SAT that is the number of labels: nothing vanishes uncounted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// File name without its folder.
    pub file: String,
    /// Shape of its records.
    pub format: Format,
    /// How records are framed.
    pub container: Container,
    /// Size of the file.
    pub bytes: u64,
    /// Well-formed records: elements, lines or rows.
    pub records: u64,
    /// Malformed records, skipped.
    pub malformed: u64,
    /// The first few of them.
    pub examples: Vec<Malformed>,
    /// Where the file ends too early, if it does and that was allowed.
    pub truncated: Option<Place>,
    /// Conversations; in tables of samples, rows.
    pub conversations: u64,
    /// Conversations with a DSAT turn.
    pub conversations_with_dsat: u64,
    /// Conversations with a SAT turn.
    pub conversations_with_sat: u64,
    /// Turns in all conversations.
    pub utterances: u64,
    /// How user turns were labelled.
    pub labels: Labels,
    /// Records handed over, by kind.
    pub kept: BTreeMap<Kind, u64>,
    /// Candidates not taken, by kind and reason.
    pub dropped: BTreeMap<Kind, BTreeMap<DropReason, u64>>,
}

/// Malformed records that are kept for the report.
const EXAMPLES: usize = 5;
/// Bytes of a malformed record that are shown.
const EXAMPLE_BYTES: usize = 240;

impl Counts {
    pub(super) fn new(file: String, format: Format, container: Container, bytes: u64) -> Self {
        Self {
            file,
            format,
            container,
            bytes,
            records: 0,
            malformed: 0,
            examples: Vec::new(),
            truncated: None,
            conversations: 0,
            conversations_with_dsat: 0,
            conversations_with_sat: 0,
            utterances: 0,
            labels: Labels::default(),
            kept: BTreeMap::new(),
            dropped: BTreeMap::new(),
        }
    }

    /// Records of `kind` that were handed over.
    pub fn kept(&self, kind: Kind) -> u64 {
        self.kept.get(&kind).copied().unwrap_or(0)
    }

    /// Candidates of `kind` that were not taken, for any reason.
    pub fn dropped(&self, kind: Kind) -> u64 {
        self.dropped.get(&kind).map_or(0, |reasons| reasons.values().sum())
    }

    /// Candidates of `kind` that were not taken for `reason`.
    pub fn dropped_for(&self, kind: Kind, reason: DropReason) -> u64 {
        self.dropped.get(&kind).and_then(|reasons| reasons.get(&reason)).copied().unwrap_or(0)
    }

    pub(super) fn keep(&mut self, kind: Kind) {
        *self.kept.entry(kind).or_default() += 1;
    }

    pub(super) fn drop(&mut self, kind: Kind, reason: DropReason) {
        *self.dropped.entry(kind).or_default().entry(reason).or_default() += 1;
    }

    pub(super) fn skip(&mut self, place: Place, problem: impl fmt::Display, text: &[u8]) {
        self.malformed += 1;
        if self.examples.len() < EXAMPLES {
            let shown = &text[..text.len().min(EXAMPLE_BYTES)];
            self.examples.push(Malformed {
                place,
                problem: problem.to_string(),
                text: String::from_utf8_lossy(shown).into_owned(),
            });
        }
    }
}
