//! Replies are cut ahead of stop strings as a real tokenizer spells them.

use drift_coordinator::domain::{FinishReason, PromptId, Sample};
use drift_coordinator::text::{TextModel, TextOptions, cut_at_stops};
use serde_json::Value;

use crate::support::{data, demo_model};

/// Characters of several tokens, and tokens of several characters.
const WIDE: [&str; 3] =
    ["Ein Übermaß: 3 €, 日本語の文 🙂🙃 und mehr", "🙂🙂🙂🙂###🙂", "a\n\n\nUser: b\r\n"];

#[test]
fn a_cut_reply_says_all_that_stands_ahead_of_the_stop_string() {
    let options = TextOptions { chat_template: None, today: jiff::civil::date(2026, 1, 1) };
    let model = TextModel::load(&demo_model(), &options).unwrap();
    let corpus = std::fs::read_to_string(data("dsat_data.jsonl")).unwrap();
    let reply = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        row["rejected"][0]["content"].as_str().unwrap().to_owned()
    };
    let replies = corpus.lines().map(reply).chain(WIDE.map(str::to_owned));

    let (mut cut_in_two, mut cuts) = (0, 0);
    for (at, reply) in replies.enumerate() {
        let tokens = model.encode(&reply).unwrap();
        let characters: Vec<char> = reply.chars().collect();
        for (round, length) in [1, 2, 5].into_iter().enumerate() {
            let start = (at * 7_919 + round * 104_729) % characters.len();
            let stop: String = characters[start..].iter().take(length).collect();
            let expected = &reply[..reply.find(&stop).unwrap()];
            let finish = FinishReason::Length;
            let sample = Sample { prompt: PromptId(0), index: 0, tokens: tokens.clone(), finish };
            let cut = cut_at_stops(&model, vec![sample], std::slice::from_ref(&stop))
                .unwrap()
                .swap_remove(0);
            assert_eq!(model.decode(&cut.tokens).unwrap(), expected, "{stop:?} in {reply:?}");
            assert_eq!(cut.finish, FinishReason::Stop);
            cuts += 1;
            cut_in_two += usize::from(!tokens.starts_with(&cut.tokens));
        }
    }
    eprintln!("{cuts} replies cut, {cut_in_two} of them inside a token");
    assert!(cut_in_two > 100 && cut_in_two < cuts, "{cut_in_two} of {cuts}");
}
