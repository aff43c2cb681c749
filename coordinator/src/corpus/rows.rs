//! From rows, however they were decoded, to the extractor.

use super::counts::DropReason;
use super::extract::Extractor;
use super::format::Format;
use super::turns::{Turn, Turns};
use super::utterances::{Conversation, Utterance};
use crate::domain::Role;

/// `{messages}`, or the same under its other names.
#[derive(serde::Deserialize)]
struct MessagesRow<'a> {
    #[serde(borrow, alias = "conversation", alias = "conversations")]
    messages: Turns<'a>,
}

/// `{prompt, rejected, user_preference}`.
#[derive(serde::Deserialize)]
struct DsatRow<'a> {
    #[serde(borrow)]
    prompt: Turns<'a>,
    #[serde(borrow)]
    rejected: Turns<'a>,
    #[serde(borrow)]
    user_preference: Turns<'a>,
}

/// `{conversations or prompt, chosen, rejected}`.
#[derive(serde::Deserialize)]
struct PairRow<'a> {
    #[serde(borrow, alias = "conversation")]
    conversations: Option<Turns<'a>>,
    #[serde(borrow)]
    prompt: Option<Turns<'a>>,
    #[serde(borrow)]
    chosen: Turns<'a>,
    #[serde(borrow)]
    rejected: Turns<'a>,
}

/// Takes the rows of one file, all of one shape.
pub(super) struct Rows<'s> {
    pub(super) format: Format,
    pub(super) extractor: Extractor<'s>,
    conversation: Conversation,
}

impl<'s> Rows<'s> {
    pub(super) fn new(format: Format, extractor: Extractor<'s>) -> Self {
        Self { format, extractor, conversation: Conversation::default() }
    }

    /// One JSON object. An error is what is wrong with it; nothing was taken then.
    pub(super) fn json(&mut self, bytes: &[u8], record: u64) -> Result<(), String> {
        match self.format {
            Format::Utterances => self.utterance(&parse(bytes)?, record),
            Format::Messages => {
                let row: MessagesRow<'_> = parse(bytes)?;
                self.messages(row.messages, record)
            }
            Format::Dsat => {
                let row: DsatRow<'_> = parse(bytes)?;
                self.dsat(row.prompt, row.rejected, row.user_preference, record)
            }
            Format::Pairs => {
                let row: PairRow<'_> = parse(bytes)?;
                self.pair(row.conversations.or(row.prompt), row.chosen, row.rejected, record)
            }
        }
    }

    pub(super) fn utterance(&mut self, row: &Utterance<'_>, record: u64) -> Result<(), String> {
        self.conversation.push(row, record, &mut self.extractor)
    }

    pub(super) fn messages(&mut self, turns: Turns<'_>, record: u64) -> Result<(), String> {
        let Turns::Messages(mut turns) = turns else {
            return Err("`messages` is a string, expected a list of {role, content}".to_owned());
        };
        turns.iter_mut().for_each(|turn| turn.record = record);
        self.extractor.conversation(&turns);
        Ok(())
    }

    pub(super) fn dsat(
        &mut self,
        prompt: Turns<'_>,
        rejected: Turns<'_>,
        preference: Turns<'_>,
        record: u64,
    ) -> Result<(), String> {
        let context = prompt.spoken_by(Role::User);
        let mut rejected = one("rejected", rejected.spoken_by(Role::Assistant), Role::Assistant)?;
        let mut user = one("user_preference", preference.spoken_by(Role::User), Role::User)?;
        rejected.record = record;
        user.record = record;
        self.extractor.dsat_row(&context, &rejected, &user);
        Ok(())
    }

    /// `context` is asked only if the sides are single replies.
    pub(super) fn pair(
        &mut self,
        context: Option<Turns<'_>>,
        chosen: Turns<'_>,
        rejected: Turns<'_>,
        record: u64,
    ) -> Result<(), String> {
        let (before_chosen, mut chosen) = side("chosen", chosen)?;
        let (before_rejected, mut rejected) = side("rejected", rejected)?;
        chosen.record = record;
        rejected.record = record;
        let fault =
            if before_chosen == before_rejected { Ok(()) } else { Err(DropReason::ContextsDiffer) };
        let context = match context {
            _ if !before_chosen.is_empty() => before_chosen,
            Some(context) => context.spoken_by(Role::User),
            None => {
                return Err(
                    "no `conversations` and no `prompt`, and `chosen` is a single reply".to_owned()
                );
            }
        };
        self.extractor.pair_row(&context, &chosen, &rejected, fault);
        Ok(())
    }

    /// A record was skipped.
    pub(super) fn lose(&mut self) {
        self.conversation.lose();
    }

    /// No rows follow.
    pub(super) fn finish(&mut self) {
        self.conversation.finish(&mut self.extractor);
    }
}

fn parse<'a, T: serde::Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|e| {
        // Its line and column count from the record's first byte.
        e.to_string()
    })
}

/// The one message that `column` must hold.
fn one<'a>(column: &str, mut turns: Vec<Turn<'a>>, speaker: Role) -> Result<Turn<'a>, String> {
    match (turns.pop(), turns.len()) {
        (Some(turn), 0) if turn.role == speaker => Ok(turn),
        (Some(turn), 0) => {
            Err(format!("`{column}` is said by {:?}, expected {speaker:?}", turn.role))
        }
        (None, _) => Ok(Turn::new(speaker, "")),
        (Some(_), before) => Err(format!("`{column}` holds {} messages, expected one", before + 1)),
    }
}

/// The conversation before the reply, and the reply.
fn side<'a>(column: &str, turns: Turns<'a>) -> Result<(Vec<Turn<'a>>, Turn<'a>), String> {
    let mut turns = turns.spoken_by(Role::Assistant);
    match turns.pop() {
        None => Ok((Vec::new(), Turn::new(Role::Assistant, ""))),
        Some(reply) if reply.role == Role::Assistant => Ok((turns, reply)),
        Some(other) => {
            Err(format!("`{column}` ends with a turn by {:?}, expected Assistant", other.role))
        }
    }
}
