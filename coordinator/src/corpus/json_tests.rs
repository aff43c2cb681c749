#![allow(clippy::unwrap_used)]

use std::io::Write;

use super::*;
use crate::corpus::{Container, CorpusError, DropReason, Kind, Record};
use crate::domain::Role;

fn read_with(text: &str, options: &ReadOptions) -> Result<(Counts, Vec<Record>), CorpusError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let mut records = Vec::new();
    let counts =
        crate::corpus::read(file.path(), options, &mut |_| {}, &mut |record| records.push(record))?;
    Ok((counts, records))
}

fn read_all(text: &str) -> (Counts, Vec<Record>) {
    read_with(text, &ReadOptions { max_malformed: 0.5, ..ReadOptions::default() }).unwrap()
}

fn refused(text: &str) -> String {
    read_with(text, &ReadOptions::default()).unwrap_err().to_string()
}

fn utterance(id: u64, role: &str, content: &str, labels: &str) -> String {
    format!(
        r#"{{"UtterranceId": {id}, "TurnId": 1, "Role": "{role}", "Content": {content}{labels}}}"#
    )
}

const DSAT: &str = r#", "Satisfaction": false, "Disatisfaction": true"#;
const SAT: &str = r#", "Satisfaction": true, "Disatisfaction": false"#;

#[test]
fn utterances_in_every_framing_give_the_same() {
    let rows = [
        utterance(0, "User", "\"x\"", ""),
        utterance(1, "Agent", "\"a \\\"quoted\\\" reply\"", DSAT),
        utterance(2, "User", "\"no\"", DSAT),
        utterance(3, "Agent", "\"better\"", ""),
        utterance(4, "User", "\"thanks\"", SAT),
        utterance(0, "User", "\"next\"", ""),
        utterance(1, "Agent", "null", ""),
        utterance(2, "User", "\"no\"", DSAT),
    ];
    let pretty = rows.each_ref().map(|row| row.replace(", ", ",\n  "));
    let framings = [
        (Container::JsonArray, format!("[{}]", rows.join(","))),
        (Container::JsonArray, format!("\u{feff}[\r\n{}\r\n]\r\n", pretty.join(",\r\n"))),
        (Container::JsonLines, rows.join("\n")),
        (Container::JsonSequence, pretty.join("\n")),
    ];
    for (container, text) in framings {
        let (counts, records) = read_all(&text);
        assert_eq!((counts.container, counts.format), (container, Format::Utterances));
        assert_eq!(
            (counts.records, counts.conversations, counts.malformed),
            (8, 2, 0),
            "{container}"
        );
        assert_eq!(counts.dropped_for(Kind::Dsat, DropReason::EmptyReply), 1);
        let kinds: Vec<Kind> = records.iter().map(Record::kind).collect();
        assert_eq!(kinds, [Kind::Dsat, Kind::Seed, Kind::Sat], "{container}");
        let Record::Dsat(sample) = &records[0] else { panic!() };
        assert_eq!((sample.rejected.as_str(), sample.origin.record), ("a \"quoted\" reply", 2));
    }
}

