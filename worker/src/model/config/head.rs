//! What stands behind the final norm.

use serde_json::Value;

use super::file::ConfigFile;
use crate::model::error::ModelError;

/// What stands behind the final norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// One score for each token of the vocabulary, by the embedding itself.
    Tied,
    /// One score for each token of the vocabulary, by `lm_head`.
    Vocabulary,
    /// One number, by `score`: a sequence classifier with one label, which rates replies.
    Rating,
}

/// Checks that what a sequence classifier says is one number.
pub(crate) fn check_one_label(file: &ConfigFile) -> Result<(), ModelError> {
    // As transformers: a list of names goes before a number, and there are 2 without either.
    let (field, labels) = match (file.entries.get("id2label"), file.entries.get("num_labels")) {
        (Some(Value::Object(names)), _) => ("id2label", Some(names.len() as u64)),
        (None | Some(Value::Null), None | Some(Value::Null)) => ("num_labels", Some(2)),
        (_, number) => ("num_labels", number.and_then(Value::as_u64)),
    };
    if labels == Some(1) {
        return Ok(());
    }
    let found = match labels {
        Some(labels) => format!("of {labels} labels"),
        None => "no number".to_owned(),
    };
    let supported = "1 label, whose score is the rating";
    Err(ModelError::unsupported(&file.path, field, found, supported))
}
