//! What a reward model reads of a prompt and a reply, in its own token ids.
//!
//! | model | reads | too long |
//! |---|---|---|
//! | DeBERTa-v2 | `[CLS] question [SEP] answer [SEP]` | the oldest turns of the question go first, all but the last; then the longer of both loses its end, as with `transformers`' `truncation=True` |
//! | a decoder | the conversation with the reply, by that model's chat template | its end is kept, where the rating is read |
//!
//! The question is the text of x. Where x has several turns, they stand behind one another
//! with a blank line between, without the names of who speaks: these models were trained on
//! questions and answers, and know no template.

mod pair;

use std::path::{Path, PathBuf};

use jiff::civil::Date;
use serde_json::Value;
use sha2::{Digest, Sha256};

use self::pair::PairText;
use super::error::TextError;
use super::files::{CheckpointFile, carried, read_json};
use super::model::{TextModel, TextOptions, keep_end};
use crate::domain::{Message, Role};

/// Text side of a reward model. `Sync`: threads may share it.
#[derive(Debug)]
pub struct RewardText {
    directory: PathBuf,
    max_length: usize,
    form: Form,
    sha256: [u8; 32],
}

#[derive(Debug)]
enum Form {
    /// A question and an answer.
    Pair(Box<PairText>),
    /// A conversation.
    Chat(Box<TextModel>),
}

impl RewardText {
    /// Loads the text side of the reward model in `directory`. Sequences have at most
    /// `max_length` tokens; 0 takes as many as the model has positions. `today` is what a
    /// chat template sees as the date.
    ///
    /// # Errors
    /// A missing or malformed file, a model that does not rate, or one with fewer positions.
    pub fn load(directory: &Path, max_length: usize, today: Date) -> Result<Self, TextError> {
        let path = directory.join("config.json");
        let config = read_json(&path)?;
        rates(&config)
            .map_err(|reason| TextError::Reward { directory: directory.to_path_buf(), reason })?;
        let positions = config.get("max_position_embeddings").and_then(Value::as_u64);
        let positions = positions.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
        let max_length = match (max_length, positions) {
            (0, Some(positions)) => positions,
            (asked, Some(positions)) if asked <= positions => asked,
            _ => {
                return Err(TextError::Unexpected {
                    path,
                    place: "max_position_embeddings".to_owned(),
                    expected: "a number of positions, and at least reward.max_length",
                    found: config["max_position_embeddings"].to_string(),
                });
            }
        };
        let form = if config["model_type"] == "deberta-v2" {
            Form::Pair(Box::new(PairText::load(directory, max_length)?))
        } else {
            let options = TextOptions { chat_template: None, today };
            let text = TextModel::load(directory, &options).map_err(|error| match error {
                TextError::NoTemplate { directory, looked_at } => TextError::Reward {
                    directory,
                    reason: format!("no chat template: looked for {looked_at}; put it there"),
                },
                other => other,
            })?;
            Form::Chat(Box::new(text))
        };
        let sha256 = fingerprint(directory, max_length)?;
        Ok(Self { directory: directory.to_path_buf(), max_length, form, sha256 })
    }

    /// Where the model lies.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// SHA-256 over what sequences are made by.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.sha256
    }

    /// Tokens of a sequence at most.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// What the model reads of `reply` to `context`.
    ///
    /// # Errors
    /// [`TextError::Refused`] where the chat template raises, and the tokenizer's.
    pub fn sequence(&self, context: &[Message], reply: &str) -> Result<Vec<u32>, TextError> {
        match &self.form {
            Form::Pair(text) => text.sequence(context, reply),
            Form::Chat(text) => {
                let mut messages = context.to_vec();
                messages.push(Message::new(Role::Assistant, reply));
                let ids = text.encode(&text.apply_chat_template(&messages, false)?)?;
                Ok(keep_end(ids, self.max_length))
            }
        }
    }
}

/// SHA-256 over the files that decide a sequence, and its length.
fn fingerprint(directory: &Path, max_length: usize) -> Result<[u8; 32], TextError> {
    let mut hash = Sha256::new();
    hash.update((max_length as u64).to_le_bytes());
    let mut files = carried(directory, None);
    files.push(CheckpointFile {
        name: "config.json".to_owned(),
        source: directory.join("config.json"),
    });
    for CheckpointFile { name, source } in files {
        let bytes = std::fs::read(&source)
            .map_err(|error| TextError::Read { path: source, source: error })?;
        hash.update(name.as_bytes());
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    Ok(hash.finalize().into())
}

/// Whether a `config.json` is of a model that says one number of a sequence.
///
/// # Errors
/// What it is instead.
fn rates(config: &Value) -> Result<(), String> {
    let architecture = config["architectures"][0].as_str().unwrap_or("none");
    if !architecture.ends_with("ForSequenceClassification") {
        return Err(format!(
            "config.json names the architecture {architecture}; it takes a ...ForSequenceClassification with one label"
        ));
    }
    // As `transformers` has it, where neither is written.
    let labels = config["num_labels"].as_u64();
    let labels = labels.or_else(|| config["id2label"].as_object().map(|map| map.len() as u64));
    match labels.unwrap_or(2) {
        1 => Ok(()),
        labels => Err(format!(
            "config.json (id2label, num_labels) has {labels} labels; a reward model has one"
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
