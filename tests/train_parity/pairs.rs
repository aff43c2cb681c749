//! Preference pairs at the extremes, and real ones; and their reference log-probabilities.

use drift_worker::train::{ReferenceLogps, TokenPair, Trainer};
use serde_json::Value;

use super::trl::text;
use crate::support::training::{micro_batches, pair};
use crate::support::{data, demo_model, python};

/// The longest that the published recipe lets a sequence be, and a prompt in it.
const MAX_LENGTH: usize = 2048;
const MAX_PROMPT: usize = 1024;

/// The extremes side by side. The shortest prompt is one token, as a rule BOS:
/// without it nothing would predict a reply's first token. The longest reply
/// leaves a sequence at [`MAX_LENGTH`], behind the shortest and the longest prompt.
pub(super) fn ragged(vocabulary: u32) -> Vec<TokenPair> {
    let longest = MAX_LENGTH - MAX_PROMPT;
    [
        [1, 1, 1],
        [1, MAX_LENGTH - 1, 2],
        [1, 1, MAX_LENGTH - 1],
        [MAX_PROMPT, longest, 1],
        [MAX_PROMPT, 1, longest],
        [MAX_PROMPT, 1, 1],
        [7, 300, 299],
        [613, 2, 31],
    ]
    .into_iter()
    .enumerate()
    .map(|(id, lengths)| pair(id as u64, lengths, vocabulary))
    .collect()
}

/// Real pairs as the demo model's ids; prompts lose their beginning and replies
/// their end where they are longer than given.
pub(super) fn real(count: usize, max_prompt: usize, max_reply: usize) -> Vec<TokenPair> {
    let (model, corpus) = (demo_model(), data("wildfeedback.json"));
    let [count, max_prompt, max_reply] = [count, max_prompt, max_reply].map(|n| n.to_string());
    let args = ["pairs", text(&model), text(&corpus), &count, &max_prompt, &max_reply];
    let reply: Value = serde_json::from_str(&python("train_inputs.py", &args)).unwrap();
    let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let pairs: Vec<TokenPair> = reply["pairs"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(at, pair)| TokenPair {
            pair: at as u64,
            prompt: ids(&pair["prompt"]),
            chosen: ids(&pair["chosen"]),
            rejected: ids(&pair["rejected"]),
            reference: None,
        })
        .collect();
    assert_eq!(pairs.len().to_string(), count);
    pairs
}

/// `pairs` with log-probabilities by `reference`, scored `batch` pairs at a time.
pub(super) fn with_reference(
    reference: &Trainer,
    mut pairs: Vec<TokenPair>,
    batch: usize,
) -> Vec<TokenPair> {
    let scores = reference.score(&micro_batches(&pairs, batch), &|| false).unwrap();
    for (pair, logps) in pairs.iter_mut().zip(scores) {
        assert_eq!(pair.pair, logps.pair);
        pair.reference = Some(ReferenceLogps { chosen: logps.chosen, rejected: logps.rejected });
    }
    pairs
}
