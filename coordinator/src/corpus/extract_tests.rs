#![allow(clippy::unwrap_used)]

use super::*;
use crate::corpus::{Container, Format};

fn turn(role: Role, content: &'static str) -> Turn<'static> {
    Turn::new(role, content)
}

fn user(content: &'static str) -> Turn<'static> {
    turn(Role::User, content)
}

fn agent(content: &'static str) -> Turn<'static> {
    turn(Role::Assistant, content)
}

fn labelled(label: Label, content: &'static str) -> Turn<'static> {
    Turn { label, ..user(content) }
}

fn dsat(content: &'static str) -> Turn<'static> {
    labelled(Label::Dsat, content)
}

fn sat(content: &'static str) -> Turn<'static> {
    labelled(Label::Sat, content)
}

fn extract(conversations: &[Vec<Turn<'static>>]) -> (Counts, Vec<Record>) {
    let mut records = Vec::new();
    let mut sink = |record| records.push(record);
    let counts = Counts::new("f".to_owned(), Format::Messages, Container::JsonLines, 0);
    let mut extractor = Extractor::new(counts, &mut sink);
    conversations.iter().for_each(|turns| extractor.conversation(turns));
    let counts = extractor.into_counts();
    assert_eq!(
        counts.labels.dsat,
        counts.kept(Kind::Dsat) + counts.dropped(Kind::Dsat),
        "{counts:?}"
    );
    assert_eq!(counts.labels.sat, counts.kept(Kind::Sat) + counts.dropped(Kind::Sat), "{counts:?}");
    (counts, records)
}

/// The reason for which the only candidate of `kind` was dropped.
fn dropped(kind: Kind, turns: Vec<Turn<'static>>) -> Option<DropReason> {
    let (counts, _) = extract(&[turns]);
    let reasons = counts.dropped.get(&kind)?;
    assert_eq!(reasons.values().sum::<u64>(), 1, "{reasons:?}");
    reasons.keys().next().copied()
}

#[test]
fn one_conversation_gives_all_three_kinds() {
    let turns = vec![
        user("x1"),
        agent("y1"),
        user("x2"),
        agent("bad"),
        dsat("no"),
        agent("good"),
        sat("thanks"),
    ];
    let (counts, records) = extract(&[turns]);
    let context = |texts: &[(Role, &str)]| -> Vec<Message> {
        texts.iter().map(|(role, text)| Message::new(*role, *text)).collect()
    };
    let x = context(&[(Role::User, "x1"), (Role::Assistant, "y1"), (Role::User, "x2")]);
    let mut x_to_good = x.clone();
    x_to_good.extend(context(&[(Role::Assistant, "bad"), (Role::User, "no")]));
    let origin = Origin { file: "f".to_owned(), record: 0 };
    assert_eq!(
        records,
        [
            Record::Dsat(DsatSample {
                context: x.clone(),
                rejected: "bad".to_owned(),
                feedback: "no".to_owned(),
                origin: origin.clone()
            }),
            Record::Seed(SeedPair {
                context: x,
                chosen: "good".to_owned(),
                rejected: "bad".to_owned(),
                origin: origin.clone()
            }),
            Record::Sat(SatSample { context: x_to_good, chosen: "good".to_owned(), origin }),
        ]
    );
    assert_eq!(
        (counts.conversations_with_dsat, counts.conversations_with_sat, counts.utterances),
        (1, 1, 7)
    );
}

#[test]
fn mixed_and_missing_labels_give_nothing() {
    for label in [Label::Mixed, Label::Missing, Label::Neither] {
        let (counts, records) = extract(&[vec![user("x"), agent("y"), labelled(label, "hm")]]);
        assert_eq!((records.len(), counts.conversations), (0, 1), "{label:?}");
        assert_eq!(counts.labels.mixed, u64::from(label == Label::Mixed));
        assert_eq!(counts.labels.missing, 1 + u64::from(label == Label::Missing));
        assert_eq!(counts.labels.neither, u64::from(label == Label::Neither));
    }
}

#[test]
fn a_mixed_turn_between_is_no_seed_pair() {
    let (counts, _) = extract(&[vec![
        user("x"),
        agent("a"),
        dsat("no"),
        agent("b"),
        labelled(Label::Mixed, "hm"),
        agent("c"),
        sat("ok"),
    ]]);
    assert_eq!(
        (counts.kept(Kind::Dsat), counts.kept(Kind::Sat), counts.kept(Kind::Seed)),
        (1, 1, 0)
    );
}

#[test]
fn every_broken_rule_has_its_reason() {
    let cases = [
        (DropReason::NoReply, vec![dsat("no")]),
        (DropReason::TwoUserTurns, vec![user("x"), dsat("no")]),
        (DropReason::OpensWithReply, vec![agent("hello"), dsat("no")]),
        (DropReason::OpensWithReply, vec![agent("hello"), user("x"), agent("y"), dsat("no")]),
        (DropReason::OpensWithReply, vec![turn(Role::System, "s"), agent("hello"), dsat("no")]),
        (DropReason::EmptyReply, vec![user("x"), agent(" \n"), dsat("no")]),
        (DropReason::EmptyFeedback, vec![user("x"), agent("y"), dsat("")]),
        (DropReason::EmptyTurn, vec![user(""), agent("y"), dsat("no")]),
        (DropReason::EmptyTurn, vec![user("x"), agent(""), user("x2"), agent("y"), dsat("no")]),
        (DropReason::TwoUserTurns, vec![user("x"), user("x2"), agent("y"), dsat("no")]),
        (DropReason::TwoReplies, vec![user("x"), agent("y"), agent("y2"), dsat("no")]),
        (
            DropReason::SystemInside,
            vec![user("x"), agent("y"), turn(Role::System, "s"), user("x"), agent("y"), dsat("no")],
        ),
        (DropReason::ToolTurn, vec![user("x"), turn(Role::Tool, "t"), agent("y"), dsat("no")]),
        (
            DropReason::MissingTurn,
            vec![user("x"), Turn { after_gap: true, ..agent("y") }, dsat("no")],
        ),
        (
            DropReason::MissingTurn,
            vec![user("x"), agent("y"), Turn { after_gap: true, ..dsat("no") }],
        ),
    ];
    for (reason, turns) in cases {
        assert_eq!(dropped(Kind::Dsat, turns.clone()), Some(reason), "{turns:?}");
    }
    let fine = vec![turn(Role::System, "be kind"), user("x"), agent("y"), dsat("no")];
    assert_eq!(dropped(Kind::Dsat, fine), None);
}

#[test]
fn seed_pairs_need_one_other_reply_between() {
    let pair = |between: &[Turn<'static>]| {
        let mut turns = vec![user("x"), agent("a"), dsat("no")];
        turns.extend_from_slice(between);
        turns.push(sat("yes"));
        dropped(Kind::Seed, turns)
    };
    assert_eq!(pair(&[agent("b")]), None);
    assert_eq!(pair(&[agent("a")]), Some(DropReason::SameReplies));
    assert_eq!(pair(&[agent("")]), Some(DropReason::EmptyReply));
    assert_eq!(pair(&[agent("b"), agent("c")]), Some(DropReason::TwoReplies));
    assert_eq!(pair(&[]), Some(DropReason::TwoUserTurns));
    assert_eq!(pair(&[Turn { after_gap: true, ..agent("b") }]), Some(DropReason::MissingTurn));
}

#[test]
fn the_same_context_and_reply_is_taken_once() {
    let turns = |feedback| vec![user("x"), agent("y"), dsat(feedback)];
    let other = vec![user("x"), agent("z"), dsat("no")];
    let (counts, records) = extract(&[turns("no"), turns("wrong"), other]);
    assert_eq!(records.len(), 2);
    assert_eq!(counts.dropped_for(Kind::Dsat, DropReason::Duplicate), 1);
    // Where one text ends and the next begins is part of what is compared.
    let (_, records) = extract(&[
        vec![user("ab"), agent("c"), dsat("no")],
        vec![user("a"), agent("bc"), dsat("no")],
    ]);
    assert_eq!(records.len(), 2);
}
