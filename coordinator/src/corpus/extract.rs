//! From labelled conversations to samples.
//!
//! With `u` a labelled user turn, `a` the reply before it and `ctx` all before
//! `a`: a DSAT sample is (x = ctx, y⁻ = a, feedback = u); a SAT sample is
//! (x = ctx, y⁺ = a); a DSAT turn whose next user turn is SAT gives a seed pair
//! (x = ctx, y⁺ = the reply between the two, y⁻ = a).
//!
//! A context must open with a user turn (a system message may precede it),
//! alternate between user and assistant, have text in every turn, and end with
//! a user turn. What breaks a rule is dropped and counted, never mended: two
//! user turns that are joined are words which nobody said.

use std::collections::HashSet;

use sha2::{Digest, Sha256};

use super::Record;
use super::counts::{Counts, DropReason, Kind};
use super::turns::{Label, Turn};
use crate::domain::{DsatSample, Message, Origin, Role, SatSample, SeedPair};

/// Half of a SHA-256: a collision by chance is out of reach for any corpus.
type Fingerprint = [u8; 16];

/// Turns conversations and rows into records, counting all that happens.
pub(super) struct Extractor<'s> {
    counts: Counts,
    seen: HashSet<Fingerprint>,
    sink: &'s mut dyn FnMut(Record),
}

/// The turns before a reply, as far as they matter: read once, so that a long
/// conversation with many labels costs no more than its length.
#[derive(Clone)]
struct Context {
    fault: Option<DropReason>,
    last: Option<Role>,
    hash: Sha256,
}

impl Context {
    fn new() -> Self {
        Self { fault: None, last: None, hash: Sha256::new() }
    }

