//! Special tokens: their names for templates, and the ids at which a reply ends.

use std::collections::BTreeSet;
use std::path::Path;

use minijinja::value::Value;
use tokenizers::{AddedToken, Tokenizer};

use super::error::TextError;
use super::files::read_json_if_present;

/// The attributes that `transformers` hands to templates, where they are set.
const ATTRIBUTES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// `bos_token`, `eos_token` and their like, and the tokens that
/// `tokenizer_config.json` adds to the tokenizer.
#[derive(Debug, Default)]
pub(crate) struct SpecialTokens {
    named: Vec<(&'static str, String)>,
    additional: Vec<String>,
    added: Vec<(u32, AddedToken)>,
}

impl SpecialTokens {
    /// Reads them as `transformers` does: `tokenizer_config.json`, over which
    /// `special_tokens_map.json` goes in directories of the older kind, which
    /// have no `added_tokens_decoder`.
    pub(crate) fn read(directory: &Path) -> Result<Self, TextError> {
        let path = directory.join("tokenizer_config.json");
        let config = read_json_if_present(&path)?;
        let decoder = config.get("added_tokens_decoder").and_then(serde_json::Value::as_object);
        let map = match decoder {
            Some(_) => serde_json::Value::Null,
            None => read_json_if_present(&directory.join("special_tokens_map.json"))?,
        };
        let value = |name: &str| map.get(name).or_else(|| config.get(name));
        let mut tokens = Self::default();
        for name in ATTRIBUTES {
            if let Some(text) = value(name).and_then(token_text) {
                tokens.named.push((name, text));
            }
        }
        if let Some(list) = value("additional_special_tokens").and_then(serde_json::Value::as_array)
        {
            tokens.additional = list.iter().filter_map(token_text).collect();
        }
        for (id, entry) in decoder.into_iter().flatten() {
            let (Ok(id), Some(content)) = (id.parse::<u32>(), token_text(entry)) else {
                return Err(TextError::Unexpected {
                    path,
                    place: format!("added_tokens_decoder.{id}"),
                    expected: "a token id and an object with \"content\"",
                    found: entry.to_string(),
                });
            };
            let flag = |name: &str| entry.get(name).and_then(serde_json::Value::as_bool);
            let special = flag("special").unwrap_or(false);
            let token = AddedToken::from(content, special)
                .single_word(flag("single_word").unwrap_or(false))
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .normalized(flag("normalized").unwrap_or(!special));
            tokens.added.push((id, token));
        }
        tokens.added.sort_by_key(|(id, _)| *id);
        Ok(tokens)
    }

    /// The text of `eos_token`.
    pub(crate) fn eos(&self) -> Option<&str> {
        self.named.iter().find(|(name, _)| *name == "eos_token").map(|(_, text)| text.as_str())
    }

    /// Name and value of each token that is set.
    pub(crate) fn template_variables(&self) -> Vec<(String, Value)> {
        let mut variables: Vec<_> = self
            .named
            .iter()
            .map(|(name, text)| ((*name).to_owned(), Value::from(text.as_str())))
            .collect();
        if !self.additional.is_empty() {
            let list: Vec<Value> = self.additional.iter().map(Value::from).collect();
            variables.push(("additional_special_tokens".to_owned(), Value::from(list)));
        }
        variables
    }

    /// Adds to `tokenizer` what `tokenizer_config.json` declares and
    /// `tokenizer.json` lacks, and checks that each gets the id declared.
    pub(crate) fn add_to(
        &self,
        tokenizer: &mut Tokenizer,
        directory: &Path,
    ) -> Result<(), TextError> {
        let path = directory.join("tokenizer_config.json");
        let held = tokenizer.get_added_tokens_decoder();
        let missing = self
            .added
            .iter()
            .filter(|(_, token)| !held.values().any(|held| same_token(held, token)));
        let missing: Vec<&(u32, AddedToken)> = missing.collect();
        for (_, token) in &missing {
            let added = if token.special {
                tokenizer.add_special_tokens([token.clone()])
            } else {
                tokenizer.add_tokens([token.clone()])
            };
            added.map_err(|error| TextError::Tokenizer {
                path: path.clone(),
                reason: format!("add token {:?}: {error}", token.content),
            })?;
        }
        for (id, token) in missing {
            let got = tokenizer.token_to_id(&token.content);
            if got != Some(*id) {
                return Err(TextError::Unexpected {
                    path,
                    place: format!("added_tokens_decoder.{id}"),
                    expected: "the id that tokenizer.json gives the token",
                    found: format!("{:?}, which it numbers {got:?}", token.content),
                });
            }
        }
        Ok(())
    }
}

/// `AddedToken`'s own equality compares contents only.
fn same_token(a: &AddedToken, b: &AddedToken) -> bool {
    a.content == b.content
        && a.single_word == b.single_word
        && a.lstrip == b.lstrip
        && a.rstrip == b.rstrip
        && a.normalized == b.normalized
        && a.special == b.special
}

/// A token written as a string or as an object with `content`; empty is unset.
fn token_text(value: &serde_json::Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// `eos_token_id` of `generation_config.json` and of `config.json`, each a
/// number or a list, in rising order.
pub(crate) fn configured_stop_ids(directory: &Path) -> Result<BTreeSet<u32>, TextError> {
    let mut ids = BTreeSet::new();
    for name in ["generation_config.json", "config.json"] {
        let path = directory.join(name);
        let document = read_json_if_present(&path)?;
        let value = document.get("eos_token_id").unwrap_or(&serde_json::Value::Null);
        let listed = match value {
            serde_json::Value::Null => &[],
            serde_json::Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        for entry in listed {
            let id = entry.as_u64().and_then(|id| u32::try_from(id).ok());
            ids.insert(id.ok_or_else(|| TextError::Unexpected {
                path: path.clone(),
                place: "eos_token_id".to_owned(),
                expected: "a token id or a list of token ids",
                found: value.to_string(),
            })?);
        }
    }
    Ok(ids)
}
