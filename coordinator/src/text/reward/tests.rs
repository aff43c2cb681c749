use jiff::civil::date;
use serde_json::json;

use super::super::fixture::{self, ASSISTANT, END, TEMPLATE, USER, word, words, write_json};
use super::*;

fn turns(texts: &[&str]) -> Vec<Message> {
    let roles = [Role::User, Role::Assistant].into_iter().cycle();
    roles.zip(texts).map(|(role, text)| Message::new(role, *text)).collect()
}

/// A reward model of this `config.json`, beside the fixture's tokenizer.
fn load(config: Value, max_length: usize) -> Result<RewardText, TextError> {
    let folder = tempfile::tempdir().unwrap();
    fixture::write(folder.path(), TEMPLATE);
    write_json(folder.path(), "config.json", &config);
    RewardText::load(folder.path(), max_length, date(2026, 2, 3))
}

fn config(model_type: &str) -> Value {
    json!({
        "architectures": ["SomeForSequenceClassification"], "model_type": model_type,
        "id2label": {"0": "LABEL_0"}, "max_position_embeddings": 16,
    })
}

/// The fixture's tokenizer writes a pair as its two texts alone.
fn pair(max_length: usize) -> RewardText {
    load(config("deberta-v2"), max_length).unwrap()
}

fn ids(numbers: impl IntoIterator<Item = u32>) -> Vec<u32> {
    numbers.into_iter().map(word).collect()
}

#[test]
fn a_pair_is_a_question_and_an_answer_and_the_longer_loses_its_end() {
    let reward = pair(0);
    assert_eq!(reward.max_length(), 16);
    let of = |question: &str, answer: &str| reward.sequence(&turns(&[question]), answer).unwrap();
    assert_eq!(of("w1 w2", "w3"), ids([1, 2, 3]));
    assert_eq!(of(&words(20), "w30 w31"), ids((0..14).chain([30, 31])));
    assert_eq!(of("w30 w31", &words(20)), ids([30, 31].into_iter().chain(0..14)));
    assert_eq!(of(&words(20), &words(20)), ids((0..8).chain(0..8)));
}

#[test]
fn of_a_conversation_the_oldest_turns_go_before_the_last_is_cut() {
    let of = |max_length, texts: &[&str]| pair(max_length).sequence(&turns(texts), "w9").unwrap();
    let texts = ["w1 w2", "w3 w4", "w5 w6 w7"];
    assert_eq!(of(8, &texts), ids([1, 2, 3, 4, 5, 6, 7, 9]));
    assert_eq!(of(7, &texts), ids([3, 4, 5, 6, 7, 9]));
    assert_eq!(of(4, &texts), ids([5, 6, 7, 9]));
    assert_eq!(of(3, &texts), ids([5, 6, 9]));
}

#[test]
fn a_decoder_reads_the_conversation_by_its_template_and_keeps_the_end() {
    let of = |max_length| {
        let reward = load(config("llama"), max_length).unwrap();
        reward.sequence(&turns(&["w1 w2"]), "w3").unwrap()
    };
    assert_eq!(of(16), [USER, word(1), word(2), ASSISTANT, word(3), END]);
    assert_eq!(of(3), [ASSISTANT, word(3), END]);
    let reward = load(config("llama"), 0).unwrap();
    let system = [Message::new(Role::System, "w0")];
    assert!(reward.sequence(&system, "w3").unwrap_err().is_refusal());
}

#[test]
fn what_is_no_reward_model_is_refused_by_what_it_is() {
    let refused = |change: &dyn Fn(&mut Value), max_length| {
        let mut config = config("deberta-v2");
        change(&mut config);
        load(config, max_length).unwrap_err().to_string()
    };
    let says = |error: String, words: &str| assert!(error.contains(words), "{error}");
    says(
        refused(&|c| c["architectures"] = json!(["LlamaForCausalLM"]), 0),
        "architecture LlamaForCausalLM; it takes a ...ForSequenceClassification",
    );
    says(refused(&|c| c["id2label"] = json!({"0": "a", "1": "b"}), 0), "has 2 labels");
    says(
        refused(
            &|c| {
                c.as_object_mut().unwrap().remove("id2label");
            },
            0,
        ),
        "has 2 labels",
    );
    says(refused(&|c| c["max_position_embeddings"] = Value::Null, 0), "max_position_embeddings");
    says(refused(&|_| {}, 17), "at least reward.max_length, found 16");
}

#[test]
fn a_decoder_without_a_template_is_refused_with_the_places_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    fixture::write(folder.path(), TEMPLATE);
    write_json(folder.path(), "tokenizer_config.json", &json!({"eos_token": "</s>"}));
    write_json(folder.path(), "config.json", &config("llama"));
    let error = RewardText::load(folder.path(), 0, date(2026, 2, 3)).unwrap_err().to_string();
    assert!(error.starts_with("reward model ") && error.contains("chat_template.jinja"), "{error}");
    assert!(!error.contains("text.chat_template"), "that setting is the policy's: {error}");
}

#[test]
fn its_fingerprint_is_that_of_its_files_and_its_length() {
    let (a, b) = (pair(0).fingerprint(), pair(0).fingerprint());
    assert_eq!(a, b);
    assert_ne!(a, pair(8).fingerprint());
    let mut other = config("deberta-v2");
    other["pad_token_id"] = json!(0);
    assert_ne!(a, load(other, 0).unwrap().fingerprint());
}