    fn of(turns: &[Turn<'_>]) -> Self {
        let mut context = Self::new();
        turns.iter().for_each(|turn| context.push(turn));
        context
    }

    fn push(&mut self, turn: &Turn<'_>) {
        let fault = match (self.last, turn.role) {
            _ if turn.after_gap => Some(DropReason::MissingTurn),
            (Some(_), Role::System) => Some(DropReason::SystemInside),
            (_, Role::Tool) => Some(DropReason::ToolTurn),
            (None | Some(Role::System), Role::Assistant) => Some(DropReason::OpensWithReply),
            (Some(Role::Assistant), Role::Assistant) => Some(DropReason::TwoReplies),
            (Some(Role::User), Role::User) => Some(DropReason::TwoUserTurns),
            _ if is_empty(&turn.content) => Some(DropReason::EmptyTurn),
            _ => None,
        };
        self.fault = self.fault.or(fault);
        self.last = Some(turn.role);
        absorb(&mut self.hash, turn.role as u8, &turn.content);
    }

    /// Whether a reply may follow.
    fn check(&self) -> Result<(), DropReason> {
        match (self.fault, self.last) {
            (Some(fault), _) => Err(fault),
            (None, Some(Role::User)) => Ok(()),
            (None, Some(Role::Assistant)) => Err(DropReason::TwoReplies),
            (None, _) => Err(DropReason::OpensWithReply),
        }
    }

    fn fingerprint(&self, kind: Kind, replies: &[&str]) -> Fingerprint {
        let mut hash = self.hash.clone();
        for reply in replies {
            absorb(&mut hash, 0x10 + kind as u8, reply);
        }
        let mut fingerprint = Fingerprint::default();
        fingerprint.copy_from_slice(&hash.finalize()[..16]);
        fingerprint
    }
}

fn absorb(hash: &mut Sha256, tag: u8, text: &str) {
    hash.update([tag]);
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
}

fn is_empty(text: &str) -> bool {
    text.trim().is_empty()
}

fn messages(turns: &[Turn<'_>]) -> Vec<Message> {
    turns.iter().map(|turn| Message::new(turn.role, &*turn.content)).collect()
}

impl<'s> Extractor<'s> {
    pub(super) fn new(counts: Counts, sink: &'s mut dyn FnMut(Record)) -> Self {
        Self { counts, seen: HashSet::new(), sink }
    }

    pub(super) fn counts(&mut self) -> &mut Counts {
        &mut self.counts
    }

    pub(super) fn into_counts(self) -> Counts {
        self.counts
    }

    /// A conversation whose user turns carry labels.
    pub(super) fn conversation(&mut self, turns: &[Turn<'_>]) {
        self.counts.conversations += 1;
        self.counts.utterances += turns.len() as u64;
        let users = || turns.iter().filter(|turn| turn.role == Role::User);
        for user in users() {
            let labels = &mut self.counts.labels;
            *match user.label {
                Label::Dsat => &mut labels.dsat,
                Label::Sat => &mut labels.sat,
                Label::Mixed => &mut labels.mixed,
                Label::Missing => &mut labels.missing,
                Label::Neither => &mut labels.neither,
            } += 1;
        }
        let with = |label| users().any(|user| user.label == label);
        let (dsat, sat) = (with(Label::Dsat), with(Label::Sat));
        self.counts.conversations_with_dsat += u64::from(dsat);
        self.counts.conversations_with_sat += u64::from(sat);
        if dsat || sat {
            self.judged(turns);
        }
    }

    fn judged(&mut self, turns: &[Turn<'_>]) {
        // `before` ends ahead of the reply to turn i, `after` behind it.
        let mut before = Context::new();
        let mut after = Context::new();
        let mut broken_off = false;
        for (i, turn) in turns.iter().enumerate() {
            broken_off |= turn.after_gap;
            if turn.role == Role::User && matches!(turn.label, Label::Dsat | Label::Sat) {
                let reply = i.checked_sub(1).map(|at| &turns[at]);
                let context = &turns[..i.saturating_sub(1)];
                let fault =
                    if broken_off { Err(DropReason::MissingTurn) } else { replied(&before, reply) };
                match turn.label {
                    Label::Dsat => {
                        self.dsat(&before, context, reply, turn, fault);
                        self.corrected(&before, turns, i, fault);
                    }
                    _ => self.sat(&before, context, reply, turn, fault),
                }
            }
            before = after.clone();
            after.push(turn);
        }
    }

    fn dsat(
        &mut self,
        before: &Context,
        context: &[Turn<'_>],
        reply: Option<&Turn<'_>>,
        user: &Turn<'_>,
        fault: Result<(), DropReason>,
    ) {
        let reply = reply.map_or("", |turn| &*turn.content);
        let fault = match fault {
            Ok(()) if is_empty(&user.content) => Err(DropReason::EmptyFeedback),
            other => other,
        };
        if self.takes(Kind::Dsat, fault, || before.fingerprint(Kind::Dsat, &[reply])) {
            let origin = self.origin(user.record);
            (self.sink)(Record::Dsat(DsatSample {
                context: messages(context),
                rejected: reply.to_owned(),
                feedback: user.content.to_string(),
                origin,
            }));
        }
    }

    fn sat(
        &mut self,
        before: &Context,
        context: &[Turn<'_>],
        reply: Option<&Turn<'_>>,
        user: &Turn<'_>,
        fault: Result<(), DropReason>,
    ) {
        let reply = reply.map_or("", |turn| &*turn.content);
        if self.takes(Kind::Sat, fault, || before.fingerprint(Kind::Sat, &[reply])) {
            let origin = self.origin(user.record);
            (self.sink)(Record::Sat(SatSample {
                context: messages(context),
                chosen: reply.to_owned(),
                origin,
            }));
        }
    }

    /// The seed pair of the DSAT turn `i`, if its next user turn is SAT.
    fn corrected(
        &mut self,
        before: &Context,
        turns: &[Turn<'_>],
        i: usize,
        fault: Result<(), DropReason>,
    ) {
        let Some(next) = (i + 1..turns.len()).find(|&j| turns[j].role == Role::User) else {
            return;
        };
        if turns[next].label != Label::Sat {
            return;
        }
        let rejected = i.checked_sub(1).map_or("", |at| &*turns[at].content);
        let between = &turns[i + 1..next];
        let chosen = between.first().map_or("", |turn| &*turn.content);
        let fault = fault.and_then(|()| {
            if turns[i + 1..=next].iter().any(|turn| turn.after_gap) {
                return Err(DropReason::MissingTurn);
            }
            match between {
                [] => Err(DropReason::TwoUserTurns),
                [reply] => follows(reply),
                [_, ..] => Err(DropReason::TwoReplies),
            }
        });
        self.seed(before, &turns[..i.saturating_sub(1)], chosen, rejected, turns[i].record, fault);
    }

    fn seed(
        &mut self,
        before: &Context,
        context: &[Turn<'_>],
        chosen: &str,
        rejected: &str,
        record: u64,
        fault: Result<(), DropReason>,
    ) {
        let fault = match fault {
            Ok(()) if chosen == rejected => Err(DropReason::SameReplies),
            other => other,
        };
        if self.takes(Kind::Seed, fault, || before.fingerprint(Kind::Seed, &[chosen, rejected])) {
            let origin = self.origin(record);
            (self.sink)(Record::Seed(SeedPair {
                context: messages(context),
                chosen: chosen.to_owned(),
                rejected: rejected.to_owned(),
                origin,
            }));
        }
    }

    /// A row that holds one dissatisfying reply and what the user said to it.
    pub(super) fn dsat_row(&mut self, context: &[Turn<'_>], reply: &Turn<'_>, user: &Turn<'_>) {
        self.counts.conversations += 1;
        self.counts.conversations_with_dsat += 1;
        self.counts.utterances += context.len() as u64 + 2;
        self.counts.labels.dsat += 1;
        let before = Context::of(context);
        self.dsat(&before, context, Some(reply), user, replied(&before, Some(reply)));
    }

    /// A row that holds a pair; `fault` is what its reader found wrong.
    pub(super) fn pair_row(
        &mut self,
        context: &[Turn<'_>],
        chosen: &Turn<'_>,
        rejected: &Turn<'_>,
        fault: Result<(), DropReason>,
    ) {
        self.counts.conversations += 1;
        self.counts.utterances += context.len() as u64 + 2;
        let before = Context::of(context);
        let fault = fault
            .and_then(|()| replied(&before, Some(rejected)))
            .and_then(|()| replied(&before, Some(chosen)));
        self.seed(&before, context, &chosen.content, &rejected.content, rejected.record, fault);
    }

    fn takes(
        &mut self,
        kind: Kind,
        fault: Result<(), DropReason>,
        fingerprint: impl FnOnce() -> Fingerprint,
    ) -> bool {
        let fault = match fault {
            Ok(()) if !self.seen.insert(fingerprint()) => Err(DropReason::Duplicate),
            other => other,
        };
        match fault {
            Ok(()) => self.counts.keep(kind),
            Err(reason) => self.counts.drop(kind, reason),
        }
        fault.is_ok()
    }

    fn origin(&self, record: u64) -> Origin {
        Origin { file: self.counts.file.clone(), record }
    }
}

/// Whether `reply` is one, and stands behind a context that may be trained on.
fn replied(before: &Context, reply: Option<&Turn<'_>>) -> Result<(), DropReason> {
    let reply = reply.ok_or(DropReason::NoReply)?;
    match reply.role {
        Role::User => return Err(DropReason::TwoUserTurns),
        Role::System => return Err(DropReason::NoReply),
        Role::Tool => return Err(DropReason::ToolTurn),
        Role::Assistant => {}
    }
    before.check()?;
    follows(reply)
}

fn follows(reply: &Turn<'_>) -> Result<(), DropReason> {
    match reply.role {
        Role::Assistant if is_empty(&reply.content) => Err(DropReason::EmptyReply),
        Role::Assistant => Ok(()),
        Role::Tool => Err(DropReason::ToolTurn),
        _ => Err(DropReason::NoReply),
    }
}

#[cfg(test)]
#[path = "extract_tests.rs"]
mod tests;
