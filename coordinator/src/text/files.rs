//! Reading a model directory's text files, with errors that name them.

use std::path::{Path, PathBuf};

use super::error::TextError;

/// Files that make a checkpoint speak, beside its weights and `config.json`.
const NAMES: [&str; 15] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    // How a multimodal model takes its images.
    "preprocessor_config.json",
    "processor_config.json",
];

/// A file that a published checkpoint carries along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointFile {
    /// Its name in the checkpoint.
    pub name: String,
    /// Where it is copied from.
    pub source: PathBuf,
}

/// Those of the known files that `directory` holds. A template named by the
/// settings takes the place of `chat_template.jinja`, so that the checkpoint
/// speaks elsewhere as it did here.
pub(crate) fn carried(directory: &Path, chat_template: Option<&Path>) -> Vec<CheckpointFile> {
    let named = chat_template.map(|source| CheckpointFile {
        name: "chat_template.jinja".to_owned(),
        source: source.to_path_buf(),
    });
    NAMES
        .into_iter()
        .filter_map(|name| {
            if let (Some(named), "chat_template.jinja") = (&named, name) {
                return Some(named.clone());
            }
            let source = directory.join(name);
            source.is_file().then(|| CheckpointFile { name: name.to_owned(), source })
        })
        .collect()
}

/// A UTF-8 text file.
pub(crate) fn read_text(path: &Path) -> Result<String, TextError> {
    std::fs::read_to_string(path)
        .map_err(|source| TextError::Read { path: path.to_path_buf(), source })
}

/// A JSON file.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value, TextError> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|source| TextError::Json { path: path.to_path_buf(), source })
}

/// A JSON file that need not be there.
pub(crate) fn read_json_if_present(path: &Path) -> Result<serde_json::Value, TextError> {
    if path.exists() { read_json(path) } else { Ok(serde_json::Value::Null) }
}