#[test]
fn spellings_absent_labels_and_nan_are_borne() {
    let rows = [
        utterance(0, "User", "\"x\"", ""),
        utterance(1, "Agent", "\"NaN\"", ""),
        utterance(2, "User", "\"no\"", r#", "Satisfaction": NaN, "Dissatisfaction": true"#),
    ];
    // The keys spelt right; the published ones have an `r` too many and an `s` too few.
    let rows = rows.map(|row| row.replace("UtterranceId", "UtteranceId"));
    let (counts, records) = read_all(&format!("[{}]", rows.join(",")));
    let Record::Dsat(sample) = &records[0] else { panic!() };
    assert_eq!(sample.rejected, "NaN");
    assert_eq!((counts.labels.dsat, counts.labels.missing), (1, 1));
    assert_eq!(
        nan_to_null(br#"{"a\"NaN": NaN, "b": "\\", "c": [NaN]}"#),
        br#"{"a\"NaN": null, "b": "\\", "c": [null]}"#
    );
}

#[test]
fn a_lost_utterance_never_welds_conversations() {
    // The opening of the second conversation is malformed: its turns must not
    // pass for the first one's.
    let rows = [
        utterance(0, "User", "\"x\"", ""),
        utterance(0, "User", "7", ""),
        utterance(1, "Agent", "\"y\"", ""),
        utterance(2, "User", "\"no\"", DSAT),
        utterance(0, "User", "\"x3\"", ""),
        utterance(1, "Agent", "\"y3\"", ""),
        utterance(2, "User", "\"no\"", DSAT),
    ];
    let (counts, records) = read_all(&format!("[{}]", rows.join(",\n")));
    assert_eq!(records.len(), 1);
    assert_eq!(counts.dropped_for(Kind::Dsat, DropReason::MissingTurn), 1);
    assert_eq!((counts.malformed, counts.examples[0].place.record), (1, 1));
    let example = counts.examples[0].to_string();
    assert!(
        example.starts_with("record 1 (line 2, byte ") && example.contains("expected a string"),
        "{example}"
    );

    // So does a number that skips or falls back.
    let skipping =
        [0, 1, 4].map(|id| utterance(id, if id == 1 { "Agent" } else { "User" }, "\"t\"", DSAT));
    let falling =
        [3, 1, 2].map(|id| utterance(id, if id == 1 { "Agent" } else { "User" }, "\"t\"", DSAT));
    for rows in [skipping, falling] {
        let (counts, records) = read_all(&format!("[{}]", rows.join(",")));
        assert_eq!(records.len(), 0, "{counts:?}");
        assert!(counts.dropped_for(Kind::Dsat, DropReason::MissingTurn) > 0, "{counts:?}");
    }
}

#[test]
fn pairs_of_every_spelling() {
    let wildfeedback = r#"{"conversations": [{"from": "human", "value": "x"}], "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "a"}}"#;
    let roles = r#"{"conversations": [{"role": "user", "content": "x2"}], "chosen": {"role": "assistant", "content": "b"}, "rejected": {"role": "assistant", "content": "a"}}"#;
    let ultra = r#"{"prompt": "x3", "chosen": [{"content": "x3", "role": "user"}, {"content": "b", "role": "assistant"}], "rejected": [{"content": "x3", "role": "user"}, {"content": "a", "role": "assistant"}]}"#;
    let text = r#"{"prompt": "x4", "chosen": "b", "rejected": "a"}"#;
    let (counts, records) = read_all(&[wildfeedback, roles, ultra, text, text].join("\n"));
    for (i, record) in records.iter().enumerate() {
        let Record::Seed(pair) = record else { panic!() };
        assert_eq!(
            (pair.chosen.as_str(), pair.rejected.as_str(), pair.origin.record),
            ("b", "a", i as u64)
        );
        assert_eq!((pair.context.len(), pair.context[0].role), (1, Role::User));
    }
    assert_eq!((records.len(), counts.dropped_for(Kind::Seed, DropReason::Duplicate)), (4, 1));

    let same = r#"{"prompt": "x", "chosen": "a", "rejected": "a"}"#;
    let empty = r#"{"prompt": "x", "chosen": "a", "rejected": " "}"#;
    let differ = r#"{"chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "y"}, {"role": "assistant", "content": "b"}]}"#;
    let (counts, _) = read_all(&[same, empty, differ].join("\n"));
    for reason in [DropReason::SameReplies, DropReason::EmptyReply, DropReason::ContextsDiffer] {
        assert_eq!(counts.dropped_for(Kind::Seed, reason), 1, "{reason}");
    }
}

#[test]
fn messages_carry_labels_on_user_turns() {
    let line = r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a", "label": null}, {"role": "user", "content": "no", "label": "dsat"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "ta", "label": "sat"}]}"#;
    let wildchat = r#"{"conversation_hash": "h", "conversation": [{"role": "user", "content": "x", "toxic": false}, {"role": "assistant", "content": "y"}]}"#;
    let (counts, records) = read_all(&format!("{line}\n{wildchat}\n"));
    let kinds: Vec<Kind> = records.iter().map(Record::kind).collect();
    assert_eq!(kinds, [Kind::Dsat, Kind::Seed, Kind::Sat]);
    assert_eq!(
        (counts.conversations, counts.utterances, counts.conversations_with_dsat),
        (2, 7, 1)
    );
}

#[test]
fn malformed_records_are_skipped_up_to_the_set_share() {
    let good = r#"{"prompt": "x", "rejected": "a", "user_preference": "no"}"#;
    let mut lines = vec![good; 99];
    lines.insert(40, r#"{"prompt": "x", "rejected": "a""#);
    let text = lines.join("\n");
    let (counts, _) = read_with(&text, &ReadOptions::default()).unwrap();
    assert_eq!((counts.malformed, counts.examples[0].place.line), (1, Some(41)));
    assert_eq!(counts.examples[0].text, r#"{"prompt": "x", "rejected": "a""#);

    lines.insert(41, "{");
    let refused = refused(&lines.join("\n"));
    assert!(
        refused.contains("2 of 101 records are malformed (1.98 %, at most 1.00 % allowed)"),
        "{refused}"
    );
    assert!(
        refused.contains("record 40 (line 41, byte ") && refused.contains("max_malformed"),
        "{refused}"
    );
}

#[test]
fn cut_files_are_refused_unless_allowed() {
    let rows = [
        utterance(0, "User", "\"x\"", ""),
        utterance(1, "Agent", "\"y\"", ""),
        utterance(2, "User", "\"no\"", DSAT),
    ];
    let lines = r#"{"prompt": "x", "rejected": "a", "user_preference": "no"}"#.to_owned()
        + "\n{\"prompt\": \"x";
    for cut in
        [format!("[{},\n{{\"Utter", rows.join(",\n")), format!("[{}", rows.join(",\n")), lines]
    {
        let message = refused(&cut);
        assert!(
            message.contains(&format!("ends at byte {}", cut.len()))
                && message.contains("allow_truncated"),
            "{message}"
        );
        let options = ReadOptions { allow_truncated: true, ..ReadOptions::default() };
        let (counts, records) = read_with(&cut, &options).unwrap();
        assert!(counts.truncated.is_some());
        assert_eq!(records.len(), 1);
        assert!(counts.to_string().contains("the file ends too early"), "{counts}");
    }
}

#[test]
fn refusals_say_what_was_expected_and_what_to_do() {
    assert!(refused("").contains("holds no records"));
    assert!(refused(" [ ] ").contains("holds no records"));
    assert!(refused("prompt,rejected\n").contains("it begins with 'p'"));
    let unknown = refused(r#"[{"instruction": "x", "output": "y"}]"#);
    assert!(
        unknown.contains("keys instruction, output") && unknown.contains("user_preference"),
        "{unknown}"
    );
    let options = ReadOptions { format: Some(Format::Utterances), ..ReadOptions::default() };
    let wrong = read_with(r#"[{"messages": []}]"#, &options).unwrap_err().to_string();
    assert!(wrong.contains("no well-formed record of the format utterances"), "{wrong}");
    assert!(
        wrong.contains("missing field `UtterranceId`") && wrong.contains("check the format"),
        "{wrong}"
    );
    let options = ReadOptions::default();
    let missing =
        crate::corpus::read(Path::new("no/such.json"), &options, &mut |_| {}, &mut |_| {})
            .unwrap_err();
    assert!(missing.to_string().starts_with("cannot open no/such.json"), "{missing}");
}

#[test]
fn progress_is_told_by_the_mebibyte_and_at_the_end() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let line = format!(
        r#"{{"prompt": "{}", "rejected": "a", "user_preference": "no"}}"#,
        "x".repeat(100_000)
    );
    for _ in 0..50 {
        writeln!(file, "{line}").unwrap();
    }
    let mut told = Vec::new();
    let counts = crate::corpus::read(
        file.path(),
        &ReadOptions::default(),
        &mut |read| told.push(read),
        &mut |_| {},
    )
    .unwrap();
    assert_eq!(told.last(), Some(&counts.bytes));
    assert!(told.len() <= 6 && told.windows(2).all(|pair| pair[0] <= pair[1]), "{told:?}");
}

#[test]
fn counts_survive_json() {
    let (counts, _) = read_all(&format!("[{}, 7]", utterance(0, "User", "\"x\"", DSAT)));
    let json = serde_json::to_string(&counts).unwrap();
    assert!(json.contains(r#""dropped":{"dsat":{"no_reply":1}}"#), "{json}");
    assert_eq!(serde_json::from_str::<Counts>(&json).unwrap(), counts);
    let table = counts.to_string();
    assert!(
        table.contains("no reply stands before the user's judgement") && table.contains("record 1"),
        "{table}"
    );
}
