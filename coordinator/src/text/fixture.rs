//! A tiny model directory for unit tests: words separated by white space, a
//! template that closes replies with `<end>`, and a `tokenizer.json` that
//! carries truncation and padding as published ones do.

use std::path::Path;

use jiff::civil::date;
use serde_json::{Value, json};

use super::{TextModel, TextOptions};

/// Ids of the special tokens.
pub(crate) const EOS: u32 = 2;
pub(crate) const END: u32 = 3;
pub(crate) const USER: u32 = 4;
pub(crate) const ASSISTANT: u32 = 5;

/// The id of the word `wN`.
pub(crate) fn word(n: u32) -> u32 {
    10 + n
}

/// `w0 w1 … ` of `n` words.
pub(crate) fn words(n: u32) -> String {
    (0..n).map(|n| format!("w{n}")).collect::<Vec<_>>().join(" ")
}

pub(crate) const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'system' %}\
{{ raise_exception('no system role here') }}{% endif %}<{{ m.role }}> {{ m.content }}\
{% if m.role == 'assistant' %} <end>{% endif %}\n\n{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}";

/// Writes the directory.
pub(crate) fn write(directory: &Path, template: &str) {
    let special = ["<unk>", "<s>", "</s>", "<end>", "<user>", "<assistant>"];
    let added: Vec<Value> = (0_u32..)
        .zip(special)
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let mut vocabulary = serde_json::Map::new();
    for (id, token) in (0_u32..).zip(special) {
        vocabulary.insert(token.to_owned(), json!(id));
    }
    for n in 0..3_000 {
        vocabulary.insert(format!("w{n}"), json!(word(n)));
    }
    let tokenizer = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    write_json(directory, "tokenizer.json", &tokenizer);
    write_json(
        directory,
        "tokenizer_config.json",
        &json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}),
    );
    write_json(directory, "generation_config.json", &json!({"eos_token_id": [EOS, END]}));
    write_json(directory, "config.json", &json!({"eos_token_id": EOS}));
}

pub(crate) fn write_json(directory: &Path, name: &str, value: &Value) {
    std::fs::write(directory.join(name), value.to_string()).unwrap();
}

/// Options without a named template, on a fixed day.
pub(crate) fn options() -> TextOptions {
    TextOptions { chat_template: None, today: date(2026, 2, 3) }
}

/// The model with `template`.
pub(crate) fn model_with(template: &str) -> TextModel {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), template);
    TextModel::load(directory.path(), &options()).unwrap()
}

/// The model with [`TEMPLATE`].
pub(crate) fn model() -> TextModel {
    model_with(TEMPLATE)
}
