//! What reward models read equals what `transformers` makes of the same texts.

use std::fs;

use anyhow::Result;
use drift_coordinator::domain::{Message, Role};
use drift_coordinator::text::RewardText;
use serde_json::json;

use super::{TODAY, conversations};
use crate::support::{ask, data, demo_model, model::text, model::token_lists, python};

/// Questions and answers of real conversations; some are far longer than a sequence.
fn pairs() -> Result<Vec<(Vec<Message>, String)>> {
    let mut pairs = Vec::new();
    for (messages, _) in conversations()?.into_iter().step_by(5) {
        for turns in messages.windows(2).filter(|turns| turns[0].role == Role::User) {
            pairs.push((turns[..1].to_vec(), turns[1].content.clone()));
        }
    }
    let long = "why is it so, and since when? ".repeat(300);
    let question = |text: &str| vec![Message::new(Role::User, text)];
    pairs.extend([
        (question(&long), "short".to_owned()),
        (question("short"), long.clone()),
        (question(&long), long.clone()),
        (question(""), long),
        (question(" \u{a0}ﬁne [SEP] [CLS]\n"), "\tçà, 東京 😀 </s> ".to_owned()),
    ]);
    Ok(pairs)
}

#[test]
fn pairs_are_tokenised_and_cut_as_transformers_does() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("reward");
    python("reward_text.py", &["pair", text(&model), text(&data("wildfeedback.json"))]);
    let reward = RewardText::load(&model, 0, TODAY)?;
    assert_eq!(reward.max_length(), 512);
    let pairs = pairs()?;
    let request = folder.path().join("request.json");
    let texts: Vec<_> = pairs.iter().map(|(x, reply)| json!([x[0].content, reply])).collect();
    fs::write(&request, json!(texts).to_string())?;
    let reply = ask("reward_text.py", &["sequences", text(&model), text(&request)]);
    let expected = token_lists(&reply["ids"]);
    assert_eq!(expected.len(), pairs.len());
    let (mut cut, mut tokens) = (0, 0);
    for ((context, reply), expected) in pairs.iter().zip(&expected) {
        let ids = reward.sequence(context, reply)?;
        assert_eq!(ids, *expected, "{:?} {reply:?}", context[0].content);
        cut += usize::from(ids.len() == 512);
        tokens += ids.len();
    }
    eprintln!("{} pairs, {tokens} tokens, {cut} cut to 512", pairs.len());
    assert!(pairs.len() > 100 && cut > 20);
    Ok(())
}

#[test]
fn conversations_are_rendered_as_transformers_does() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("reward");
    python("reward_text.py", &["chat", text(&model), text(&demo_model())]);
    let reward = RewardText::load(&model, 0, TODAY)?;
    let mut cases = Vec::new();
    for (mut messages, _) in conversations()?.into_iter().step_by(10) {
        while messages.pop_if(|last| last.role == Role::User).is_some() {}
        if let Some(reply) = messages.pop() {
            cases.push((messages, reply));
        }
    }
    let whole = |(context, reply): &(Vec<Message>, Message)| {
        json!(context.iter().chain([reply]).collect::<Vec<_>>())
    };
    let request = folder.path().join("request.json");
    fs::write(&request, json!(cases.iter().map(whole).collect::<Vec<_>>()).to_string())?;
    let answer = ask("reward_text.py", &["sequences", text(&model), text(&request)]);
    for ((context, reply), expected) in cases.iter().zip(token_lists(&answer["ids"])) {
        let ids = reward.sequence(context, &reply.content)?;
        let kept = expected.len().saturating_sub(reward.max_length());
        assert_eq!(ids, expected[kept..]);
    }
    eprintln!("{} conversations", cases.len());
    assert!(cases.len() > 50);
    Ok(())
}
