//! A `config.json` before anybody knows what it describes.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::model::error::ModelError;

/// The entries of a `config.json`.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    /// What errors name.
    pub(crate) path: PathBuf,
    pub(crate) entries: Map<String, Value>,
}

impl ConfigFile {
    /// Reads `config.json` in `dir`.
    pub(crate) fn read(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(ModelError::io("read", &path))?;
        Self::parse(&text, &path)
    }

    /// Of the text of a `config.json`.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ModelError> {
        let entries = serde_json::from_str(text).map_err(|e| malformed(path, e))?;
        Ok(Self { path: path.to_path_buf(), entries })
    }

    /// The class of transformers that the checkpoint is of; none where `architectures` does
    /// not name one and no other.
    pub(crate) fn class(&self) -> Option<&str> {
        match self.classes().as_slice() {
            [name] => Some(name),
            _ => None,
        }
    }

    /// That it is of none of the `supported` classes.
    pub(crate) fn unsupported_class(&self, supported: &[&str]) -> ModelError {
        let names = self.classes();
        let found = if names.is_empty() { "missing".to_owned() } else { names.join(", ") };
        let (last, others) = supported.split_last().unwrap_or((&"", &[]));
        let supported = format!("{} and {last}", others.join(", "));
        ModelError::unsupported(&self.path, "architectures", found, &supported)
    }

    fn classes(&self) -> Vec<&str> {
        match self.entries.get("architectures") {
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// Checks that `model_type`, where there is one, is what `class` has.
    pub(crate) fn check_type(&self, expected: &str, class: &str) -> Result<(), ModelError> {
        check_type(&self.entries, "model_type", expected, class, &self.path)
    }
}

/// Checks that the `model_type` of `entries`, which errors call `field`, is `expected` or
/// absent.
pub(super) fn check_type(
    entries: &Map<String, Value>,
    field: &str,
    expected: &str,
    class: &str,
    path: &Path,
) -> Result<(), ModelError> {
    match entries.get("model_type").and_then(Value::as_str) {
        Some(found) if found != expected => {
            let supported = format!("{expected} for {class}");
            Err(ModelError::unsupported(path, field, found, &supported))
        }
        _ => Ok(()),
    }
}

/// `entries` as what they ought to be.
pub(crate) fn typed<T: serde::de::DeserializeOwned>(
    entries: Map<String, Value>,
    path: &Path,
) -> Result<T, ModelError> {
    serde_json::from_value(Value::Object(entries)).map_err(|e| malformed(path, e))
}

fn malformed(path: &Path, e: serde_json::Error) -> ModelError {
    ModelError::malformed(path, format!("not a model configuration: {e}"))
}
